"""MFT: Belcak et al., Minifinetuning: Low-Data Generation Domain Adaptation, arXiv preprint 2025, arXiv 2506.15702."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.losses.base import UNLABELLED, Batch, Output, Term, check_temperature
from kd.losses.logits._divergences import log_probabilities, mean_over_rows

__all__ = ["corrected_kl_divergence", "corrected_teacher"]


def corrected_teacher(teacher_probabilities: Tensor, targets: Tensor, threshold: float = 0.2) -> Tensor:
    """Mix a distribution with the label until the label leads by ``threshold`` τ.

    ``teacher_probabilities`` p (rows, classes), ``targets`` y (rows,) int64, all labelled; τ above 0, below 1. Where
    the likeliest class a is not y, the share f of the one-hot label is (p_a − p_y + τ) / (1 + p_a − p_y): afterwards y
    is τ above a. Where it is, p_y becomes min(p_y + τ, 1). The other classes keep their ratios. (rows, classes).
    """
    _check_threshold(threshold)
    of_label = teacher_probabilities.gather(-1, targets[:, None])
    highest, likeliest = teacher_probabilities.max(-1, keepdim=True)
    lead = highest - of_label
    wrong = (lead + threshold) / (1 + lead + 1e-7)
    right = ((of_label + threshold).clamp(max=1) - of_label) / (1 - of_label + 1e-7)
    share = torch.where(likeliest == targets[:, None], right, wrong)
    return (1 - share) * teacher_probabilities + share * torch.zeros_like(teacher_probabilities).scatter(
        -1, targets[:, None], 1.0
    )


def corrected_kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float = 1.0, threshold: float = 0.2
) -> Tensor:
    """Compute T² · mean over labelled rows of KL(p' ‖ p_s), p' = softmax(z_t / T) after :func:`corrected_teacher`.

    Both logits (rows, classes), ``targets`` (rows,) int64, ``UNLABELLED`` where the label is withheld: such rows do not
    count. ``temperature`` > 0. The teacher is the untrained student in the paper, which so learns the labels without
    a cross-entropy and forgets less. 0 without labelled rows.

    The code adds 1e-7 to both denominators, as here, which the paper does not have.
    """
    labelled = targets != UNLABELLED
    log_p_student, log_p_teacher = log_probabilities(student_logits[labelled], teacher_logits[labelled], temperature)
    goal = corrected_teacher(log_p_teacher.exp(), targets[labelled], threshold)
    return mean_over_rows((torch.xlogy(goal, goal) - goal * log_p_student).sum(-1), temperature)


class CorrectedTeacher(Term):
    """:func:`corrected_kl_divergence` with ``batch.targets``."""

    needs_labels = True
    over = "labelled"

    def __init__(self, temperature: float = 1.0, threshold: float = 0.2) -> None:
        super().__init__()
        self.temperature = self.reads_softmax_at = check_temperature(temperature)
        self.threshold = _check_threshold(threshold)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the labelled rows, times T²."""
        return corrected_kl_divergence(student.logits, teacher.logits, batch.targets, self.temperature, self.threshold)


def _check_threshold(threshold: float) -> float:
    if not 0 < threshold < 1:
        raise ValueError(f"threshold = {threshold} is not allowed: it must be above 0 and below 1")
    return float(threshold)
