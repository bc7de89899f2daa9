"""PKD for detectors: Cao et al., Distillation via Pearson Correlation Coefficient, NeurIPS 2022, arXiv 2207.02039."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kd.losses.adapters import POINTWISE, pointwise
from kd.losses.base import at_least_float32, check_choice, check_same_shape
from kd.losses.feature_term import FeatureTerm
from kd.losses.layouts import Tapped

__all__ = ["feature_pearson"]


def feature_pearson(student_feature: Tensor, teacher_feature: Tensor, eps: float = 1e-6) -> Tensor:
    """Compute half the mean squared difference of maps (B, C, H, W), channels standardised over batch and positions.

    It is 1 − r of the channels (Eq. 4), r Pearson's correlation, but for the n − 1 of the deviation; ``eps`` is added
    to it.
    """
    check_same_shape("features", student_feature, teacher_feature)
    student, teacher = (_standardised(at_least_float32(f), eps) for f in (student_feature, teacher_feature))
    return (student - teacher).square().mean() / 2


def _standardised(feature: Tensor, eps: float) -> Tensor:
    channels = feature.transpose(0, 1).flatten(1)
    return (channels - channels.mean(1, keepdim=True)) / (channels.std(1, keepdim=True) + eps)


class FeaturePearson(FeatureTerm):
    """:func:`feature_pearson` summed over the taps.

    ``adapter``: see :func:`~kd.losses.adapters.pointwise`.
    """

    over = "batch"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-1,),
        teacher_taps: Sequence[str | int] | None = (-1,),
        adapter: str = "auto",
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.adapter = check_choice("adapter", adapter, POINTWISE)

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps on the teacher's grid, the student's of the teacher's width."""
        return pointwise(self.method, self.adapter, student, teacher)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of one pair."""
        return feature_pearson(student, teacher)
