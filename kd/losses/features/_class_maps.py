"""What the methods on class activation maps share: both classifiers, at every position of the last maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import Convert, check_maps, width_of
from kd.losses.base import Output, Setup, at_least_float32
from kd.losses.feature_term import FeatureTerm, full_precision
from kd.losses.layouts import Tapped
from kd.losses.networks import frozen_copy, linear_classifier


def class_activation_maps(feature: Tensor, classifier_weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map (B, C, H, W) and a classifier (classes, C) → (B, classes, H, W): the classifier at every position.

    Their mean over the positions are the logits (CAT-KD, Eq. 2): of a network in which pooling alone comes before it.
    """
    return F.conv2d(at_least_float32(feature), at_least_float32(classifier_weight)[:, :, None, None], bias)


class ClassMaps(FeatureTerm):
    """Class activation maps of the last maps; both networks have one linear layer behind pooling.

    The student's classifier is trained by them as well, the teacher's is a frozen copy.
    """

    def __init__(self, student_taps: Sequence[str | int] | None, teacher_taps: Sequence[str | int] | None) -> None:
        super().__init__(student_taps, teacher_taps)
        self.head: nn.Module | None = None
        self._own: list[nn.Linear] = []  # the student's classifier, which is no part of the term

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps; their grids may differ."""
        check_maps(self.method, student, teacher)
        return Convert(student.layout, "NCHW"), Convert(teacher.layout, "NCHW")

    def prepare(self, setup: Setup) -> None:
        """Find the student's classifier, copy the teacher's. ``ValueError`` where their classes differ."""
        super().prepare(setup)
        pairs = self.tapped(setup)
        if len(pairs) != 1:
            raise ValueError(f"{self.method} reads one tap on each side, there are {len(pairs)}: name the last map")
        own, other = (linear_classifier(self.method, setup.networks, tap.side, width_of(tap)) for tap in pairs[0])
        if own.out_features != other.out_features:
            raise ValueError(
                f"{self.method} compares class by class: the student has {own.out_features} classes, "
                f"the teacher {other.out_features}"
            )
        self._own, self.head = [own], frozen_copy(other)

    def class_maps(self, student: Output, teacher: Output) -> tuple[Tensor, Tensor]:
        """Compute the class activation maps (B, classes, H, W) of both, the teacher's without gradient."""
        ((feature, goal),) = self.compared(student, teacher)
        own, other = self._own[0], self.head
        assert isinstance(other, nn.Linear)
        with full_precision(feature):
            of_student = class_activation_maps(feature, own.weight, own.bias)
            with torch.no_grad():
                return of_student, class_activation_maps(goal, other.weight, other.bias)
