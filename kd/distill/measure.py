"""One pass over a split, outside of a trainer: how the teacher, and ``kd eval``, are measured; NaN in predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from kd.errors import RunFailure
from kd.losses.base import Batch


class NotFinite(Metric):
    """Counts the rows of a pass whose logits are not all finite and keeps the lowest index of them.

    Nothing is synchronised before ``compute``, which is over all processes.
    """

    full_state_update = False
    first: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("first", torch.tensor(torch.iinfo(torch.int64).max), dist_reduce_fx="min")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, index: Tensor) -> None:
        """Logits (rows, classes) and the index (rows,) of their images."""
        bad = ~logits.flatten(1).isfinite().all(1)
        self.rows += bad.sum()
        self.first = torch.minimum(self.first, torch.where(bad, index, self.first).min())

    def compute(self) -> tuple[int, int]:
        """Number of such rows, and the lowest index among them."""
        return int(self.rows), int(self.first)

    def check(self, whose: str, split: str, more: str = "") -> None:
        """``RunFailure`` that names network, split and row when there was one."""
        rows, first = self.compute()
        if rows:
            count = "is not finite for 1 image" if rows == 1 else f"is not finite for {rows} images"
            raise RunFailure(f"the answer of {whose} {count} of {split} (NaN or infinity; index {first}){more}")


@torch.no_grad()
def measure(
    task: Any,
    num_classes: int,
    network: Callable[[Tensor], Tensor],
    loader: Iterable[Batch],
    device: torch.device,
    teacher: Callable[[Tensor], Tensor] | None = None,
    keep: dict[str, list[Tensor]] | None = None,
    whose: str = "the student",
    split: str = "the split",
) -> tuple[dict[str, float], list[float]]:
    """The task's metrics of a network on a split, and its accuracy per class, outside of a trainer.

    ``network`` and ``teacher`` map inputs to logits (rows, classes), which are measured in float32; ``keep`` collects
    index, target and logits. ``KdError`` when logits are not finite; it says ``whose`` and of which ``split``.
    """
    metrics = task.metrics(num_classes).to(device)
    finite, finite_teacher = NotFinite().to(device), NotFinite().to(device)
    for batch in loader:
        inputs, targets, index = (t.to(device) for t in (batch.inputs, batch.targets, batch.index))
        logits = network(inputs).float()
        finite.update(logits, index)
        beside = None
        if teacher is not None:
            beside = teacher(inputs).float()
            finite_teacher.update(beside, index)
        metrics.update(logits, targets, beside)
        if keep is not None:
            for name, tensor in (("index", index), ("target", targets), ("logits", logits)):
                keep.setdefault(name, []).append(tensor.cpu())
    finite.check(whose, split)
    if teacher is not None:
        finite_teacher.check("the teacher", split)
    return metrics.compute(teacher is not None), metrics.accuracy_per_class()
