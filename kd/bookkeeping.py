"""The training step's bookkeeping: scalars go into one device buffer and are read every so many steps.

Logging through ``self.log`` each step, or a metric's ``forward``, costs more than a small network's whole step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class StepBuffer:
    """Collects named scalars of each step on the device; one synchronisation a window.

    ``names``: the columns; ``length``: steps a window (at least 1).
    """

    def __init__(self, names: Sequence[str], length: int, device: torch.device) -> None:
        self.names = list(names)
        self.rows = torch.zeros(length, len(self.names), device=device)
        self.filled = 0
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device="cpu")
        self.steps = 0

    def add(self, values: Sequence[Tensor]) -> None:
        """One step's values (0-d tensors, any dtype), in the order of the names. Read before it is full."""
        torch.stack([v.detach().float() for v in values], out=self.rows[self.filled])
        self.filled += 1

    @property
    def full(self) -> bool:
        """Whether the window must be read before the next step."""
        return self.filled == len(self.rows)

    def read(self) -> Tensor:
        """The steps since the last reading, (steps, names) on the CPU; added to the epoch's sums and forgotten."""
        window = self.rows[: self.filled].cpu()
        self.sums += window.double().sum(0)
        self.steps += self.filled
        self.filled = 0
        return window

    def take_epoch(self) -> tuple[Tensor, int]:
        """The sums over all steps read since the last call (float64, names), and their number; starts anew."""
        sums, steps = self.sums.clone(), self.steps
        self.sums.zero_()
        self.steps = 0
        return sums, steps


def first_bad(window: Tensor) -> tuple[int, list[int]] | None:
    """Row and columns of the first value in (steps, names) that is not finite, or None."""
    bad = ~torch.isfinite(window)
    if not bool(bad.any()):
        return None
    row = int(bad.any(1).nonzero()[0])
    return row, [int(c) for c in bad[row].nonzero().flatten()]
