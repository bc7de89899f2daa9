"""AKL, adaptive KL: Wu et al., Rethinking Kullback-Leibler Divergence in KD for LLMs, COLING 2025, arXiv 2404.02657."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.losses.base import Batch, Output, Term, check_temperature
from kd.losses.logits._divergences import check_share, kl, log_probabilities, mean_over_rows

__all__ = ["adaptive_kl_divergence"]


def adaptive_kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, mu: float = 0.5
) -> Tensor:
    """Compute T² · mean over rows of (g_h KL(p_t ‖ p_s) + g_t KL(p_s ‖ p_t)) / (g_h + g_t), with p = softmax(z / T).

    The head of a row is its likeliest classes, by the teacher, that have at most ``mu`` of the mass together, the first
    one in any case; the tail is the rest. g_h and g_t are Σ |p_t − p_s| over the head and over the tail, without
    gradient: forward KL where the student is wrong about the head, reverse KL where it is about the tail.

    Both logits (rows, classes); ``temperature`` > 0; ``mu`` from 0 to 1. 0 for equal logits and without rows.

    The authors' code is at T = 1 (the published file lacks the last lines, where the two parts are added up), and the
    paper's μ is 0.5.
    """
    check_share("mu", mu)
    log_p_student, log_p_teacher = log_probabilities(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        p_teacher, order = log_p_teacher.exp().sort(dim=-1, descending=True, stable=True)
        gaps = (p_teacher - log_p_student.exp().gather(-1, order)).abs()
        head = p_teacher.cumsum(-1) <= mu
        head[..., 0] = True
        of_head, of_all = (gaps * head).sum(-1), gaps.sum(-1)
        share = of_head / of_all.clamp(min=torch.finfo(gaps.dtype).tiny)
    forward, reverse = kl(log_p_teacher, log_p_student), kl(log_p_student, log_p_teacher)
    return mean_over_rows(share * forward + (1 - share) * reverse, temperature)


class AdaptiveKL(Term):
    """:func:`adaptive_kl_divergence` of the logits, over all rows."""

    def __init__(self, temperature: float = 1.0, mu: float = 0.5) -> None:
        super().__init__()
        self.temperature = self.reads_softmax_at = check_temperature(temperature)
        self.mu = check_share("mu", mu)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows, times T²."""
        return adaptive_kl_divergence(student.logits, teacher.logits, self.temperature, self.mu)
