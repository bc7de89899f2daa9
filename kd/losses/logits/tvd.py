"""TVD: Wen et al., f-Divergence Minimization for Sequence-Level Knowledge Distillation, ACL 2023, arXiv 2307.15190."""

from __future__ import annotations

from torch import Tensor

from kd.losses.base import Batch, Output, Term, check_temperature
from kd.losses.logits._divergences import log_probabilities, mean_over_rows

__all__ = ["total_variation"]


def total_variation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute T² · mean over rows of ½ Σ_c |p_s − p_t|, with p = softmax(z / T): from 0 to T².

    Both logits (rows, classes); ``temperature`` > 0. Symmetric and bounded: a row that the student has quite wrong has
    a small gradient. 0 without rows.

    The paper and DistiLLM's code have T = 1; DistillKit's code multiplies by T² as here, which keeps the gradients'
    size for a KL and makes those of this distance grow with T.
    """
    log_p_student, log_p_teacher = log_probabilities(student_logits, teacher_logits, temperature)
    return mean_over_rows((log_p_student.exp() - log_p_teacher.exp()).abs().sum(-1) / 2, temperature)


class TotalVariation(Term):
    """:func:`total_variation` of the softened outputs, over all rows."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = self.reads_softmax_at = check_temperature(temperature)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows, times T²."""
        return total_variation(student.logits, teacher.logits, self.temperature)
