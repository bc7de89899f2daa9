"""FitNets' hint: Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, arXiv 1412.6550."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd.losses.adapters import KINDS, match
from kd.losses.base import Batch, Output, Setup, Term, at_least_float32, check_choice, check_same_shape, unit_length

__all__ = ["hint_loss"]

VARIANTS = ("code", "paper", "unit")


def hint_loss(student_feature: Tensor, teacher_feature: Tensor, variant: str = "code") -> Tensor:
    """Compute the squared distance of two features of one shape (B, …); the student's has been through its adapter.

    ``variant``: ``"code"``, the mean of squared differences over all elements (the implementations that the CIFAR-100
    tables come from, weight 100); ``"paper"``, Eq. 3: ½ Σ (r(f_s) − f_t)² per sample, mean over the batch. The paper's
    value is larger by half the number of elements of a sample. ``"unit"``, the L2 loss of MMRazor: Σ (s/‖s‖ − t/‖t‖)²
    per sample, each flattened, mean over the batch: the direction of the whole feature alone counts.
    """
    check_choice("variant", variant, VARIANTS)
    check_same_shape("features", student_feature, teacher_feature)
    student, teacher = (at_least_float32(f).flatten(1) for f in (student_feature, teacher_feature))
    if variant == "unit":
        return (unit_length(student) - unit_length(teacher)).square().sum(1).mean()
    squares = (student - teacher).square()
    return squares.mean() if variant == "code" else squares.sum(1).mean() / 2


class Hint(Term):
    """:func:`hint_loss` of the adapted student taps, summed over the taps.

    The default tap -2, the stage before the last, is the middle layer of the paper: "hint layer 2" of CIFAR resnets.
    The paper trains in two stages (hint alone, then KD); here the term stands beside the others from the start, as in
    the CIFAR-100 benchmark code, and a schedule on its weight takes it away. ``adapter``: see
    :func:`~kd.losses.adapters.build_adapter`, and :func:`~kd.losses.adapters.match` for maps beside tokens and for
    grids of other sizes.
    """

    needs_student_logits = False
    needs_teacher_logits = False
    over = "samples"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-2,),
        teacher_taps: Sequence[str | int] | None = (-2,),
        adapter: str = "auto",
        variant: str = "code",
    ) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = student_taps, teacher_taps
        self.adapter = check_choice("adapter", adapter, KINDS)
        self.variant = check_choice("variant", variant, VARIANTS)
        self.adapters = nn.ModuleList()
        self.goals = nn.ModuleList()  # what the teacher's features go through; no parameters

    def prepare(self, setup: Setup) -> None:
        """Build one adapter a pair of taps, where and of the type that the student's feature is."""
        matched = [match("hint", self.adapter, s, t) for s, t in self.tapped(setup)]
        features = [s for s, _ in self.pairs(setup.student, setup.teacher)]
        self.adapters = nn.ModuleList(a.to(f) for (a, _), f in zip(matched, features, strict=True))
        self.goals = nn.ModuleList(goal for _, goal in matched)
        normalised = any(isinstance(m, _BatchNorm) for m in self.adapters.modules())
        self.over = "batch" if normalised else "samples"  # batch statistics are those of the whole batch

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the taps."""
        pairs = self.pairs(student, teacher)
        if not self.adapters:
            raise ValueError("the adapters are missing: call prepare(setup) before the first batch")
        both = zip(self.adapters, self.goals, pairs, strict=True)
        return torch.stack([hint_loss(adapter(s), goal(t), self.variant) for adapter, goal, (s, t) in both]).sum()
