"""PKT: Passalis, Tefas, Learning Deep Representations with Probabilistic Transfer, ECCV 2018, arXiv 1803.10837."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd.losses.adapters import as_vectors
from kd.losses.base import at_least_float32, check_choice
from kd.losses.feature_term import FeatureTerm
from kd.losses.layouts import Tapped

__all__ = ["probabilistic_transfer"]

VARIANTS = ("code", "paper")


def probabilistic_transfer(
    student_feature: Tensor, teacher_feature: Tensor, variant: str = "code", eps: float = 1e-7
) -> Tensor:
    """Compute the divergence Σ p_t log(p_t / p_s) of how likely the samples of a batch are neighbours; both (B, D).

    p_ij = (cos(f_i, f_j) + 1) / 2, each row divided by its sum (Eq. 3, 4 and 8); the widths may differ. ``eps`` is
    added to norms and to both probabilities in the logarithm.

    ``variant``: ``"code"``, the mean over all pairs, a sample beside itself included (CIFAR-100 weight 30000);
    ``"paper"``, their sum, Eq. 8.
    """
    check_choice("variant", variant, VARIANTS)
    p_s, p_t = (_neighbours(at_least_float32(f), eps) for f in (student_feature, teacher_feature))
    each = p_t * ((p_t + eps) / (p_s + eps)).log()
    return each.mean() if variant == "code" else each.sum()


def _neighbours(feature: Tensor, eps: float) -> Tensor:
    unit = feature / (torch.linalg.vector_norm(feature, dim=1, keepdim=True) + eps)
    similarity = (unit @ unit.T + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)


class ProbabilisticTransfer(FeatureTerm):
    """:func:`probabilistic_transfer` of pooled features, summed over the taps."""

    over = "batch"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = ("before_classifier",),
        teacher_taps: Sequence[str | int] | None = ("before_classifier",),
        variant: str = "code",
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.variant = check_choice("variant", variant, VARIANTS)

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make pooled vectors."""
        return as_vectors(self.method, student, teacher)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of one pair."""
        return probabilistic_transfer(student, teacher, self.variant)
