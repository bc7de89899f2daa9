"""Queues of the teacher's features of past batches, and the terms that keep one for each tap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd.losses.adapters import width_of
from kd.losses.base import Setup, check_temperature
from kd.losses.feature_term import FeatureTerm
from kd.losses.layouts import Tapped


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
        """Return the queue (size, D) with these features (B, D), of unit length, in front; kept so in training."""
        whole = torch.cat([feature.to(self.rows), self.rows])[: len(self.rows)]
        if self.training:
            self.rows = whole
        return whole


class QueueTerm(FeatureTerm):
    """Features beside a queue of the teacher's for each pair of taps. ``queue``: how many features are kept."""

    over = "batch"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None,
        teacher_taps: Sequence[str | int] | None,
        queue: int,
        temperature: float,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        if queue < 1:
            raise ValueError(f"queue = {queue} is not allowed: it must be 1 or more")
        self.queue, self.temperature = queue, check_temperature(temperature)
        self.queues = nn.ModuleList()

    def width(self, teacher: Tapped) -> int:
        """Count the numbers that a feature in the queue has."""
        return width_of(teacher)

    def prepare(self, setup: Setup) -> None:
        """Build the projectors and the queues. ``ValueError`` where a queue is larger than the training set."""
        super().prepare(setup)
        _check_size(self.method, self.queue, setup)
        features = self.pairs(setup.student, setup.teacher)
        made = (Queue(self.queue, self.width(teacher)) for _, teacher in self.tapped(setup))
        self.queues = nn.ModuleList(queue.to(s) for queue, (s, _) in zip(made, features, strict=True))


def _check_size(method: str, size: int, setup: Setup) -> None:
    """Refuse a queue larger than the training set, with ``ValueError``."""
    if setup.train_index is not None and size > len(setup.train_index):
        raise ValueError(
            f"queue = {size} is not allowed: {method} would keep more samples than the training set has, so it must "
            f"be at most {len(setup.train_index)}"
        )
