"""Pair-wise SKD: Liu et al., Structured Knowledge Distillation for Segmentation, CVPR 2019, arXiv 1903.04197."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import as_maps
from kd.losses.base import at_least_float32
from kd.losses.feature_term import FeatureTerm
from kd.losses.layouts import Tapped

__all__ = ["pairwise_similarity"]


def pairwise_similarity(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Compute the mean over samples and pairs of positions of (a_s − a_t)², a the cosine of two positions' features.

    Both (B, C, H, W) of one grid, the widths may differ. Maximum pooling to cells of 2 × 2 comes first, so that there
    are (H · W / 4)² pairs, which are in memory at once. A position without a response has similarity 0.
    """
    if student_feature.shape[2:] != teacher_feature.shape[2:]:
        shapes = f"the student's is {tuple(student_feature.shape)}, the teacher's {tuple(teacher_feature.shape)}"
        raise ValueError(f"features must have one grid: {shapes}")
    own, other = (_affinity(at_least_float32(f)) for f in (student_feature, teacher_feature))
    return (own - other).square().mean()


def _affinity(feature: Tensor) -> Tensor:
    """Map (B, C, H, W) → (B, N, N)."""
    cells = F.max_pool2d(feature, 2, ceil_mode=True).flatten(2)
    norms = torch.linalg.vector_norm(cells, dim=1, keepdim=True)
    unit = cells / norms.masked_fill(norms == 0, math.inf)
    return unit.transpose(1, 2) @ unit


class PairwiseSimilarity(FeatureTerm):
    """:func:`pairwise_similarity` summed over the taps. The larger of two grids is pooled to the smaller one."""

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-1,),
        teacher_taps: Sequence[str | int] | None = (-1,),
    ) -> None:
        super().__init__(student_taps, teacher_taps)

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps of one grid."""
        return as_maps(self.method, student, teacher)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of one pair."""
        return pairwise_similarity(student, teacher)
