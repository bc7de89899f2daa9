"""Cross-entropy with the labels: the supervised term beside every distillation term."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import UNLABELLED, Batch, Fused, Output, Term, at_least_float32

__all__ = ["cross_entropy"]


def cross_entropy(student_logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute the mean of −Σ_c q log softmax(z_s) over the labelled rows; q is the label, smoothed towards uniform.

    ``student_logits`` (rows, classes), ``targets`` (rows,) int64 with ``UNLABELLED`` where the label is withheld, or
    (rows, classes) shares that sum to 1 (mixtures, soft labels); ``label_smoothing`` from 0 to 1. Exactly 0, with zero
    gradient, when no row is labelled.
    """
    if targets.is_floating_point():
        logits = at_least_float32(student_logits)
        return F.cross_entropy(logits, targets.to(logits.dtype), label_smoothing=label_smoothing)
    total = F.cross_entropy(
        at_least_float32(student_logits),
        targets,
        ignore_index=UNLABELLED,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return total / (targets != UNLABELLED).sum().clamp(min=1)


class CrossEntropy(Term):
    """:func:`cross_entropy` of the student with ``batch.targets``."""

    needs_teacher = False
    needs_teacher_logits = False
    needs_labels = True
    over = "labelled"

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing = {label_smoothing} is not allowed: it must be from 0 to 1")
        self.label_smoothing = label_smoothing
        self.every_class = label_smoothing > 0

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the labelled rows."""
        return cross_entropy(student.logits, batch.targets, self.label_smoothing)

    def fused(self) -> Fused:
        """Return what computes the same from hidden states."""
        return Fused("cross_entropy", share=self.label_smoothing)
