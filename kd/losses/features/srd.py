"""SRD: Miles, Mikolajczyk, Understanding the Role of the Projector in Distillation, AAAI 2024, arXiv 2303.11098."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd.losses.adapters import as_vectors, width_of
from kd.losses.base import at_least_float32, check_same_shape
from kd.losses.feature_term import FeatureTerm
from kd.losses.layouts import Tapped

__all__ = ["log_sum_distance"]


def log_sum_distance(student_feature: Tensor, teacher_feature: Tensor, exponent: float = 4.0) -> Tensor:
    """Compute log Σ |f_s − f_t|^``exponent`` over all elements of a batch (Eq. 10); both (B, D), normalised.

    The sum is over the batch as well, in the paper and in the code: a larger batch is a larger loss. At equality the
    smallest number of the type stands in the place of 0. The code's factor 2 is the weight.
    """
    check_same_shape("features", student_feature, teacher_feature)
    total = (at_least_float32(student_feature) - at_least_float32(teacher_feature)).abs().pow(exponent).sum()
    return total.clamp(min=torch.finfo(total.dtype).tiny).log()


class LogSumDistance(FeatureTerm):
    """:func:`log_sum_distance` of pooled features, the student's through a linear projector, summed over the taps.

    Both sides are normalised by the statistics of the batch, without parameters.
    """

    over = "batch"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = ("before_classifier",),
        teacher_taps: Sequence[str | int] | None = ("before_classifier",),
        exponent: float = 4.0,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        if not 1 <= exponent < math.inf:
            raise ValueError(f"exponent = {exponent} is not allowed: it must be a finite number, 1 or more")
        self.exponent = exponent

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make pooled vectors, the student's projected, both normalised."""
        own, other = as_vectors(self.method, student, teacher)
        width = width_of(teacher)
        norms = [nn.BatchNorm1d(width, eps=1e-4, affine=False) for _ in range(2)]
        return nn.Sequential(own, nn.Linear(width_of(student), width), norms[0]), nn.Sequential(other, norms[1])

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of one pair."""
        return log_sum_distance(student, teacher, self.exponent)
