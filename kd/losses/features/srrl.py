"""SRRL: Yang, Martinez, Bulat, Tzimiropoulos, Softmax Regression Representation Learning, ICLR 2021, no arXiv id."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from kd.losses.adapters import as_vectors, width_of
from kd.losses.base import Setup, at_least_float32, check_same_shape
from kd.losses.feature_term import FeatureTerm
from kd.losses.layouts import Tapped
from kd.losses.networks import frozen_copy, linear_classifier

__all__ = ["softmax_regression"]


def softmax_regression(
    student_feature: Tensor,
    student_answer: Tensor,
    teacher_feature: Tensor,
    teacher_answer: Tensor,
    w_logits: float = 1.0,
) -> Tensor:
    """Compute the squared distance of features before the classifiers, and ``w_logits`` times that of what they make.

    Features (B, D), the student's adapted; answers (B, classes): logits that the teacher's classifier makes of each.
    Both parts are means over all elements (Eq. 2 and 5).
    """
    check_same_shape("features", student_feature, teacher_feature)
    check_same_shape("logits", student_answer, teacher_answer)
    features = (at_least_float32(student_feature) - at_least_float32(teacher_feature)).square().mean()
    return features + w_logits * (at_least_float32(student_answer) - at_least_float32(teacher_answer)).square().mean()


class SoftmaxRegression(FeatureTerm):
    """:func:`softmax_regression` of the adapted, pooled student feature, put into the teacher's classifier.

    Maps go through a 1×1 convolution with batch norm and ReLU before they are pooled, vectors through a linear layer
    with batch norm. Between the teacher's tap and its classifier there must be nothing but pooling.
    """

    over = "batch"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-1,),
        teacher_taps: Sequence[str | int] | None = ("before_classifier",),
        w_logits: float = 1.0,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        if not 0 <= w_logits < math.inf:
            raise ValueError(f"w_logits = {w_logits} is not allowed: it must be a finite number, 0 or more")
        self.w_logits = w_logits
        self.head: nn.Module | None = None

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make vectors of the teacher's width."""
        own, other = as_vectors(self.method, student, teacher)
        width, target = width_of(student), width_of(teacher)
        if student.layout.kind == "NCHW":
            conv = nn.Conv2d(width, target, 1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(target), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), other
        return nn.Sequential(own, nn.Linear(width, target), nn.BatchNorm1d(target)), other

    def prepare(self, setup: Setup) -> None:
        """Build the adapters and copy the teacher's classifier, frozen."""
        super().prepare(setup)
        widths = {width_of(teacher) for _, teacher in self.tapped(setup)}
        if len(widths) != 1:
            raise ValueError(f"{self.method} puts all taps into one classifier: their widths are {sorted(widths)}")
        self.head = frozen_copy(linear_classifier(self.method, setup.networks, "teacher", widths.pop()))

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of one pair."""
        assert self.head is not None
        return softmax_regression(student, self.head(student), teacher, self.head(teacher), self.w_logits)
