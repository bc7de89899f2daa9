"""ULD: Boizard et al., Towards Cross-Tokenizer Distillation, TMLR 2025, arXiv 2402.12030."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.losses.base import Batch, Output, Setup, Term, at_least_float32
from kd.losses.tokens._spans import check_lengths, lengths_of, mean_over_samples, sorted_l1

__all__ = ["uld_loss"]


def uld_loss(
    student_logits: Tensor, student_lengths: Tensor, teacher_logits: Tensor, teacher_lengths: Tensor
) -> Tensor:
    """Compute the mean over samples and places of Σ_v |p_s↓ − p_t↓|, each side's probabilities in falling order: Eq. 4.

    ``student_logits`` (student's rows, its vocabulary), ``teacher_logits`` (teacher's rows, its vocabulary): the rows
    that predict the tokens of the answers, sample after sample; ``student_lengths``, ``teacher_lengths`` (samples,)
    int64: how many of each sample. The n-th row of one side is compared with the n-th of the other, as far as both
    reach; the smaller vocabulary is filled up with zeros. From 0 to 2. It is the Wasserstein distance of the two with
    a uniform cost, which needs no map between the vocabularies. Samples without a row count nowhere. T = 1.

    The paper sums over the places; the authors' code takes the mean over them and multiplies by 1.5. TRL's default
    takes the logits at the places of the answer's tokens, which predict the next one: a row too late.
    """
    check_lengths("student", student_logits, student_lengths)
    check_lengths("teacher", teacher_logits, teacher_lengths)
    both = torch.minimum(student_lengths, teacher_lengths)
    samples = torch.arange(len(both), device=both.device).repeat_interleave(both)
    place = torch.arange(len(samples), device=both.device) - (both.cumsum(0) - both)[samples]
    student_rows, teacher_rows = (
        (lengths.cumsum(0) - lengths)[samples] + place for lengths in (student_lengths, teacher_lengths)
    )
    student = at_least_float32(student_logits[student_rows]).softmax(-1)
    teacher = at_least_float32(teacher_logits[teacher_rows]).softmax(-1)
    return mean_over_samples(sorted_l1(student, teacher), samples, len(both))


class UniversalLogit(Term):
    """:func:`uld_loss` of the logits, for a student and a teacher with two tokenizers.

    ``batch.extra["student_lengths"]``, ``batch.extra["teacher_lengths"]`` (samples,) int64: how many rows of each side
    belong to each sample. A batch without them is of one tokenizer: row is compared with row, and the mean is over the
    rows.
    """

    two_tokenizers = True
    reads_softmax_at = 1.0
    over = "samples"

    def __init__(self) -> None:
        super().__init__()

    def prepare(self, setup: Setup) -> None:
        """Find out what the mean is over."""
        self.over = "samples" if "student_lengths" in setup.batch.extra else "rows"

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over samples and places."""
        s, t = student.logits, teacher.logits
        student_lengths, teacher_lengths = lengths_of(batch, len(s), len(t), s.device)
        return uld_loss(s, student_lengths, t, teacher_lengths)
