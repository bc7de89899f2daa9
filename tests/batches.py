"""Compare the batches of two loaders."""

from __future__ import annotations

import torch

from kd.losses.base import Batch


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    assert batch.targets is not None
    assert batch.index is not None
    assert batch.mask is None
    assert not batch.extra
    return {"inputs": batch.inputs, "targets": batch.targets, "index": batch.index, **batch.views}


def same(first: list[Batch], second: list[Batch]) -> bool:
    pairs = [(tensors(x), tensors(y)) for x, y in zip(first, second, strict=True)]
    return all(x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in pairs)
