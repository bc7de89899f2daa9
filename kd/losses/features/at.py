"""AT: Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, arXiv 1612.03928."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch, Output, Setup, Term, at_least_float32, check_choice
from kd.losses.layouts import cannot_compare, cure_of, tokens_to_map

__all__ = ["attention_map", "attention_transfer"]

VARIANTS = ("code", "paper")


def attention_map(feature: Tensor, p: float = 2) -> Tensor:
    """Map (B, C, H, W) → (B, H·W): mean over channels of |f|^p, each sample's map divided by its L2 norm; ``p`` ≥ 1.

    A map of zeros stays zero. The paper sums over channels (section 3.1); after the norm it is the same map. The code
    of CRD's benchmark leaves out the absolute value: another map for odd p where features are negative.
    """
    _check_map("a feature", feature)
    return F.normalize(at_least_float32(feature).abs().pow(_check_p(p)).mean(1).flatten(1), dim=1)


def attention_transfer(student_feature: Tensor, teacher_feature: Tensor, p: float = 2, variant: str = "code") -> Tensor:
    """Compute the distance of the attention maps of two features (B, C, H, W); the channels may differ.

    Sizes may differ too: the larger feature is average-pooled to the smaller one before its map is taken.

    ``variant``: ``"code"``, the mean over batch and positions of squared differences (the authors' code and all the
    benchmarks, CIFAR-100 weight 1000 for a sum over three stages); ``"paper"``, Eq. 2: the L2 norm of the difference,
    not squared, mean over the batch. The paper's factor β/2 is the weight.
    """
    check_choice("variant", variant, VARIANTS)
    _check_map("the student's feature", student_feature)
    _check_map("the teacher's feature", teacher_feature)
    (height, width), (t_height, t_width) = student_feature.shape[2:], teacher_feature.shape[2:]
    size = (min(height, t_height), min(width, t_width))
    student = attention_map(_pool(student_feature, size), p)
    teacher = attention_map(_pool(teacher_feature, size), p)
    if variant == "code":
        return (student - teacher).square().mean()
    return torch.linalg.vector_norm(student - teacher, dim=1).mean()  # at zero difference torch takes 0 as gradient


def _pool(feature: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(feature.shape[2:]) == size:
        return feature
    return F.adaptive_avg_pool2d(at_least_float32(feature), size)


def _as_map(feature: Tensor, prefix: int | None) -> Tensor:
    return feature if prefix is None else tokens_to_map(feature, prefix)


def _check_map(name: str, feature: Tensor) -> None:
    if feature.ndim != 4:
        raise ValueError(f"{name} has shape {tuple(feature.shape)}: attention maps need (B, C, H, W)")


def _check_p(p: float) -> float:
    if not 1 <= p < math.inf:
        raise ValueError(f"p = {p} is not allowed: it must be a finite number, 1 or more")
    return p


class AttentionTransfer(Term):
    """:func:`attention_transfer` summed over the taps; ``None`` is all stages of each network.

    Tokens are compared as maps: prefix tokens are left out, the patches are a square grid.
    """

    needs_student_logits = False
    needs_teacher_logits = False
    over = "samples"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = None,
        teacher_taps: Sequence[str | int] | None = None,
        p: float = 2,
        variant: str = "code",
    ) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = student_taps, teacher_taps
        self.p = _check_p(p)
        self.variant = check_choice("variant", variant, VARIANTS)
        self.prefixes: list[tuple[int | None, int | None]] = []  # of each pair that is tokens: how many to leave out

    def prepare(self, setup: Setup) -> None:
        """Refuse taps that are not equally many, or neither maps (B, C, H, W) nor a square grid of tokens."""
        self.prefixes = []
        for student, teacher in self.tapped(setup):
            kinds = {student.layout.kind, teacher.layout.kind}
            if not kinds <= {"NCHW", "tokens"}:
                cure = cure_of(student, teacher, ("maps (B, C, H, W)", "tokens"))
                raise cannot_compare("at", student, teacher, cure)
            for tap in (student, teacher):
                if tap.grid is None:
                    cure = f"{tap.bare} has no square grid, say how many prefix tokens it has as {tap.bare}@tokens1"
                    raise cannot_compare("at", student, teacher, cure)
            both = [tap.layout.prefix if tap.layout.kind == "tokens" else None for tap in (student, teacher)]
            self.prefixes.append((both[0], both[1]))

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the taps."""
        pairs = self.pairs(student, teacher)
        prefixes = self.prefixes or [(None, None)] * len(pairs)
        maps = [(_as_map(s, p), _as_map(t, q)) for (s, t), (p, q) in zip(pairs, prefixes, strict=True)]
        return torch.stack([attention_transfer(s, t, self.p, self.variant) for s, t in maps]).sum()
