"""Hard distillation: Touvron et al., Training Data-Efficient Image Transformers, ICML 2021, arXiv 2012.12877."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch, Output, Term, at_least_float32, check_same_shape
from kd.losses.logits._divergences import mean_over_rows

__all__ = ["hard_label_cross_entropy"]


def hard_label_cross_entropy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Compute −log softmax(z_s)_c, mean over rows, c = argmax z_t: the teacher's decision in place of a label, Eq. 3.

    Both logits (rows, classes), any further leading dimensions count as rows; of classes with equal logits the first
    one is the teacher's. Not 0 for equal logits. 0 without rows.
    """
    check_same_shape("logits", student_logits, teacher_logits)
    log_p_student = F.log_softmax(at_least_float32(student_logits), dim=-1)
    return mean_over_rows(-log_p_student.gather(-1, teacher_logits.argmax(-1, keepdim=True)).squeeze(-1))


class HardLabel(Term):
    """:func:`hard_label_cross_entropy` of the logits, over all rows, labelled or not.

    A student with a distillation token (timm's ``deit_*_distilled_*``) learns the labels with the head of its class
    token, and this with that of its distillation token: see :attr:`kd.losses.base.Output.distilled`.
    """

    reads_softmax_at = 1.0

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows."""
        return hard_label_cross_entropy(student.logits, teacher.logits)
