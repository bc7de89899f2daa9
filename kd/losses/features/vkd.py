"""VkD: Miles et al., Improving Knowledge Distillation using Orthogonal Projections, CVPR 2024, arXiv 2403.06213."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from kd.losses.adapters import as_vectors, width_of
from kd.losses.base import at_least_float32, check_same_shape
from kd.losses.feature_term import FeatureTerm
from kd.losses.layouts import Tapped

__all__ = ["orthogonal_projection"]


def orthogonal_projection(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Compute the Huber distance (mean over elements) of projected student and layer-normalised teacher; both (B, D).

    The normalisation has no parameters (section 3.3). For generative tasks the paper whitens the teacher instead.
    """
    check_same_shape("features", student_feature, teacher_feature)
    teacher = at_least_float32(teacher_feature)
    return F.smooth_l1_loss(at_least_float32(student_feature), F.layer_norm(teacher, teacher.shape[1:]))


class OrthogonalProjection(FeatureTerm):
    """:func:`orthogonal_projection` of pooled features, summed over the taps.

    The projector's columns stay orthonormal while it is trained (its rows where the student is wider), so that it
    keeps the distances between samples.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = ("before_classifier",),
        teacher_taps: Sequence[str | int] | None = ("before_classifier",),
    ) -> None:
        super().__init__(student_taps, teacher_taps)

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make pooled vectors, the student's projected."""
        own, other = as_vectors(self.method, student, teacher)
        return nn.Sequential(own, orthogonal(nn.Linear(width_of(student), width_of(teacher), bias=False))), other

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of one pair."""
        return orthogonal_projection(student, teacher)
