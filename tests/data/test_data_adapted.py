"""Batches of all forms from loaders of one's own."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from kd.data.base import AdaptedData, Batches, Loaders, as_batch
from kd.errors import KdError
from kd.losses.base import Batch

X, Y, INDEX = torch.rand(3, 2), torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7])


@pytest.mark.parametrize(
    ("item", "targets", "index"),
    [
        ((X, Y), Y, None),
        ([X, Y, INDEX], Y, INDEX),
        (X, None, None),
        ({"pixels": X, "labels": Y, "idx": INDEX}, Y, INDEX),
        ({"pixels": X}, None, None),
        (({"pixels": X}, Y), Y, None),
        (Batch(X, Y, INDEX), Y, INDEX),
    ],
)
def test_batches_of_all_forms(item, targets, index) -> None:
    batch = as_batch(item)
    inputs = batch.inputs["pixels"] if isinstance(batch.inputs, dict) else batch.inputs
    assert inputs is X
    assert batch.targets is targets
    assert batch.index is index


@pytest.mark.parametrize("item", ["text", (X, Y, INDEX, X), [[1.0]], ()])
def test_what_is_no_batch_is_one_sentence(item) -> None:
    with pytest.raises(KdError, match=rf"^mine gives batches of type {type(item).__name__}: a batch must be ") as said:
        as_batch(item, "mine")
    assert "\n" not in str(said.value)


def test_three_loaders_are_the_data_of_a_run() -> None:
    loader = DataLoader(TensorDataset(X, Y), 2)
    data = AdaptedData(Loaders(loader, loader, (batch for batch in loader), num_classes=3, mean=None))
    assert data.sizes == {"train": 3, "val": 3, "test": None, "labelled": 3}
    assert (data.num_classes, data.input_shape, data.class_names, data.mean) == (3, (2,), ["0", "1", "2"], [])
    assert torch.equal(data.example(), X[:1])
    assert (len(data.train_dataloader()), [len(batch) for batch in data.answering_dataloader()]) == (2, [2, 1])
    assert not hasattr(data.test_dataloader(), "__len__")
    assert data.random_view == "data"  # not known: nothing may be kept
    with pytest.raises(KdError, match=r"^mine lacks test_dataloader: "):
        AdaptedData(type("Two", (), {"train_dataloader": list, "val_dataloader": list})(), "mine")


def test_a_sampler_is_told_which_epoch_begins() -> None:
    """As Lightning does it: by ``loader.sampler``."""
    from lightning.fabric.utilities.data import _set_sampler_epoch

    sampler = DistributedSampler(TensorDataset(X, Y), num_replicas=1, rank=0)
    _set_sampler_epoch(Batches(DataLoader(TensorDataset(X, Y), 2, sampler=sampler), "mine"), 4)
    assert sampler.epoch == 4
