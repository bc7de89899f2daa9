"""PAD-L2: Zhang, Lan, Zhang, Yang, Lian, Prime-Aware Adaptive Distillation, ECCV 2020, arXiv 2008.01458."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd.losses.adapters import as_vectors, width_of
from kd.losses.base import Batch, Output, Setup, at_least_float32, check_same_shape
from kd.losses.feature_term import FeatureTerm, full_precision
from kd.losses.layouts import Tapped

__all__ = ["prime_aware_distance"]


def prime_aware_distance(
    student_feature: Tensor, teacher_feature: Tensor, log_variance: Tensor, eps: float = 1e-6
) -> Tensor:
    """Compute the mean over all elements of (t − s)² / (``eps`` + e^v) + v, v the predicted ``log_variance`` (Eq. 7).

    All (B, D). Samples and channels that the student cannot match get a large variance, and count less.
    """
    check_same_shape("features", student_feature, teacher_feature)
    check_same_shape("the feature and the variance", student_feature, log_variance)
    squares = (at_least_float32(teacher_feature) - at_least_float32(student_feature)).square()
    variance = at_least_float32(log_variance)
    return (squares / (eps + variance.exp()) + variance).mean()


class PrimeAwareDistance(FeatureTerm):
    """:func:`prime_aware_distance` of pooled features, the student's through a linear layer, summed over the taps.

    The variances are made of the adapted feature by a linear layer with batch norm.
    """

    over = "batch"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = ("before_classifier",),
        teacher_taps: Sequence[str | int] | None = ("before_classifier",),
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.variances = nn.ModuleList()

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make pooled vectors, the student's of the teacher's width."""
        own, other = as_vectors(self.method, student, teacher)
        return nn.Sequential(own, nn.Linear(width_of(student), width_of(teacher))), other

    def prepare(self, setup: Setup) -> None:
        """Build the adapters, and what predicts the variances."""
        super().prepare(setup)
        features = self.pairs(setup.student, setup.teacher)
        widths = [width_of(teacher) for _, teacher in self.tapped(setup)]
        made = (nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)) for width in widths)
        self.variances = nn.ModuleList(layers.to(s) for layers, (s, _) in zip(made, features, strict=True))

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the taps."""
        values = []
        for variance, (own, other) in zip(self.variances, self.compared(student, teacher), strict=True):
            predicted = variance(own)
            with full_precision(own):
                values.append(prime_aware_distance(own, other, predicted))
        return torch.stack(values).sum()
