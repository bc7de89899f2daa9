"""RKD: Park, Kim, Lu, Cho, Relational Knowledge Distillation, CVPR 2019, arXiv 1904.05068."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import as_vectors
from kd.losses.base import at_least_float32
from kd.losses.feature_term import FeatureTerm
from kd.losses.layouts import Tapped

__all__ = ["angles", "relational_loss", "relative_distances"]

FLOOR = 1e-12  # of a squared distance: the root has no gradient at 0


def relative_distances(feature: Tensor) -> Tensor:
    """Map (B, D) → (B, B): Euclidean distances divided by the mean of those above 0 (Eq. 5, 6); 0 on the diagonal."""
    found = _distances(at_least_float32(feature))
    above = found > 0
    return found / (found.sum() / above.sum().clamp(min=1)).clamp(min=math.sqrt(FLOOR))


def angles(feature: Tensor) -> Tensor:
    """Map (B, D) → (B, B, B): at [i, j, k] the cosine of the angle at i between j and k (Eq. 8); 0 if two are equal."""
    feature = at_least_float32(feature)
    edges = feature.unsqueeze(0) - feature.unsqueeze(1)
    lengths = torch.linalg.vector_norm(edges, dim=2, keepdim=True)
    edges = edges / lengths.masked_fill(lengths == 0, math.inf)  # of equal samples a direction without a gradient
    return edges @ edges.transpose(1, 2)


def relational_loss(
    student_feature: Tensor, teacher_feature: Tensor, w_dist: float = 25.0, w_angle: float = 50.0
) -> Tensor:
    """Compute ``w_dist`` · Huber(distances) + ``w_angle`` · Huber(angles), means over a batch's pairs and triples.

    Both (B, D), the widths may differ (Eq. 7 and 9), :func:`relative_distances` and :func:`angles`. The features are
    not L2-normalised. In the code, which the CIFAR-100 tables are of, the means include a sample beside itself; the
    paper sums over tuples of different ones.
    """
    student, teacher = student_feature, teacher_feature
    loss = at_least_float32(student).new_zeros(())
    if w_dist:
        loss = loss + w_dist * F.smooth_l1_loss(relative_distances(student), relative_distances(teacher))
    if w_angle:
        loss = loss + w_angle * F.smooth_l1_loss(angles(student), angles(teacher))
    return loss


def _distances(feature: Tensor) -> Tensor:
    squares = feature.square().sum(1)
    found = (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * feature @ feature.T).clamp(min=FLOOR).sqrt()
    return found * (1 - torch.eye(len(feature), dtype=found.dtype, device=found.device))


class Relational(FeatureTerm):
    """:func:`relational_loss` of pooled features, summed over the taps."""

    over = "batch"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = ("before_classifier",),
        teacher_taps: Sequence[str | int] | None = ("before_classifier",),
        w_dist: float = 25.0,
        w_angle: float = 50.0,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        for name, value in (("w_dist", w_dist), ("w_angle", w_angle)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} = {value} is not allowed: it must be a finite number, 0 or more")
        self.w_dist, self.w_angle = w_dist, w_angle

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make pooled vectors."""
        return as_vectors(self.method, student, teacher)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of one pair."""
        return relational_loss(student, teacher, self.w_dist, self.w_angle)
