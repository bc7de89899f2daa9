"""ScaleKD: Fan et al., Strong Vision Transformers Could Be Excellent Teachers, NeurIPS 2024, arXiv 2411.06786."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import Convert, check_maps
from kd.losses.base import Batch, Output, Setup, at_least_float32, check_same_shape, unit_length
from kd.losses.feature_term import FeatureTerm, full_precision
from kd.losses.layouts import Tapped, map_to_tokens
from kd.losses.logits._divergences import check_factor

__all__ = ["dual_view_distance"]

PER_HEAD = 64  # about so many numbers in a head of the attention
SHARPNESS = 5  # its scores are multiplied by this before the softmax, as in the authors' code


def dual_view_distance(
    student_whole: Tensor, student_varying: Tensor, teacher_feature: Tensor, w_varying: float = 0.75
) -> Tensor:
    """Compute the squared distance of two views of the teacher's map, each position of unit length over the channels.

    All (B, C, H, W), the student's two projected. The first view is the map itself; the second one, counted
    ``w_varying`` times, the map without its mean over the positions: what is left of a discrete cosine transform
    without its constant part. Summed over a sample, mean over the batch. The code's α of the first view is the weight.
    """
    values = []
    for student, varying in ((student_whole, False), (student_varying, True)):
        check_same_shape("features", student, teacher_feature)
        own, other = (at_least_float32(f) for f in (student, teacher_feature))
        if varying:
            own, other = (f - f.mean((2, 3), keepdim=True) for f in (own, other))
        values.append((unit_length(own) - unit_length(other)).square().flatten(1).sum(1).mean())
    return values[0] + w_varying * values[1]


class CrossAttentionProjector(nn.Module):
    """Makes a map of the teacher's shape: learned queries, one for each of its positions, attend to the student's map.

    The student's map goes through a 3×3 convolution with batch norm and ReLU, and has learned positions; the queries
    go through a linear layer with ReLU. Behind the attention are a layer norm and a feed-forward block, four times as
    wide, with its residual.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        """Make the layers; ``student``, ``teacher``: (B, C, H, W)."""
        super().__init__()
        width, target = student[1], teacher[1]
        self.grid = teacher[2], teacher[3]
        self.local = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.positions = nn.Parameter(torch.empty(width, student[2], student[3]))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.queries = nn.Parameter(torch.randn(self.grid[0] * self.grid[1], target))
        self.query = nn.Sequential(nn.Linear(target, target), nn.ReLU())
        self.heads = math.gcd(target, max(1, target // PER_HEAD))
        self.asked, self.key, self.value = nn.Linear(target, target), nn.Linear(width, target), nn.Linear(width, target)
        self.out = nn.Linear(target, target)
        self.norm = nn.LayerNorm(target)
        self.block = nn.Sequential(nn.Linear(target, 4 * target), nn.ReLU(), nn.Linear(4 * target, target))

    def forward(self, feature: Tensor) -> Tensor:
        """Map (B, C, H, W) → (B, D, h, w)."""
        if feature.shape[1:] != self.positions.shape:
            raise ValueError(
                f"scalekd has learned positions for maps of {tuple(self.positions.shape)}, as in the first batch, and "
                f"this one is of {tuple(feature.shape[1:])}: give images of one size"
            )
        tokens = map_to_tokens(self.local(feature) + self.positions)
        asked = self.asked(self.query(self.queries)).to(tokens).expand(len(feature), -1, -1)
        parts = asked, self.key(tokens), self.value(tokens)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        scale = SHARPNESS / math.sqrt(query.shape[3])
        attended = F.scaled_dot_product_attention(query, key, value, scale=scale)
        found = self.norm(self.out(attended.transpose(1, 2).flatten(2)))
        return (found + self.block(found)).transpose(1, 2).unflatten(2, self.grid)


class ScaleDistillation(FeatureTerm):
    """:func:`dual_view_distance` of two projections of the student's map, by cross-attention; summed over the taps.

    For teachers that are transformers and students of any kind: the grids and layouts may differ. The student's grid is
    that of the first batch. ``w_varying``: factor of the second view.

    The paper's third part is not here, for which the student's projected map of the stage before runs through the
    teacher's last stage: not every network has that stage in one module that takes the tapped map.
    """

    over = "batch"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-1,),
        teacher_taps: Sequence[str | int] | None = (-1,),
        w_varying: float = 0.75,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.w_varying = check_factor("w_varying", w_varying)
        self.projectors = nn.ModuleList()

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps, each of its own grid."""
        check_maps(self.method, student, teacher)
        return Convert(student.layout, "NCHW"), Convert(teacher.layout, "NCHW")

    def prepare(self, setup: Setup) -> None:
        """Build two projectors for each pair of taps."""
        super().prepare(setup)
        both = zip(self.tapped(setup), self.pairs(setup.student, setup.teacher), strict=True)
        self.projectors = nn.ModuleList(
            nn.ModuleList(CrossAttentionProjector(s.as_map().shape, t.as_map().shape) for _ in range(2)).to(feature)
            for (s, t), (feature, _) in both
        )

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the taps."""
        values = []
        for projectors, (own, other) in zip(self.projectors, self.compared(student, teacher), strict=True):
            assert isinstance(projectors, nn.ModuleList)
            whole, varying = (projector(own) for projector in projectors)
            with full_precision(own):
                values.append(dual_view_distance(whole, varying, other, self.w_varying))
        return torch.stack(values).sum()
