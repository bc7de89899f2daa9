"""Lightly v1: Lightly AG, LightlyTrain, distillation v1, software 2025, no paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import as_vectors, width_of
from kd.losses.base import Batch, Output, at_least_float32, check_same_shape
from kd.losses.feature_term import full_precision
from kd.losses.layouts import Tapped
from kd.losses.relations._queue import QueueTerm

__all__ = ["queue_similarity"]


def queue_similarity(
    student_feature: Tensor, teacher_feature: Tensor, queue: Tensor, temperature: float = 0.07
) -> Tensor:
    """Compute KL(teacher ‖ student) of softmax over similarities to a queue of teacher features, mean over samples.

    Both (B, D) and ``queue`` (Q, D) of unit rows; the queue has the batch in it. A row of zeros, of a queue that is not
    yet full, has similarity 0. Without T².
    """
    check_same_shape("features", student_feature, teacher_feature)
    both = (at_least_float32(f) @ queue.T for f in (student_feature, teacher_feature))
    log_s, log_t = ((similarity / temperature).log_softmax(1) for similarity in both)
    return (log_t.exp() * (log_t - log_s)).sum(1).mean()


class QueueSimilarity(QueueTerm):
    """:func:`queue_similarity` of pooled features, the student's through a linear layer, summed over the taps.

    Needs no labels and no classifiers: made for pretraining from a foundation model. ``queue``: how many features of
    past batches are kept.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-1,),
        teacher_taps: Sequence[str | int] | None = (-1,),
        queue: int = 8192,
        temperature: float = 0.07,
    ) -> None:
        super().__init__(student_taps, teacher_taps, queue, temperature)

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make pooled vectors, the student's of the teacher's width."""
        own, other = as_vectors(self.method, student, teacher)
        return nn.Sequential(own, nn.Linear(width_of(student), width_of(teacher))), other

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the taps."""
        values = []
        for queue, (own, other) in zip(self.queues, self.compared(student, teacher), strict=True):
            with full_precision(own):
                own, other = F.normalize(own, dim=1), F.normalize(other, dim=1)
                values.append(queue_similarity(own, other, queue(other), self.temperature))
        return torch.stack(values).sum()
