"""CAT-KD: Guo, Yan, Li, Lin, Class Attention Transfer Based Knowledge Distillation, CVPR 2023, arXiv 2304.12777."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import Convert, check_maps, width_of
from kd.losses.base import Batch, Output, Setup, at_least_float32, check_choice
from kd.losses.feature_term import FeatureTerm, full_precision
from kd.losses.layouts import Tapped
from kd.losses.networks import frozen_copy, linear_classifier

__all__ = ["class_activation_maps", "class_attention_transfer"]

VARIANTS = ("code", "paper")


def class_activation_maps(feature: Tensor, classifier_weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, C, H, W) and a classifier (classes, C) → (B, classes, H, W): the classifier at every position.

    Their mean over the positions are the logits (Eq. 2): of a network in which pooling alone comes before it.
    """
    return F.conv2d(at_least_float32(feature), at_least_float32(classifier_weight)[:, :, None, None], bias)


def class_attention_transfer(
    student_cam: Tensor, teacher_cam: Tensor, resolution: int = 2, normalize: bool = True, variant: str = "code"
) -> Tensor:
    """Squared distance of class activation maps (B, classes, H, W), pooled to ``resolution`` cells a side.

    The grids may differ. ``normalize``: the pooled map of each class is divided by its L2 norm.

    ``variant``: ``"code"``, the mean over samples, classes and positions; ``"paper"``, Eq. 5: the sum over the
    positions, which is ``resolution``² times as large.
    """
    check_choice("variant", variant, VARIANTS)
    if student_cam.shape[:2] != teacher_cam.shape[:2]:
        shapes = f"the student's are {tuple(student_cam.shape)}, the teacher's {tuple(teacher_cam.shape)}"
        raise ValueError(f"class activation maps must be of the same samples and classes: {shapes}")
    pooled = [F.adaptive_avg_pool2d(at_least_float32(m), resolution).flatten(2) for m in (student_cam, teacher_cam)]
    student, teacher = (_unit(m) for m in pooled) if normalize else pooled
    squares = (student - teacher).square()
    return squares.mean() if variant == "code" else squares.sum(2).mean()


def _unit(pooled: Tensor) -> Tensor:
    """Each class's map divided by its norm; one of zeros stays so, without a gradient that grows beyond all bounds."""
    norms = torch.linalg.vector_norm(pooled, dim=2, keepdim=True)
    return pooled / norms.masked_fill(norms == 0, math.inf)


class ClassAttentionTransfer(FeatureTerm):
    """:func:`class_attention_transfer` of the last maps; both networks have one linear layer behind pooling.

    The student's classifier is trained by it as well.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-1,),
        teacher_taps: Sequence[str | int] | None = (-1,),
        resolution: int = 2,
        normalize: bool = True,
        variant: str = "code",
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        if resolution < 1:
            raise ValueError(f"resolution = {resolution} is not allowed: it must be 1 or more")
        self.resolution, self.normalize = resolution, normalize
        self.variant = check_choice("variant", variant, VARIANTS)
        self.head: nn.Module | None = None
        self._own: list[nn.Linear] = []  # the student's classifier, which is no part of the term

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Maps; the grids are brought to one by pooling the class activation maps."""
        check_maps(self.method, student, teacher)
        return Convert(student.layout, "NCHW"), Convert(teacher.layout, "NCHW")

    def prepare(self, setup: Setup) -> None:
        """Find the student's classifier, copy the teacher's, frozen."""
        super().prepare(setup)
        pairs = self.tapped(setup)
        if len(pairs) != 1:
            raise ValueError(f"{self.method} reads one tap on each side, there are {len(pairs)}: name the last map")
        own, other = (
            linear_classifier(self.method, setup.networks, tap.side, width_of(tap))
            for tap in (pairs[0][0], pairs[0][1])
        )
        if own.out_features != other.out_features:
            raise ValueError(
                f"{self.method} compares class by class: the student has {own.out_features} classes, "
                f"the teacher {other.out_features}"
            )
        self._own, self.head = [own], frozen_copy(other)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """The loss of the pair."""
        ((feature, goal),) = self.compared(student, teacher)
        own, other = self._own[0], self.head
        assert isinstance(other, nn.Linear)
        with full_precision(feature):
            student_cam = class_activation_maps(feature, own.weight, own.bias)
            with torch.no_grad():
                teacher_cam = class_activation_maps(goal, other.weight, other.bias)
            return class_attention_transfer(student_cam, teacher_cam, self.resolution, self.normalize, self.variant)
