"""Logistic ranking of the teacher's top-k: Arcee AI, DistillKit, open-source toolkit 2024, no paper."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch, Output, Term, at_least_float32
from kd.losses.tokens._pairs import differences, mean_over_pairs
from kd.losses.tokens._topk import check_k, teacher_topk

__all__ = ["logistic_ranking"]


def logistic_ranking(student_logits: Tensor, teacher_log_probs: Tensor, teacher_ids: Tensor) -> Tensor:
    """Compute log(1 + exp(−(z_a − z_b))), mean over rows and pairs with p_a > p_b: the teacher's order of its top-k.

    ``student_logits`` z (rows, classes); ``teacher_log_probs`` (rows, k): log p of the classes ``teacher_ids``
    (rows, k) int64. RankNet's loss with the teacher's order: it never is 0, and nothing of the teacher's distances is
    learned. T = 1. 0 without rows, and where a row has no pair.

    The code has no paper. It takes the mean over the pairs of the whole batch, and leaves out pairs that are closer
    than 1e-8; here it is the mean over the rows of the mean over the pairs of a row: equal where no pair is left out.
    """
    z = at_least_float32(student_logits).gather(-1, teacher_ids)
    return mean_over_pairs(F.softplus(-differences(z)), teacher_log_probs)


class LogisticRanking(Term):
    """:func:`logistic_ranking` with the teacher's stored top-k (``Output.topk``), else with that of its logits."""

    reads_topk = True

    def __init__(self, k: int = 32) -> None:
        super().__init__()
        self.k = check_k(k)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows."""
        return logistic_ranking(student.logits, *teacher_topk(teacher, self.k, 1.0))
