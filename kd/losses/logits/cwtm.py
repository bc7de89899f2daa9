"""CWTM, confidence weighted by teacher max: Furlanello et al., Born-Again Networks, ICML 2018, arXiv 1805.04770."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import UNLABELLED, Batch, Output, Term, at_least_float32, check_same_shape, check_temperature

__all__ = ["confidence_weighted_cross_entropy"]


def confidence_weighted_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    """Compute Σ_s w_s CE_s / Σ_s w_s over the labelled rows, with w_s = max_c softmax(z_t / T)_c: Eq. 10.

    Both logits (rows, classes), ``targets`` (rows,) int64 with ``UNLABELLED`` where the label is withheld,
    ``temperature`` > 0. CE is the plain cross-entropy with the label: of the teacher only its confidence counts, also
    where it is wrong. Equal to the mean cross-entropy where the teacher is equally sure of every row; 0, with zero
    gradient, when no row is labelled. The weights are shares of the batch, so how rows are batched matters.
    """
    check_same_shape("logits", student_logits, teacher_logits)
    confidence = (at_least_float32(teacher_logits) / check_temperature(temperature)).softmax(-1).amax(-1)
    confidence = confidence * (targets != UNLABELLED)
    losses = F.cross_entropy(at_least_float32(student_logits), targets, ignore_index=UNLABELLED, reduction="none")
    return (confidence * losses).sum() / confidence.sum().clamp(min=1e-12)


class ConfidenceWeighted(Term):
    """:func:`confidence_weighted_cross_entropy` with ``batch.targets``; the paper uses it alone, T = 1."""

    needs_labels = True
    over = "batch"  # the weights are shares of the whole batch

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = self.reads_softmax_at = check_temperature(temperature)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the weighted mean over the labelled rows."""
        return confidence_weighted_cross_entropy(student.logits, teacher.logits, batch.targets, self.temperature)
