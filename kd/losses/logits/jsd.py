"""GKD, generalised JSD: Agarwal et al., On-Policy Distillation of Language Models, ICLR 2024, arXiv 2306.13649."""

from __future__ import annotations

from torch import Tensor

from kd.losses.base import Batch, Fused, Output, Term, check_temperature
from kd.losses.logits._divergences import check_share, js, log_probabilities, mean_over_rows

__all__ = ["generalised_js_divergence"]


def generalised_js_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """Compute T² · mean over rows of β KL(p_t ‖ m) + (1 − β) KL(p_s ‖ m), with m = β p_t + (1 − β) p_s: Eq. 1.

    p = softmax(z / T). Both logits (rows, classes); ``temperature`` > 0; ``beta`` from 0 to 1. β = 0 is KL(teacher ‖
    student) and β = 1 KL(student ‖ teacher) by definition; the formula itself goes to 0 at both ends (its quotient by β
    or 1 − β goes to those two), so values near an end are small and the end is not. At most ln 2 at β = ½. 0 without
    rows.

    The paper's T is that of sampling and not in the loss, and the code of TRL and Liger has no T²: smaller by it.
    DistiLLM's ``lam`` is 1 − β.
    """
    check_share("beta", beta)
    log_p_student, log_p_teacher = log_probabilities(student_logits, teacher_logits, temperature)
    return mean_over_rows(js(log_p_student, log_p_teacher, beta), temperature)


class JensenShannon(Term):
    """:func:`generalised_js_divergence` of the logits, over all rows."""

    def __init__(self, temperature: float = 1.0, beta: float = 0.5) -> None:
        super().__init__()
        self.temperature = self.reads_softmax_at = check_temperature(temperature)
        self.beta = check_share("beta", beta)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows, times T²."""
        return generalised_js_divergence(student.logits, teacher.logits, self.temperature, self.beta)

    def fused(self) -> Fused:
        """Return what computes the same from hidden states."""
        return Fused("js", self.temperature, self.beta)
