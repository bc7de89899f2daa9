"""ReviewKD: Chen, Liu, Zhao, Jia, Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv 2104.09044."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import Convert, check_maps
from kd.losses.base import Batch, Output, Setup, at_least_float32, check_same_shape
from kd.losses.feature_term import FeatureTerm, full_precision
from kd.losses.layouts import NCHW, VECTOR, Tapped

__all__ = ["hierarchical_context"]

GRIDS = (4, 2, 1)
WIDEST = 512  # channels between the two convolutions of a fusion


def hierarchical_context(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Compute HCL, summed over layers: squared distance of maps (B, C, H, W), and of their means over coarser grids.

    Each layer is a weighted mean: 1 for the map, ½, ¼, ⅛ for grids of 4, 2 and 1 cells a side as far as they are
    smaller (section 3.3).
    """
    layers = []
    for student, teacher in zip(student_features, teacher_features, strict=True):
        check_same_shape("features", student, teacher)
        difference = at_least_float32(student) - at_least_float32(teacher)  # pooled it is the difference of the pooled
        total, weight, weights = difference.square().mean(), 1.0, 1.0
        for grid in (g for g in GRIDS if g < student.shape[2]):
            weight /= 2
            weights += weight
            total = total + weight * F.adaptive_avg_pool2d(difference, grid).square().mean()
        layers.append(total / weights)
    return torch.stack(layers).sum()


class Fusion(nn.Module):
    """ABF, attention-based fusion (section 3.3) of a map with what came of the deeper ones.

    Returns the map in the teacher's width, and the fused one (B, ``middle``, H, W) for the layer before it.
    """

    def __init__(self, width: int, middle: int, target: int, fuses: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(width, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.attention = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuses else None
        self.expand = nn.Sequential(nn.Conv2d(middle, target, 3, padding=1, bias=False), nn.BatchNorm2d(target))
        for layers in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(layers[0].weight, a=1)  # type: ignore[arg-type]

    def forward(self, feature: Tensor, deeper: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map (B, width, H, W) and (B, middle, h, w) → (B, target, H, W), (B, middle, H, W)."""
        found = self.reduce(feature)
        if self.attention is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, found.shape[2:], mode="nearest")
            share = self.attention(torch.cat([found, deeper], dim=1))
            found = found * share[:, :1] + deeper * share[:, 1:]
        return self.expand(found), found


class KnowledgeReview(FeatureTerm):
    """:func:`hierarchical_context` of the teacher's maps and of the student's, each fused with all deeper ones.

    Taps go from the input to the output; a vector is a map of one position. The default is what the code compares: the
    maps before the last activation of each stage, and the features before the classifier. A student's grid is
    resampled to the teacher's.
    """

    over = "batch"  # batch norm

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = ("all:preactivation", "before_classifier"),
        teacher_taps: Sequence[str | int] | None = ("all:preactivation", "before_classifier"),
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.fusions = nn.ModuleList()

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps on the teacher's grid."""
        if student.layout == teacher.layout == VECTOR:
            return nn.Unflatten(1, (-1, 1, 1)), nn.Unflatten(1, (-1, 1, 1))
        _, other = check_maps(self.method, student, teacher)
        return Convert(student.layout, NCHW.kind, other.grid), Convert(teacher.layout, NCHW.kind)

    def prepare(self, setup: Setup) -> None:
        """Build one fusion a layer; that of the deepest has nothing to fuse."""
        super().prepare(setup)
        pairs = self.compared(setup.student, setup.teacher)
        middle = min(WIDEST, pairs[-1][0].shape[1])
        last = len(pairs) - 1
        made = (Fusion(s.shape[1], middle, t.shape[1], fuses=n < last) for n, (s, t) in enumerate(pairs))
        self.fusions = nn.ModuleList(fusion.to(s) for fusion, (s, _) in zip(made, pairs, strict=True))

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the layers, reviewed from the deepest on."""
        pairs = self.compared(student, teacher)
        reviewed: list[Tensor] = []
        deeper = None
        for fusion, (feature, _) in zip(reversed(self.fusions), reversed(pairs), strict=True):
            found, deeper = fusion(feature, deeper)
            reviewed.insert(0, found)
        with full_precision(pairs[0][0]):
            return hierarchical_context(reviewed, [teacher for _, teacher in pairs])
