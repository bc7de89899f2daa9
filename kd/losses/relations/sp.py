"""SP: Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, arXiv 1907.09682."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import at_least_float32
from kd.losses.feature_term import FeatureTerm

__all__ = ["similarity_preserving"]


def similarity_preserving(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Compute the mean over pairs of samples of (G̃_s − G̃_t)², G = F Fᵀ, its rows of unit length.

    Both (B, …), flattened; the shapes of a sample may differ (Eq. 1 to 4). The code is the same.
    """
    student, teacher = (at_least_float32(f).flatten(1) for f in (student_feature, teacher_feature))
    own, other = F.normalize(student @ student.T, dim=1), F.normalize(teacher @ teacher.T, dim=1)
    return (own - other).square().mean()


class SimilarityPreserving(FeatureTerm):
    """:func:`similarity_preserving` summed over the taps, of any layout; -1 is the last map, as in the paper."""

    over = "batch"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-1,),
        teacher_taps: Sequence[str | int] | None = (-1,),
    ) -> None:
        super().__init__(student_taps, teacher_taps)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of one pair."""
        return similarity_preserving(student, teacher)
