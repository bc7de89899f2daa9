"""Rows of two tokenizers: which of them belong to one sample, to one place, to the same bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch


def lengths_of(batch: Batch, student_rows: int, teacher_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Read ``batch.extra["student_lengths"]`` and ``["teacher_lengths"]`` (samples,): how many rows each sample has.

    Without these entries both sides must have equally many rows, and each is a sample of its own. ``ValueError`` when
    the entries, or the rows, do not agree.
    """
    found = [batch.extra.get(f"{side}_lengths") for side in ("student", "teacher")]
    if found[0] is None and found[1] is None and student_rows == teacher_rows:
        return (torch.ones(student_rows, dtype=torch.int64, device=device),) * 2
    if found[0] is None or found[1] is None:
        raise ValueError(
            f"the student has {student_rows} rows and the teacher {teacher_rows}: with two tokenizers the batch must "
            "say which belong together, extra['student_lengths'] and extra['teacher_lengths'] (samples,)"
        )
    return found[0].to(device), found[1].to(device)


def check_lengths(side: str, logits: Tensor, lengths: Tensor) -> None:
    """Refuse lengths of a side that do not add up to its rows, with ``ValueError``."""
    if int(lengths.sum()) != len(logits):
        raise ValueError(f"{side}_lengths add up to {int(lengths.sum())}, but the {side} has {len(logits)} rows")


def sorted_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute Σ |p_s − p_t| of each row, both in falling order; the smaller vocabulary is filled up with zeros."""
    size = max(student.shape[-1], teacher.shape[-1])
    one, other = (F.pad(p, (0, size - p.shape[-1])).sort(dim=-1, descending=True).values for p in (student, teacher))
    return (one - other).abs().sum(-1)


def mean_over_samples(values: Tensor, samples: Tensor, count: int) -> Tensor:
    """Compute the mean over samples of the mean of their ``values`` (n,); ``samples`` (n,): to which each belongs.

    Samples without a value count nowhere; 0 without any.
    """
    sums = values.new_zeros(count).index_add(0, samples, values)
    counts = torch.bincount(samples, minlength=count)
    return (sums / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)
