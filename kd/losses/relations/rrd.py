"""RRD: Giakoumoglou and Stathaki, Relational Representation Distillation, 2024, arXiv 2407.12073."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import as_vectors, width_of
from kd.losses.base import Batch, Output, at_least_float32, check_same_shape, check_temperature
from kd.losses.feature_term import full_precision
from kd.losses.layouts import Tapped
from kd.losses.relations._queue import QueueTerm

__all__ = ["relational_representation"]


def relational_representation(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    queue: Tensor,
    temperature_student: float = 0.1,
    temperature_teacher: float = 0.02,
) -> Tensor:
    """Compute the cross-entropy of softmax over similarities to a queue of the teacher's embeddings, mean over samples.

    Both (B, D) and ``queue`` (Q, D) of unit rows; the queue has the batch in it. A row of zeros, of a queue that is not
    yet full, has similarity 0. Each side has its own temperature; not 0 for equal embeddings. Without T².
    """
    check_same_shape("embeddings", student_embedding, teacher_embedding)
    student, teacher = (at_least_float32(e) @ queue.T for e in (student_embedding, teacher_embedding))
    log_p_student = (student / check_temperature(temperature_student)).log_softmax(1)
    p_teacher = (teacher / check_temperature(temperature_teacher)).softmax(1)
    return -(p_teacher * log_p_student).sum(1).mean()


class RelationalRepresentation(QueueTerm):
    """:func:`relational_representation` of pooled features, linearly embedded, summed over the taps.

    ``embedding``: width of the two embeddings; ``queue``: how many of the teacher's are kept. The teacher's embedding
    stays as it is drawn: in the authors' code, too, it gets no gradient. Their queue begins with random rows that are
    normalised over the queue, here with zeros.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = ("before_classifier",),
        teacher_taps: Sequence[str | int] | None = ("before_classifier",),
        embedding: int = 128,
        queue: int = 16384,
        temperature_student: float = 0.1,
        temperature_teacher: float = 0.02,
    ) -> None:
        super().__init__(student_taps, teacher_taps, queue, temperature_student)
        if embedding < 1:
            raise ValueError(f"embedding = {embedding} is not allowed: it must be 1 or more")
        self.embedding, self.temperature_teacher = embedding, check_temperature(temperature_teacher)

    def width(self, teacher: Tapped) -> int:
        """Return the width of the embeddings."""
        return self.embedding

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make pooled and embedded vectors, the teacher's by a layer that is not trained."""
        pooled = as_vectors(self.method, student, teacher)
        own, other = (nn.Linear(width_of(tap), self.embedding) for tap in (student, teacher))
        return nn.Sequential(pooled[0], own), nn.Sequential(pooled[1], other.requires_grad_(False))

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the taps."""
        values = []
        for queue, (own, other) in zip(self.queues, self.compared(student, teacher), strict=True):
            with full_precision(own):
                unit = F.normalize(own, dim=1), F.normalize(other, dim=1)
                temperatures = self.temperature, self.temperature_teacher
                values.append(relational_representation(*unit, queue(unit[1]), *temperatures))
        return torch.stack(values).sum()
