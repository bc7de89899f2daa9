"""Places of the training samples in a bank, and negatives that are drawn alike on every process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd.losses.base import UNLABELLED, Setup


class Rows(nn.Module):
    """The row of each training sample in a bank that has one for each, and rows of other classes.

    ``targets`` (n,) int64: the classes that negatives are not drawn from; samples without a label are each a class of
    its own, and so are all where it is None, or has shares of classes. ``others``: how many rows there are at least to
    draw from. ``ValueError``, with the method, where the data has no index.
    """

    place: Tensor
    order: Tensor
    start: Tensor
    count: Tensor

    def __init__(self, method: str, setup: Setup, targets: Tensor | None) -> None:
        super().__init__()
        index = setup.train_index
        if index is None or setup.batch.index is None:
            raise ValueError(
                f"{method} keeps a row for each training sample, and the data does not tell their index "
                "(Batch.index and train_index): use a data module of kd, or kd.data.base.AdaptedData"
            )
        own = torch.arange(len(index))
        if targets is None or targets.ndim != 1 or targets.is_floating_point():
            targets = torch.full((len(index),), UNLABELLED)
        targets = targets.cpu().long()
        classes = torch.where(targets == UNLABELLED, targets.max().clamp(min=0) + 1 + own, targets)
        _, inside, counts = classes.unique(return_inverse=True, return_counts=True)
        place = torch.zeros(setup.size, dtype=torch.int64).index_copy(0, index.cpu(), own)
        starts = counts.cumsum(0) - counts
        tensors = {"place": place, "order": inside.argsort(stable=True), "start": starts[inside]}
        for name, tensor in {**tensors, "count": counts[inside]}.items():
            self.register_buffer(name, tensor, persistent=False)
        self.others = len(index) - int(counts.max())
        self.seed = int(torch.randint(2**31, ()))  # the same on all processes

    def __len__(self) -> int:
        """Count the rows of the bank."""
        return len(self.order)

    def drawn(self, index: Tensor | None, negatives: int, progress: float) -> Tensor:
        """Return (B, 1 + K): the row of each sample, and K of other classes, drawn with replacement.

        ``progress`` seeds the draw: it is the same on all processes, and in a run that is resumed.
        """
        assert index is not None
        rows = self.place[index]
        generator = torch.Generator(rows.device).manual_seed(self.seed + round(progress * 2**40))
        start, count = (t[rows].unsqueeze(1) for t in (self.start, self.count))
        # numbers of places outside of the sample's class, which lie side by side in the order of the classes
        share = torch.rand((len(rows), negatives), generator=generator, device=rows.device, dtype=torch.float64)
        drawn = (share * (len(self) - count)).long()
        return torch.cat([rows.unsqueeze(1), self.order[drawn + count * (drawn >= start)]], dim=1)
