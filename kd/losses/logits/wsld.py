"""WSLD: Zhou et al., Rethinking Soft Labels for KD: A Bias-Variance Tradeoff, ICLR 2021, arXiv 2102.00650."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch, Output, Term, at_least_float32, check_same_shape, check_temperature
from kd.losses.logits._divergences import log_probabilities
from kd.losses.logits._target import labels_of, mean_over_labelled

__all__ = ["weighted_soft_cross_entropy"]


def weighted_soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float = 4.0
) -> Tensor:
    """Compute T² · mean over labelled rows of w · (−Σ_c p_t log p_s), p = softmax(z / T), w = 1 − exp(−ℓ_s / ℓ_t).

    ℓ_s and ℓ_t are the cross-entropies of student and teacher with the label at T = 1: a row that the student knows
    better than its teacher, where soft labels only regularise, counts less. No gradient goes through w.

    Both logits (rows, classes), ``targets`` (rows,) int64, ``UNLABELLED`` where the label is withheld: such rows do not
    count. ``temperature`` > 0. A cross-entropy: not 0 for equal logits. 0 without labelled rows. ``ValueError`` for
    targets that are shares of classes.

    The paper's factor α, 2.25 or 2.5, is the weight of the term; MMRazor's code leaves it out.
    """
    check_same_shape("logits", student_logits, teacher_logits)
    labels, labelled = labels_of(targets)
    with torch.no_grad():
        of_student, of_teacher = (
            -F.log_softmax(at_least_float32(z), dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            for z in (student_logits, teacher_logits)
        )
        ratio = of_student / of_teacher.clamp(min=torch.finfo(of_teacher.dtype).tiny)  # a sure teacher's may be 0
        weights = -torch.expm1(-ratio)
    log_p_student, log_p_teacher = log_probabilities(student_logits, teacher_logits, temperature)
    per_row = -(log_p_teacher.exp() * log_p_student).sum(-1)
    return temperature**2 * mean_over_labelled(weights * per_row, labelled)


class WeightedSoftLabels(Term):
    """:func:`weighted_soft_cross_entropy` with ``batch.targets``."""

    needs_labels = True
    over = "labelled"

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = self.reads_softmax_at = check_temperature(temperature)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the labelled rows, times T²."""
        return weighted_soft_cross_entropy(student.logits, teacher.logits, batch.targets, self.temperature)
