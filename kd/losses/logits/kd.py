"""KD: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, NIPS Workshop 2014, arXiv 1503.02531."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch, Fused, Output, Term, at_least_float32, check_same_shape, check_temperature

__all__ = ["kl_divergence"]


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute T² · mean over rows of Σ_c p_t (log p_t − log p_s), with p = softmax(z / T) as in Eq. 1.

    Both logits (rows, classes), any further leading dimensions count as rows; ``temperature`` > 0. Computed in log
    space and in float32 or better, so half-precision logits 10⁴ apart give a finite value and gradient. 0 without rows.

    The paper minimises the cross-entropy −Σ p_t log p_s: the same gradient, a value larger by T²·H(p_t). It multiplies
    by T² (section 2) so that the gradient keeps its size when T changes. Public code that divides by rows × classes
    (DeiT) is smaller by the number of classes; torchdistill without ``alpha`` leaves out T².
    """
    check_same_shape("logits", student_logits, teacher_logits)
    temperature = check_temperature(temperature)
    log_p_student = F.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    log_p_teacher = F.log_softmax(at_least_float32(teacher_logits) / temperature, dim=-1)
    per_row = (log_p_teacher.exp() * (log_p_teacher - log_p_student)).sum(-1)
    return temperature**2 * per_row.sum() / max(1, per_row.numel())


class KnowledgeDistillation(Term):
    """:func:`kl_divergence` of the logits, over all rows, labelled or not."""

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = self.reads_softmax_at = check_temperature(temperature)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows, times T²."""
        return kl_divergence(student.logits, teacher.logits, self.temperature)

    def fused(self) -> Fused:
        """Return what computes the same from hidden states."""
        return Fused("forward_kl", self.temperature)
