"""FSP: Yim, Joo, Bae, Kim, A Gift from Knowledge Distillation, CVPR 2017, no arXiv id."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import POINTWISE, pointwise
from kd.losses.base import Batch, Output, at_least_float32, check_choice, check_same_shape
from kd.losses.feature_term import ConsecutiveTerm, full_precision
from kd.losses.layouts import Tapped

__all__ = ["flow_matrix", "flow_of_solution"]

VARIANTS = ("code", "paper")


def flow_matrix(feature: Tensor, following: Tensor, variant: str = "code") -> Tensor:
    """Map (B, C₁, H, W) and (B, C₂, h, w) → (B, C₁, C₂): mean over the positions of their products (Eq. 1).

    The larger map is pooled to the grid of the smaller one: by the mean in the code, by the maximum in the paper.
    """
    pool = F.adaptive_avg_pool2d if check_choice("variant", variant, VARIANTS) == "code" else F.adaptive_max_pool2d
    feature, following = at_least_float32(feature), at_least_float32(following)
    size = (min(feature.shape[2], following.shape[2]), min(feature.shape[3], following.shape[3]))
    one, other = ((f if tuple(f.shape[2:]) == size else pool(f, size)).flatten(2) for f in (feature, following))
    return one @ other.transpose(1, 2) / one.shape[2]


def flow_of_solution(
    student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], variant: str = "code"
) -> Tensor:
    """Compute the squared distance of the flow matrices of each layer and the next one, summed over these pairs.

    Maps (B, C, H, W), two or more, from the input to the output, of equal widths on both sides.

    ``variant``: ``"code"``, the mean over samples and entries (CIFAR-100 weight 50); ``"paper"``, Eq. 2: the sum over
    the entries, mean over the samples, and max pooling.
    """
    values = []
    for student, teacher in zip(pairwise(student_features), pairwise(teacher_features), strict=True):
        own, other = flow_matrix(*student, variant), flow_matrix(*teacher, variant)
        check_same_shape("flow matrices", own, other)
        squares = (own - other).square()
        values.append(squares.mean() if variant == "code" else squares.sum((1, 2)).mean())
    return torch.stack(values).sum()


class FlowOfSolution(ConsecutiveTerm):
    """:func:`flow_of_solution` of the tapped maps; null is all stages.

    The paper trains with it alone first (the code of the CIFAR-100 tables: 30 epochs), then with labels: a schedule on
    its weight, ``{_target_: kd.distill.schedules.Step, milestones: [30], gamma: 0}``. ``adapter``: see
    :func:`~kd.losses.adapters.pointwise`; without one the widths must be equal.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = None,
        teacher_taps: Sequence[str | int] | None = None,
        adapter: str = "auto",
        variant: str = "code",
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.adapter = check_choice("adapter", adapter, POINTWISE)
        self.variant = check_choice("variant", variant, VARIANTS)

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps on the teacher's grid, the student's of the teacher's width."""
        return pointwise(self.method, self.adapter, student, teacher)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the pairs of layers."""
        pairs = self.compared(student, teacher)
        with full_precision(pairs[0][0]):
            return flow_of_solution([s for s, _ in pairs], [t for _, t in pairs], self.variant)
