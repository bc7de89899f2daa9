"""KDSVD: Lee, Kim, Song, Self-supervised KD Using Singular Value Decomposition, ECCV 2018, arXiv 1807.06819."""

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

__all__ = ["singular_vector_relations", "singular_vectors"]

MORE = 3  # so many further vectors of the student may be the one that is like a vector of the teacher
CLOSE = 1e-6  # squared singular values that differ less, as a share of the largest one, have no direction of their own


def singular_vectors(feature: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the ``count`` largest singular values (B, count) of a map (B, C, H, W), and their vectors (B, C, count).

    The right ones of the matrix positions × channels; fewer where it has not as many. Vectors have a gradient, values
    have none. It stays finite where two values are equal, and in a map of zeros: there it is 0.
    """
    matrix = at_least_float32(feature).flatten(2).transpose(1, 2)
    _, values, rows = torch.linalg.svd(matrix.detach(), full_matrices=False)
    every, squares = rows.transpose(1, 2), values.square()
    vectors = every[:, :, :count]
    # to first order a change d of MᵀM v turns v_i by Σ_j v_j (v_j · d_i) / (σ_i² − σ_j²), σ = 0 outside of ``every``
    products = matrix.transpose(1, 2) @ (matrix @ vectors)
    change = products - products.detach()
    inside = rows @ change
    least = (CLOSE * squares[:, :1, None]).square()

    def inverse(gap: Tensor) -> Tensor:
        return gap / (gap.square() + least).clamp(min=torch.finfo(gap.dtype).tiny)

    leading = squares[:, None, :count]
    turned = every @ (inverse(leading - squares[:, :, None]) * inside) + inverse(leading) * (change - every @ inside)
    return values[:, :count], vectors + turned


def singular_vector_relations(
    student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], k: int = 1
) -> Tensor:
    """Compute the squared distance of what the singular vectors of each layer and the next one have to do with another.

    Maps (B, C, H, W), two or more, from the input to the output, of equal widths on both sides; the grids may differ.
    e^(−(v_i − w_j)² / 8) of all channels i of a layer and j of the next one, v and w the ``k`` first right singular
    vectors of positions × channels, times the teacher's singular values (of unit length, all k together); of the
    student's k + 3 first ones those that are most like the teacher's, with their sign. Σ over channels, vectors and
    pairs of layers, mean over the samples, as in the code of the CIFAR-100 tables. Time and memory grow with C².
    """
    relations = []
    for student, teacher in zip(student_features, teacher_features, strict=True):
        check_same_shape("batch and width", student[:, :, 0, 0], teacher[:, :, 0, 0])
        values, other = singular_vectors(teacher, k)
        _, candidates = singular_vectors(student, k + MORE)
        cosines = candidates.transpose(1, 2) @ other
        best = cosines.abs().argmax(1, keepdim=True)
        signs = cosines.gather(1, best).sign().detach()
        own = signs * candidates.gather(2, best.expand(-1, candidates.shape[1], -1))
        scale = F.normalize(values, dim=1).unsqueeze(1)
        relations.append((scale * own, scale * other))
    total = []
    for (own, other), (own_next, other_next) in pairwise(relations):
        found, goal = (
            (-(v.unsqueeze(2) - w.unsqueeze(1)).square() / 8).exp() for v, w in ((own_next, own), (other_next, other))
        )
        total.append((found - goal).square().flatten(1).sum(1).mean())
    return torch.stack(total).sum()


class SingularVectorRelations(ConsecutiveTerm):
    """:func:`singular_vector_relations` of the tapped maps; null is all stages.

    ``k``: how many singular vectors. ``adapter``: see :func:`~kd.losses.adapters.pointwise`; without one the widths
    must be equal.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = None,
        teacher_taps: Sequence[str | int] | None = None,
        k: int = 1,
        adapter: str = "auto",
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        if k < 1:
            raise ValueError(f"k = {k} is not allowed: it must be 1 or more")
        self.k, self.adapter = k, check_choice("adapter", adapter, POINTWISE)

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps on the teacher's grid, the student's of the teacher's width."""
        adapter = pointwise(self.method, self.adapter, student, teacher)
        _, width, *grid = teacher.as_map().shape
        if self.k > min(width, grid[0] * grid[1]):
            raise ValueError(
                f"k = {self.k} is not allowed: {self.method} finds as many singular vectors in {teacher} as it has "
                f"channels or positions, so it must be at most {min(width, grid[0] * grid[1])}"
            )
        return adapter

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the pairs of layers."""
        pairs = self.compared(student, teacher)
        with full_precision(pairs[0][0]):
            return singular_vector_relations([s for s, _ in pairs], [t for _, t in pairs], self.k)
