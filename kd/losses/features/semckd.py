"""SemCKD: Chen et al., Cross-Layer Distillation with Semantic Calibration, AAAI 2021, arXiv 2012.03236."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import as_maps
from kd.losses.base import Batch, Output, Setup, at_least_float32, check_same_shape
from kd.losses.feature_term import FeatureTerm, full_precision
from kd.losses.layouts import Tapped

__all__ = ["semantic_calibration"]


def semantic_calibration(
    student_values: Sequence[Sequence[Tensor]], teacher_values: Sequence[Sequence[Tensor]], attention: Tensor
) -> Tensor:
    """Compute the squared distance of each of the student's layers to each of the teacher's, weighted by ``attention``.

    ``attention`` (B, S, T): how much layer s of a sample learns from layer t, 1 in the sum over t. Values s, t: what is
    compared of the two, of one shape (B, …), the student's projected. Mean over the elements of a value, over the
    samples and, as in the authors' code, over the student's layers.
    """
    rows = []
    for students, teachers in zip(student_values, teacher_values, strict=True):
        distances = []
        for student, teacher in zip(students, teachers, strict=True):
            check_same_shape("values", student, teacher)
            squares = (at_least_float32(student) - at_least_float32(teacher)).square()
            distances.append(squares.flatten(1).mean(1))
        rows.append(torch.stack(distances, dim=1))
    found = torch.stack(rows, dim=1)
    check_same_shape("attention and values", attention, found)
    return (attention * found).sum(2).mean()


class Projection(nn.Sequential):
    """Makes maps of the teacher's width: 1×1, 3×3 and 1×1 convolution, batch norm and ReLU between."""

    def __init__(self, width: int, target: int) -> None:
        middle = 2 * target
        super().__init__(
            *(nn.Conv2d(width, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.ReLU()),
            *(nn.Conv2d(middle, middle, 3, padding=1, bias=False), nn.BatchNorm2d(middle), nn.ReLU()),
            nn.Conv2d(middle, target, 1, bias=False),
        )


class Embedding(nn.Module):
    """Makes the query or the key of each sample: two linear layers on its similarities to ``samples`` of the batch."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples, width = samples, max(1, samples // 4)
        self.layers = nn.Sequential(nn.Linear(samples, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, feature: Tensor) -> Tensor:
        """Map (B, …) → (B, width), of unit length."""
        flat = at_least_float32(feature).flatten(1)
        similarities = flat @ flat[: self.samples].T
        return F.normalize(self.layers(F.pad(similarities, (0, self.samples - similarities.shape[1]))), dim=1)


class SemanticCalibration(FeatureTerm):
    """:func:`semantic_calibration` of all pairs of a tap of the student and one of the teacher; null is all stages.

    As many taps on one side as on the other are not needed. The attention is learned: softmax over the teacher's layers
    of query · key, made of the similarities between the samples of a batch. The larger of two grids is pooled to the
    smaller one, and the student's map is projected.

    ``samples``: the similarities of a sample to so many of its batch are read, by their place in it: the batch size, of
    all processes together. Of a smaller batch the missing ones are 0 (the authors' code takes one batch size alone).
    """

    over = "batch"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = None,
        teacher_taps: Sequence[str | int] | None = None,
        samples: int = 64,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        if samples < 1:
            raise ValueError(f"samples = {samples} is not allowed: it must be 1 or more")
        self.samples = samples
        self.projections, self.queries, self.keys = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()

    def _names(self, student: Output, teacher: Output) -> tuple[list[str | int], list[str | int]]:
        """List every tap of the student beside every one of the teacher."""
        students, teachers = super()._names(student, teacher)
        return [s for s in students for _ in teachers], [t for _ in students for t in teachers]

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps of one grid."""
        return as_maps(self.method, student, teacher)

    def prepare(self, setup: Setup) -> None:
        """Build a projection for each pair, and what makes the query or key of each layer."""
        super().prepare(setup)
        both = zip(self.tapped(setup), self.pairs(setup.student, setup.teacher), strict=True)
        self.projections = nn.ModuleList(
            Projection(s.as_map().shape[1], t.as_map().shape[1]).to(feature) for (s, t), (feature, _) in both
        )
        like = self.pairs(setup.student, setup.teacher)[0][0]
        self.queries, self.keys = (
            nn.ModuleList(Embedding(self.samples).to(like) for _ in names)
            for names in super()._names(setup.student, setup.teacher)
        )

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the loss of all pairs."""
        compared, features = self.compared(student, teacher), self.pairs(student, teacher)
        own = [at_least_float32(layer(s)) for layer, (s, _) in zip(self.projections, compared, strict=True)]
        count = len(self.keys)
        with full_precision(own[0]):
            queries = [embed(s) for embed, (s, _) in zip(self.queries, features[::count], strict=True)]
            keys = [embed(t) for embed, (_, t) in zip(self.keys, features[:count], strict=True)]
            attention = (torch.stack(queries, 1) @ torch.stack(keys, 2)).softmax(2)
            students, teachers = (
                [values[i : i + count] for i in range(0, len(values), count)]
                for values in (own, [t for _, t in compared])
            )
            return semantic_calibration(students, teachers, attention)
