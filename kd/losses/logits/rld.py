"""RLD: Sun et al., Knowledge Distillation with Refined Logits, ICCV 2025, arXiv 2408.07703."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.losses.base import Batch, Output, Term, at_least_float32, check_same_shape, check_temperature
from kd.losses.logits._divergences import check_factor, kl
from kd.losses.logits._target import labels_of, mean_over_labelled, split_at

__all__ = ["refined_kl_divergence"]


def refined_kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    alpha_temperature: float = 1.0,
) -> Tensor:
    """Compute α T_α² KL(b_t ‖ b_s) + β T² KL(m_t ‖ m_s), mean over labelled rows: the teacher's wrong parts left out.

    b_t = (p_t(c), 1 − p_t(c)) of the teacher's likeliest class c and b_s = (p_s(y), 1 − p_s(y)) of the label y, at
    T_α: its confidence without its decision. m is softmax(z / T) among the classes to which the teacher gives less
    than to the label; 0 where there are none.

    Both logits (rows, classes), ``targets`` (rows,) int64, ``UNLABELLED`` where the label is withheld: such rows do not
    count. Temperatures > 0; ``alpha``, ``beta`` 0 or more. 0 without labelled rows, and for equal logits that are
    right. ``ValueError`` for targets that are shares of classes.

    T_α is 1 in the authors' code, and equal to T where logits are standardised.
    """
    check_same_shape("logits", student_logits, teacher_logits)
    check_temperature(alpha_temperature)
    labels, labelled = labels_of(targets)
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits)
    b_s, b_t = (split_at(z / alpha_temperature, at)[0] for z, at in ((student, labels), (teacher, teacher.argmax(-1))))
    below = teacher < teacher.gather(-1, labels.unsqueeze(-1))
    m_s, m_t = (_log_softmax_among(z / check_temperature(temperature), below) for z in (student, teacher))
    per_row = alpha * alpha_temperature**2 * kl(b_t, b_s) + beta * temperature**2 * kl(m_t, m_s)
    return mean_over_labelled(per_row, labelled)


def _log_softmax_among(scaled_logits: Tensor, kept: Tensor) -> Tensor:
    """Return log-probabilities of the kept classes among themselves; 0, which adds nothing to a KL, for the others."""
    # not −∞: a row may keep no class
    among = scaled_logits.masked_fill(~kept, torch.finfo(scaled_logits.dtype).min)
    return (among - among.logsumexp(-1, keepdim=True)).masked_fill(~kept, 0.0)


class RefinedLogits(Term):
    """:func:`refined_kl_divergence` with ``batch.targets``."""

    needs_labels = True
    over = "labelled"

    def __init__(
        self, temperature: float = 4.0, alpha: float = 1.0, beta: float = 8.0, alpha_temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.temperature, self.alpha_temperature = map(check_temperature, (temperature, alpha_temperature))
        # both temperatures are the teacher's: the one that is not 1, if any
        self.reads_softmax_at = self.temperature if self.alpha_temperature == 1 else self.alpha_temperature
        self.alpha, self.beta = check_factor("alpha", alpha), check_factor("beta", beta)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the labelled rows."""
        settings = self.temperature, self.alpha, self.beta, self.alpha_temperature
        return refined_kl_divergence(student.logits, teacher.logits, batch.targets, *settings)
