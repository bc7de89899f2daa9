"""What the record of a run says of the peers of a set-up: the networks that were trained beside the student."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kd.distill.distiller import Distiller
from kd.distill.evaluation import measure
from kd.losses.base import Batch, Output
from kd.losses.networks import in_eval
from kd.parallel import group
from kd.run import cost
from kd.tasks.base import Want


def measured(module: Distiller, data: Any) -> dict[str, Any]:
    """Return ``peers``: of each the metrics on val and test, as it is after the last epoch, its parameters and MACs.

    Nothing where the set-up's peers do not answer as the student does. All processes call it.
    """
    if not module.peers_answer:
        return {}
    found: dict[str, Any] = {}
    for name, peer in module.peers.items():
        group.same_buffers(peer)
        part: dict[str, Any] = {"epoch": module.epoch_trained}
        with in_eval(peer):
            for split in ("val", "test"):
                if data.sizes[split] != 0:
                    part[split] = _on(module, peer, name, split, getattr(data, f"{split}_dataloader")())
        found[name] = {**part, **cost.size(peer.float(), module.task, Batch(data.example()).to(module.device).inputs)}
    return {"peers": found}


def _on(module: Distiller, peer: nn.Module, name: str, split: str, loader: Any) -> dict[str, float]:
    """Measure a peer on a split."""
    dtype = next((p.dtype for p in peer.parameters()), torch.float32)  # bf16-true: as in the steps

    def answer(batch: Batch) -> Output:
        own = batch.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
        return module.task.answer(peer, own.inputs, own, Want())

    return measure(module.task, module.num_classes, answer, loader, module.device, who=name, split=split)[0]
