"""Squared error of the outputs: Ba and Caruana, Do Deep Nets Really Need to be Deep?, NeurIPS 2014, arXiv 1312.6184."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import UNLABELLED, Batch, Output, Term, at_least_float32, check_choice, check_same_shape

__all__ = ["squared_error"]

AGAINST = ("labels", "teacher")


def squared_error(student_logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean over rows and outputs of (z_s − y)²: the loss of a regression.

    ``student_logits`` (rows, outputs); ``targets`` y: numbers (rows,) for one output, or (rows, outputs): labels, or
    what the teacher answers; or classes (rows,) int64, then y is 1 for the class and 0 for the others, and rows with
    ``UNLABELLED`` are left out. 0 without rows. ``ValueError`` when the shapes do not fit.

    The paper sums over the outputs and takes half of it. Known settings: fine-tuning and distillation on STS-B
    (TinyBERT, torchdistill), numbers from 0 to 5, weight 1.
    """
    student = at_least_float32(student_logits)
    if not targets.is_floating_point():
        kept = targets != UNLABELLED
        student, targets = student[kept], F.one_hot(targets[kept], student.shape[-1])
    elif targets.ndim == 1:
        targets = targets.unsqueeze(-1)
    check_same_shape("outputs and targets", student, targets)
    return F.mse_loss(student, targets.to(student.dtype), reduction="sum") / max(1, student.numel())


class SquaredError(Term):
    """:func:`squared_error` of the student's outputs ``against`` the labels, or against the teacher's outputs."""

    regression = True

    def __init__(self, against: str = "labels") -> None:
        super().__init__()
        self.against = check_choice("against", against, AGAINST)
        self.needs_labels = self.every_class = against == "labels"
        self.needs_teacher = self.needs_teacher_logits = against == "teacher"
        self.over = "labelled" if against == "labels" else "rows"

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows, of labels over the labelled ones."""
        return squared_error(student.logits, batch.targets if self.against == "labels" else teacher.logits)
