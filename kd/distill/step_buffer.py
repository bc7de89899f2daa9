"""The training step's bookkeeping: scalars go into one device buffer and are read every so many steps.

Logging through ``self.log`` each step, or a metric's ``forward``, costs more than a small network's whole step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class StepBuffer:
    """Collects named scalars of each step on the device; one synchronisation a window.

    ``names``: the columns; ``length``: steps a window (at least 1). Columns are means over the rows of a step, or over
    its labelled rows (``over_labelled``), or ``counts`` of labelled rows; the last column: labelled rows.
    Sums over steps are weighted accordingly, so that the means of an epoch are exact whatever the batches were.
    """

    def __init__(
        self,
        names: Sequence[str],
        length: int,
        device: torch.device,
        over_labelled: Sequence[str] = (),
        counts: Sequence[str] = (),
    ) -> None:
        self.names = [*names, *counts, "labelled"]
        self.per_labelled = torch.tensor([n in over_labelled for n in self.names])
        self.counted = torch.tensor([n in counts or n == "labelled" for n in self.names])
        self.row_counts: list[int] = []
        self.rows = torch.zeros(length, len(self.names), device=device)
        self.filled = 0
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device="cpu")
        self.row_total = 0

    def add(self, values: Sequence[Tensor], rows: int) -> None:
        """Add one step of so many rows: its values (0-d tensors, any dtype), in the order of the names."""
        self.row_counts.append(rows)
        torch.stack([v.detach().float() for v in values], out=self.rows[self.filled])
        self.filled += 1

    @property
    def full(self) -> bool:
        """Whether the window must be read before the next step."""
        return self.filled == len(self.rows)

    def read(self) -> Tensor:
        """Read the steps since the last reading, (steps, names) on the CPU; added to the epoch's sums and forgotten."""
        window = self.rows[: self.filled].cpu()
        self.last = self._weighted(window)
        self.sums += self.last[0]
        self.row_total += self.last[1]
        self.filled = 0
        self.row_counts = []
        return window

    def _weighted(self, window: Tensor) -> tuple[Tensor, int]:
        rows = torch.tensor(self.row_counts, dtype=torch.float64).unsqueeze(1)
        labelled = window[:, -1:].double()
        factor = torch.where(self.counted, torch.ones_like(rows), torch.where(self.per_labelled, labelled, rows))
        return (window.double() * factor).sum(0), sum(self.row_counts)

    def take_epoch(self) -> tuple[Tensor, int]:
        """Return the weighted sums (float64, names) over all steps read since the last call, and their rows.

        Both start anew.
        """
        sums, rows = self.sums.clone(), self.row_total
        self.sums.zero_()
        self.row_total = 0
        return sums, rows

    def means(self, sums: Tensor, rows: int) -> dict[str, float]:
        """Named means of weighted sums: over the labelled rows where that is what was summed, else over the rows.

        Where no row had a label, a mean over the labelled ones is left out: 0 would be read as a result.
        """
        labelled = float(sums[-1])
        over = (self.per_labelled | self.counted).tolist()
        named = list(zip(self.names, sums.tolist(), over, strict=True))[:-1]
        return {name: value / (labelled if few else max(1, rows)) for name, value, few in named if labelled or not few}


def first_bad(window: Tensor) -> tuple[int, list[int]] | None:
    """Row and columns of the first value in (steps, names) that is not finite, or None."""
    bad = ~torch.isfinite(window)
    if not bool(bad.any()):
        return None
    row = int(bad.any(1).nonzero()[0])
    return row, [int(c) for c in bad[row].nonzero().flatten()]
