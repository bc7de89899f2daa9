"""NST: Huang and Wang, Like What You Like: Knowledge Distillation via Selectivity Transfer, 2017, arXiv 1707.01219."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import as_maps
from kd.losses.base import at_least_float32
from kd.losses.feature_term import FeatureTerm
from kd.losses.layouts import Tapped

__all__ = ["neuron_selectivity"]


def neuron_selectivity(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Compute the squared maximum mean discrepancy of the channels' maps under the kernel (xᵀy)², mean over samples.

    Both (B, C, H, W) of one grid, the widths may differ; each map is divided by its L2 norm (Eq. 7 to 9, d = 2, c = 0).
    """
    if student_feature.shape[2:] != teacher_feature.shape[2:]:
        shapes = f"the student's is {tuple(student_feature.shape)}, the teacher's {tuple(teacher_feature.shape)}"
        raise ValueError(f"features must have one grid: {shapes}")
    units = (F.normalize(at_least_float32(f).flatten(2), dim=2) for f in (student_feature, teacher_feature))
    student, teacher = units

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return (one @ other.transpose(1, 2)).square().mean()

    return kernel(teacher, teacher) + kernel(student, student) - 2 * kernel(student, teacher)


class NeuronSelectivity(FeatureTerm):
    """:func:`neuron_selectivity` summed over the taps; null is all stages. The larger grid is pooled to the smaller."""

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = None,
        teacher_taps: Sequence[str | int] | None = None,
    ) -> None:
        super().__init__(student_taps, teacher_taps)

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps of one grid."""
        return as_maps(self.method, student, teacher)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of one pair."""
        return neuron_selectivity(student, teacher)
