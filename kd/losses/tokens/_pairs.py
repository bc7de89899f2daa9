"""Pairs of the teacher's likeliest classes, and the mean over the pairs of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.losses.base import at_least_float32

CLOSER = 1e-8  # probabilities that differ by less have no order


def differences(values: Tensor) -> Tensor:
    """Map (rows, k) → (rows, k, k): value a − value b at [row, a, b]."""
    return values[..., :, None] - values[..., None, :]


def mean_over_pairs(losses: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Average ``losses`` (rows, k, k) over the pairs that the teacher puts in order, then over rows; 0 without.

    A pair (a, b) counts where p_a > p_b + 1e-8.
    """
    ordered = differences(at_least_float32(teacher_log_probs).exp()) > CLOSER
    kept = torch.where(ordered, losses, 0.0).sum((-2, -1))  # not a product: 0 · ∞ of a pair that does not count is no 0
    per_row = kept / ordered.sum((-2, -1)).clamp(min=1)
    return per_row.sum() / max(1, per_row.numel())
