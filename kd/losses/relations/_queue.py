"""A queue of the teacher's features of past batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd.losses.base import Setup


class Queue(nn.Module):
    """The last ``size`` features of the teacher, of unit length, the newest first; zeros until it is full.

    Terms that keep one are over the ``batch``: all processes then keep the same.
    """

    rows: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, width))

    @torch.no_grad()
    def forward(self, feature: Tensor) -> Tensor:
        """The queue (size, D) with these features (B, D), of unit length, in front; it is kept so in training."""
        whole = torch.cat([feature.to(self.rows), self.rows])[: len(self.rows)]
        if self.training:
            self.rows = whole
        return whole


def check_queue(method: str, size: int, setup: Setup) -> int:
    """The size, or ``ValueError`` where the training set is smaller."""
    if setup.train_index is not None and size > len(setup.train_index):
        samples = len(setup.train_index)
        raise ValueError(
            f"queue = {size} is not allowed: {method} would keep more samples than the training set has, so it must "
            f"be at most {samples}"
        )
    return size
