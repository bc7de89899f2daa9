"""CC: Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019, arXiv 1904.01802."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import Pool, as_vectors, width_of
from kd.losses.base import at_least_float32, check_choice, check_same_shape
from kd.losses.feature_term import FeatureTerm
from kd.losses.layouts import Tapped

__all__ = ["correlation_congruence", "gaussian_correlation"]

VARIANTS = ("code", "paper")


def gaussian_correlation(feature: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Map (B, D) → (B, B): exp(−γ ‖f_i − f_j‖²) of L2-normalised rows, as its Taylor series up to ``order`` (Eq. 8)."""
    unit = F.normalize(at_least_float32(feature), dim=1)
    cosine = unit @ unit.T
    terms = [(2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(order + 1)]
    return math.exp(-2 * gamma) * sum(terms[1:], terms[0])


def correlation_congruence(
    student_feature: Tensor, teacher_feature: Tensor, gamma: float = 0.4, order: int = 2, variant: str = "code"
) -> Tensor:
    """Compare how the samples of a batch relate to one another; both (B, D).

    ``variant``: ``"code"``, the mean over neighbouring samples i, i + 1 of Σ_d |f_s − f_t|_i · |f_s − f_t|_(i+1), which
    the authors gave to the CIFAR-100 benchmark (weight 0.02): another quantity, which needs equal widths and depends on
    the order of the batch; ``"paper"``, Eq. 5: the mean of squared differences of :func:`gaussian_correlation`.
    """
    check_choice("variant", variant, VARIANTS)
    if variant == "paper":
        own, other = (gaussian_correlation(f, gamma, order) for f in (student_feature, teacher_feature))
        return (own - other).square().mean()
    check_same_shape("features", student_feature, teacher_feature)
    difference = (at_least_float32(student_feature) - at_least_float32(teacher_feature)).abs()
    return (difference[:-1] * difference[1:]).sum(1).sum() / max(1, len(difference) - 1)


class CorrelationCongruence(FeatureTerm):
    """:func:`correlation_congruence` of embedded, pooled features, summed over the taps.

    ``embedding``: width of the two linear layers, both trained, 128 in the code; null: none, then ``variant`` code
    needs equal widths.
    """

    over = "batch"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = ("before_classifier",),
        teacher_taps: Sequence[str | int] | None = ("before_classifier",),
        embedding: int | None = 128,
        gamma: float = 0.4,
        order: int = 2,
        variant: str = "code",
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        if embedding is not None and embedding < 1:
            raise ValueError(f"embedding = {embedding} is not allowed: it must be 1 or more, or null")
        if not gamma > 0 or order < 1:
            raise ValueError(
                f"gamma = {gamma}, order = {order} are not allowed: gamma must be above 0, order 1 or more"
            )
        self.embedding, self.gamma, self.order = embedding, gamma, order
        self.variant = check_choice("variant", variant, VARIANTS)

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make pooled vectors, and embed them."""
        own, other = as_vectors(self.method, student, teacher)
        if self.embedding is None:
            if self.variant == "code" and width_of(student) != width_of(teacher):
                raise ValueError(
                    f"{self.method} with variant = code cannot compare {student} with {teacher}: give an embedding, "
                    "or variant=paper"
                )
            return own, other
        return self._embedded(own, student), self._embedded(other, teacher)

    def _embedded(self, pool: Pool | nn.Module, tap: Tapped) -> nn.Module:
        assert self.embedding is not None
        return nn.Sequential(pool, nn.Linear(width_of(tap), self.embedding))

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of one pair."""
        return correlation_congruence(student, teacher, self.gamma, self.order, self.variant)
