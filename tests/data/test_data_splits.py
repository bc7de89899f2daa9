"""Splits: disjoint, stratified, seeded; and the options that thin the training set out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kd.data.images.digits import Digits
from kd.data.images.fake import Fake
from kd.data.split import allocate, stratified
from kd.losses.base import UNLABELLED


def digits(**options: Any) -> Digits:
    module = Digits(**{"val_fraction": 0.25, **options})
    module.setup()
    return module


def counts(targets: torch.Tensor) -> torch.Tensor:
    return torch.bincount(targets[targets >= 0], minlength=10)


@pytest.mark.parametrize(
    ("sizes", "total", "minimum", "shares"),
    [
        ([10, 10], 10, 0, [5, 5]),
        ([10, 20, 3], 11, 0, [3, 7, 1]),
        ([100, 1], 5, 1, [4, 1]),
        ([100, 100, 0], 1, 1, [1, 1, 0]),
        ([3, 3, 3], 4, 0, [2, 1, 1]),
        ([5], 5, 0, [5]),
    ],
)
def test_allocate(sizes: list[int], total: int, minimum: int, shares: list[int]) -> None:
    assert allocate(sizes, total, minimum) == shares


def test_stratified_leaves_the_global_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    targets = torch.arange(50) % 5
    first = stratified(targets, 10, 3, "val")
    torch.rand(7)
    second = stratified(targets, 10, 3, "val")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.random.set_rng_state(state)
    digits(label_fraction=0.5)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_digits_has_the_sizes_of_the_pilot() -> None:
    parts = digits().parts
    assert [len(parts[name].targets) for name in ("train", "val", "test")] == [808, 270, 719]


def test_parts_are_disjoint_cover_everything_and_are_stratified() -> None:
    parts = digits().parts
    together = torch.cat([part.index for part in parts.values()])
    assert torch.equal(together.sort().values, torch.arange(1797))
    whole = counts(torch.cat([part.targets for part in parts.values()])) / 1797
    for part in parts.values():
        assert (counts(part.targets) - whole * len(part.targets)).abs().max() < 2


def test_split_seed_chooses_the_split_and_defaults_to_the_seed() -> None:
    first = digits(seed=1).parts["val"].index
    assert torch.equal(first, digits(seed=1).parts["val"].index)
    assert torch.equal(first, digits(seed=2, split_seed=1).parts["val"].index)
    assert not torch.equal(first, digits(seed=2).parts["val"].index)


def test_index_finds_the_sample_in_the_original_array_whatever_the_options() -> None:
    original = digits().load().train
    for options in ({}, {"drop_classes": [3]}, {"train_size": 50}, {"label_fraction": 0.1, "seed": 4}):
        module = digits(**options)
        batches = [*module.train_dataloader(), *module.val_dataloader(), *module.test_dataloader()]
        for batch in batches:
            assert torch.allclose(batch.inputs, original.inputs[batch.index] / 255, atol=1e-6)
            known = batch.targets != UNLABELLED
            assert torch.equal(batch.targets[known], original.targets[batch.index][known])


def test_batches_have_the_promised_types() -> None:
    batch = next(iter(digits().train_dataloader()))
    assert (batch.inputs.dtype, batch.targets.dtype, batch.index.dtype) == (torch.float32, torch.int64, torch.int64)
    assert batch.inputs.shape == (64, 1, 8, 8)


def test_label_fraction_withholds_labels_but_keeps_images() -> None:
    full, few = digits().parts, digits(label_fraction=0.03).parts
    assert torch.equal(full["train"].index, few["train"].index)
    labelled = few["train"].targets != UNLABELLED
    assert labelled.sum() == 24
    assert counts(few["train"].targets).min() >= 1
    assert torch.equal(few["train"].targets[labelled], full["train"].targets[labelled])
    for name in ("val", "test"):
        assert torch.equal(full[name].targets, few[name].targets)


def test_without_unlabelled_the_same_labelled_images_remain() -> None:
    kept, removed = digits(label_fraction=0.03), digits(label_fraction=0.03, keep_unlabelled=False)
    labelled = kept.parts["train"].targets != UNLABELLED
    assert torch.equal(removed.parts["train"].index, kept.parts["train"].index[labelled])
    assert (removed.parts["train"].targets != UNLABELLED).all()


def test_label_fraction_keeps_at_least_one_label_a_class() -> None:
    assert counts(digits(label_fraction=0.001).parts["train"].targets).tolist() == [1] * 10


def test_dropped_classes_vanish_from_training_only() -> None:
    full, module = digits(), digits(drop_classes=[3])
    assert counts(module.parts["train"].targets)[3] == 0
    assert counts(module.parts["train"].targets).sum() == 808 - counts(full.parts["train"].targets)[3]
    for name in ("val", "test"):
        assert torch.equal(module.parts[name].index, full.parts[name].index)
    assert module.num_classes == 10
    transfer = digits(drop_classes=[3], label_fraction=0.1).parts["train"]
    assert 3 not in full.load().train.targets[transfer.index].tolist()


def test_train_size_is_stratified_and_seeded() -> None:
    first, second = digits(train_size=100, split_seed=0), digits(train_size=100, split_seed=0, seed=1)
    assert len(first.parts["train"].targets) == 100
    assert counts(first.parts["train"].targets).min() >= 9
    assert not torch.equal(first.parts["train"].index, second.parts["train"].index)
    assert torch.equal(first.parts["val"].index, second.parts["val"].index)


def test_fake_has_the_asked_shape_and_can_be_learnt() -> None:
    module = Fake(shape=[3, 16, 16], num_classes=4, train_images=80, test_images=40, val_fraction=0.2)
    module.setup()
    train, test = module.parts["train"], module.parts["test"]
    assert (len(train.targets), len(module.parts["val"].targets), len(test.targets)) == (64, 16, 40)
    assert isinstance(train.inputs, torch.Tensor)
    assert isinstance(test.inputs, torch.Tensor)
    centres = torch.stack([train.inputs[train.index[train.targets == c]].float().mean(0) for c in range(4)])
    distances = torch.cdist(test.inputs.float().flatten(1), centres.flatten(1))
    assert (distances.argmin(1) == test.targets).float().mean() > 0.95
