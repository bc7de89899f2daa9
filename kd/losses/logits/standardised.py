"""LSKD: Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024, arXiv 2403.01427."""

from __future__ import annotations

from torch import Tensor

from kd.losses.base import at_least_float32
from kd.losses.logits._divergences import spread

__all__ = ["standardised_logits"]

EPSILON = 1e-7  # added to the standard deviation, as in the authors' code


def standardised_logits(logits: Tensor) -> Tensor:
    """Make z-scores (z − mean) / (σ + 1e-7) of each row over classes: the student need not match the teacher's scale.

    ``logits`` (…, classes), of student and teacher alike before any logit loss: ``loss.NAME.standardise=true``. The
    gradient goes through mean and σ. A row whose entries are all equal becomes 0, with a gradient as without the
    division. The temperature of the loss is the base temperature, and its T² that of the base temperature alone.

    σ is unbiased (classes − 1), as in the authors' code; the paper's is not. Their weight is 9 beside cross-entropy
    0.1 where that of plain KD is 0.9: compare both at one weight.
    """
    z = at_least_float32(logits)
    return (z - z.mean(-1, keepdim=True)) / (spread(z) + EPSILON)
