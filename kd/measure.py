"""One pass over a split, outside of a trainer: how the teacher, and ``kd eval``, are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kd.losses.base import Batch


@torch.no_grad()
def measure(
    task: Any,
    num_classes: int,
    network: Callable[[Tensor], Tensor],
    loader: Iterable[Batch],
    device: torch.device,
    teacher: Callable[[Tensor], Tensor] | None = None,
    keep: dict[str, list[Tensor]] | None = None,
) -> tuple[dict[str, float], list[float]]:
    """The task's metrics of a network on a split, and its accuracy per class, outside of a trainer.

    ``network`` and ``teacher`` map inputs to logits (rows, classes); ``keep`` collects index, target and logits.
    """
    metrics = task.metrics(num_classes).to(device)
    for batch in loader:
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        logits = network(inputs)
        metrics.update(logits, targets, teacher(inputs) if teacher is not None else None)
        if keep is not None:
            for name, tensor in (("index", batch.index), ("target", batch.targets), ("logits", logits)):
                keep.setdefault(name, []).append(tensor.cpu())
    return metrics.compute(teacher is not None), metrics.accuracy_per_class()
