"""Hinge ranking of the teacher's top-k: Arcee AI, DistillKit, open-source toolkit 2024, no paper."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch, Output, Term, at_least_float32
from kd.losses.tokens._pairs import differences, mean_over_pairs
from kd.losses.tokens._topk import check_k, teacher_topk

__all__ = ["hinge_ranking"]


def hinge_ranking(
    student_logits: Tensor, teacher_log_probs: Tensor, teacher_ids: Tensor, margin: float | None = None
) -> Tensor:
    """Compute max(0, margin − (q_a − q_b)), mean over rows and pairs with p_a > p_b: the teacher's order of its top-k.

    ``student_logits`` (rows, classes), q = softmax(z_s) over all of them; ``teacher_log_probs`` (rows, k): log p of the
    classes ``teacher_ids`` (rows, k) int64. ``margin``: None for p_a − p_b, then 0 for equal distributions; else a
    number, 0 or more. T = 1. 0 without rows, and where a row has no pair.

    The code has no paper. It takes the mean over the pairs of the whole batch, and leaves out pairs that are closer
    than 1e-8; here it is the mean over the rows of the mean over the pairs of a row: equal where no pair is left out.
    """
    _check_margin(margin)
    q = F.log_softmax(at_least_float32(student_logits), dim=-1).gather(-1, teacher_ids).exp()
    wanted = differences(at_least_float32(teacher_log_probs).exp()) if margin is None else margin
    return mean_over_pairs(F.relu(wanted - differences(q)), teacher_log_probs)


class HingeRanking(Term):
    """:func:`hinge_ranking` with the teacher's stored top-k (``Output.topk``), else with that of its logits."""

    reads_topk = True

    def __init__(self, k: int = 32, margin: float | None = None) -> None:
        super().__init__()
        self.k = check_k(k)
        self.margin = _check_margin(margin)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows."""
        return hinge_ranking(student.logits, *teacher_topk(teacher, self.k, 1.0), margin=self.margin)


def _check_margin(margin: float | None) -> float | None:
    if margin is not None and not 0 <= margin < float("inf"):
        raise ValueError(f"margin = {margin} is not allowed: it must be null or a finite number, 0 or more")
    return margin
