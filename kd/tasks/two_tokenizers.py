"""Rows of student and teacher with a tokenizer each: which belong to one sample, and where their tokens end."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch


def side_by_side(student: Batch, teacher: Batch, shift: bool) -> dict[str, Any]:
    """Return what terms read of two batches whose rows are selected, see :class:`kd.losses.tokens.gold.Gold`.

    ``student_lengths``, ``teacher_lengths`` (samples,): rows of each sample; ``student_ids`` … (rows,): the token that
    a row predicts; ``student_ends`` … (rows,): where it ends; all int64. ``student_matched`` … (m,): ids of the tokens
    that both vocabularies have. ``shift``: whether a position predicts the next token.
    """
    found: dict[str, Any] = {}
    for side, batch in {"student": student, "teacher": teacher}.items():
        positions, ids = batch.extra["positions"], batch.inputs["input_ids"]
        samples, width = ids.shape
        found[f"{side}_lengths"] = torch.bincount(positions // width, minlength=samples)
        found[f"{side}_ids"] = batch.targets
        if (ends := batch.extra.get("ends")) is not None:
            found[f"{side}_ends"] = _of_rows(ends, positions, shift)
    if (matched := student.extra.get("matched")) is not None:
        found["student_matched"], found["teacher_matched"] = matched[0]
    return found


def _of_rows(values: Tensor, positions: Tensor, shift: bool) -> Tensor:
    """Select from values (samples, positions) of tokens those of the tokens that rows predict."""
    return (F.pad(values[:, 1:], (0, 1)) if shift else values).flatten()[positions]
