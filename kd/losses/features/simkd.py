"""SimKD: Chen et al., Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022, arXiv 2203.14001."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd.losses.adapters import as_maps, check_maps, width_of
from kd.losses.base import Setup, at_least_float32, check_same_shape
from kd.losses.feature_term import FeatureTerm
from kd.losses.layouts import VECTOR, Tapped, cannot_compare
from kd.losses.networks import classifier, frozen_copy, linear_classifier, with_module

__all__ = ["reused_classifier"]


def reused_classifier(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Compute the mean of squared differences of two features of one shape (B, …), the student's projected (Eq. 3)."""
    check_same_shape("features", student_feature, teacher_feature)
    return (at_least_float32(student_feature) - at_least_float32(teacher_feature)).square().mean()


class Projector(nn.Sequential):
    """Makes maps of the teacher's width: 1×1, 3×3 and 1×1 convolution, each with batch norm and ReLU (figure 3)."""

    def __init__(self, width: int, target: int, factor: int = 2) -> None:
        middle = max(1, target // factor)
        layers: list[nn.Module] = []
        for size, inner, outer in ((1, width, middle), (3, middle, middle), (1, middle, target)):
            conv = nn.Conv2d(inner, outer, size, padding=size // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(outer), nn.ReLU()]
        super().__init__(*layers)


class ReusedClassifier(FeatureTerm):
    """:func:`reused_classifier` of the last maps; what is deployed is student, projector and the teacher's classifier.

    The published objective is this term alone, without labels. ``factor``: the projector is so many times narrower
    inside than the teacher. The larger of two grids is pooled to the smaller one. Features before the classifiers
    (vectors) go through one linear layer instead. The projector counts among the student's parameters.

    Between the tapped maps and the classifier there must be nothing but pooling in either network.
    """

    needs_student_logits = True  # compared once, with what the classifier makes of the tapped features
    needs_teacher_logits = True

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-1,),
        teacher_taps: Sequence[str | int] | None = (-1,),
        factor: int = 2,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        if factor < 1:
            raise ValueError(f"factor = {factor} is not allowed: it must be 1 or more")
        self.factor = factor
        self.head: nn.Module | None = None
        self._dry: list[tuple[str, Tensor, Tensor]] = []  # side, pooled features and logits of the dry pass

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps of one grid, or vectors; the student's projected."""
        if student.layout == teacher.layout == VECTOR:
            return nn.Linear(student.shape[1], teacher.shape[1]), nn.Identity()
        own, other = check_maps(self.method, student, teacher)
        if student.layout != teacher.layout:
            raise cannot_compare(self.method, student, teacher, "tap maps (B, C, H, W), or vectors, on both sides")
        pooled, goal = as_maps(self.method, student, teacher)
        return nn.Sequential(pooled, Projector(own.shape[1], other.shape[1], self.factor)), goal

    def prepare(self, setup: Setup) -> None:
        """Build the projector and copy the teacher's classifier, frozen."""
        pairs = self.tapped(setup)
        if len(pairs) != 1:
            raise ValueError(f"{self.method} reads one tap on each side, there are {len(pairs)}: name the last map")
        self.head = frozen_copy(linear_classifier(self.method, setup.networks, "teacher", width_of(pairs[0][1])))
        super().prepare(setup)
        (features,) = self.pairs(setup.student, setup.teacher)
        for side, output, feature in zip(("student", "teacher"), (setup.student, setup.teacher), features, strict=True):
            self._dry.append((side, feature.flatten(2).mean(2) if feature.ndim > 2 else feature, output.logits))

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of the pair."""
        return reused_classifier(student, teacher)

    def deployed(self, student: nn.Module) -> nn.Module:
        """Return the student with the projector behind the tapped module, and the teacher's classifier as its own."""
        assert self.head is not None
        name, module = classifier(student)
        tap = str((self.student_taps or ())[0]).partition("@")[0]
        for (side, pooled, logits), layer in zip(self._dry, (module, self.head), strict=True):
            with torch.no_grad():
                found = layer(pooled) if getattr(layer, "in_features", None) == pooled.shape[1] else None
            if found is None or not torch.allclose(found, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
                raise ValueError(
                    f"{self.method} needs a {side} with nothing but pooling between the tap and its classifier, which "
                    "answers otherwise here: tap before_classifier on both sides"
                )
        self._dry = []
        if tap == f"{name}:input":
            return with_module(student, name, nn.Sequential(self.adapters[0], self.head))
        if ":" in tap:
            raise ValueError(f"{self.method} puts its projector behind a module: student tap {tap} is not its output")
        changed = with_module(student, name, self.head)
        return with_module(changed, tap, nn.Sequential(student.get_submodule(tap), self.adapters[0]))
