"""TensorLoader: the same batches for the same seed and epoch, equal to a slow reference, sharded and resumable."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from batches import same
from lightning.pytorch.callbacks import ModelCheckpoint

from kd.data.images.augment import Augment, draw, shifted
from kd.data.images.digits import Digits
from kd.data.images.fake import Fake
from kd.data.images.loader import TensorLoader
from kd.losses.base import Batch

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]


def images(count: int = 50, size: tuple[int, int, int] = (3, 9, 11)) -> torch.Tensor:
    return torch.randint(0, 256, (count, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def loader(part: int = 40, **options: Any) -> TensorLoader:
    index = torch.arange(50).flip(0)[:part]
    fixed: dict[str, Any] = {"mean": MEAN, "std": STD, "train": True, "seed": 3, "shuffle": True, "batch_size": 16}
    return TensorLoader(images(), index % 7, index, **{**fixed, **options})


def slow(image: torch.Tensor, offset: list[int], flip: bool, augment: Augment) -> torch.Tensor:
    """Pad, crop, flip and normalise one image, the textbook way."""
    pad = augment.pad
    _, height, width = image.shape
    padded = torch.nn.functional.pad(image.double()[None], (pad,) * 4, mode=augment.pad_mode)[0] / 255
    top, left = offset[0] + pad, offset[1] + pad
    crop = padded[:, top : top + height, left : left + width]
    crop = crop.flip(-1) if flip else crop
    return (crop - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD).double()[:, None, None]


@pytest.mark.parametrize(
    "augment", [Augment(4, flip=True), Augment(3, "reflect", True), Augment(2), Augment(flip=True)]
)
def test_augmentation_equals_a_slow_reference(augment: Augment) -> None:
    fast = loader(augment=augment)
    fast.set_epoch(5)
    offsets, flips = draw(augment, 40, seed=3, epoch=5)
    place = {int(i): row for row, i in enumerate(fast.index)}
    for batch in fast:
        for x, i in zip(batch.inputs, batch.index.tolist(), strict=True):
            flip = bool(flips[place[i]]) if flips is not None else False
            expected = slow(images()[i], offsets[place[i]].tolist(), flip, augment)
            torch.testing.assert_close(x.double(), expected, atol=2e-6, rtol=0)


def test_offsets_and_flips_differ_inside_a_batch_and_fill_their_range() -> None:
    offsets, flips = draw(Augment(2, flip=True), 2000, seed=0, epoch=0)
    assert flips is not None
    assert len(offsets[:64].unique(dim=0)) > 10
    for column in offsets.T:
        assert torch.bincount(column + 2).tolist() == pytest.approx([400] * 5, abs=80)
    assert flips.float().mean() == pytest.approx(0.5, abs=0.05)


def test_an_epoch_depends_on_seed_and_epoch_alone() -> None:
    def epoch(number: int, **options: Any) -> list[Batch]:
        own = loader(augment=Augment(4, flip=True), **options)
        own.set_epoch(number)
        return list(own)

    reference = epoch(2)
    used = loader(augment=Augment(4, flip=True))
    list(used)
    torch.rand(3)
    used.sampler.set_epoch(2)
    assert same(list(used), reference)
    assert not same(epoch(1), reference)
    assert not same(epoch(2, seed=4), reference)


def test_iterating_leaves_the_global_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    list(loader(augment=Augment(4, flip=True)))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_happens_to_a_sample_does_not_depend_on_batch_size_or_ranks() -> None:
    def by_index(**options: Any) -> dict[int, torch.Tensor]:
        batches = list(loader(augment=Augment(4, flip=True), **options))
        return {int(i): x for batch in batches for i, x in zip(batch.index, batch.inputs, strict=True)}

    whole, small, half = by_index(), by_index(batch_size=5), by_index(rank=1, world_size=2)
    assert all(torch.equal(whole[i], small[i]) for i in whole)
    assert all(torch.equal(whole[i], half[i]) for i in half)


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [16, 16, 8]), (True, [16, 16])])
def test_length_and_batch_sizes(drop_last: bool, sizes: list[int]) -> None:
    batches = loader(drop_last=drop_last)
    assert len(batches) == len(sizes)
    assert [len(batch.targets) for batch in batches] == sizes


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_batches_of_all_ranks_together_are_those_of_one(drop_last: bool) -> None:
    """Of 39 samples in batches of 16: the last one, of 7, is 4 and 3 on two ranks."""
    whole = [set(b.index.tolist()) for b in loader(part=39, drop_last=drop_last)]
    ranks = [list(loader(part=39, batch_size=8, rank=r, world_size=2, drop_last=drop_last)) for r in range(2)]
    assert [len(r) for r in ranks] == [len(whole)] * 2 == [2 if drop_last else 3] * 2
    for wanted, *parts in zip(whole, *ranks, strict=True):
        assert sum(len(b.index) for b in parts) == len(wanted)
        assert set().union(*(b.index.tolist() for b in parts)) == wanted


def test_evaluation_takes_equally_many_steps_on_each_rank() -> None:
    """17 samples in batches of 8 are 9 and 8 of them: two batches each, or a sharded network waits for ever."""
    ranks = [list(loader(part=17, batch_size=8, train=False, rank=r, world_size=2)) for r in range(2)]
    assert [[len(b.index) for b in r] for r in ranks] == [[8, 1], [4, 4]]


@pytest.mark.parametrize("world", [2, 3, 60])
def test_evaluation_shards_count_no_sample_twice(world: int) -> None:
    shards = [list(loader(train=False, shuffle=False, rank=r, world_size=world)) for r in range(world)]
    seen = [int(i) for shard in shards for b in shard for i in b.index]
    assert len(seen) == len(set(seen)) == 40
    assert [len(s) for s in shards] == [len(loader(train=False, rank=r, world_size=world)) for r in range(world)]


def test_rank_and_world_come_from_the_trainer() -> None:
    module = Digits(val_fraction=0.25)
    module.trainer = SimpleNamespace(global_rank=1, world_size=2)  # type: ignore[assignment]
    assert module.test_dataloader().samples() == 359
    assert module.train_dataloader().samples() == 404


@pytest.mark.parametrize("reach", [1, 2])
def test_shift_is_never_zero_fills_with_zero_and_is_fixed(reach: int) -> None:
    ramp = torch.arange(1, 82, dtype=torch.uint8).view(1, 1, 9, 9).expand(500, 1, 9, 9).contiguous()
    moved = shifted(ramp, reach)
    assert torch.equal(moved, shifted(ramp, reach))
    offsets = [divmod(int(m[0, 4, 4]) - 41, 9) for m in moved]
    offsets = [(y, x) if x <= reach else (y + 1, x - 9) for y, x in offsets]
    assert len(set(offsets)) == (2 * reach + 1) ** 2 - 1
    assert (0, 0) not in offsets
    padded = torch.nn.functional.pad(ramp[0, 0], (reach,) * 4)
    for (dy, dx), m in zip(offsets, moved, strict=True):
        assert torch.equal(m[0], padded[reach + dy : reach + dy + 9, reach + dx : reach + dx + 9])


def test_test_shift_moves_test_images_only_and_the_same_for_every_seed() -> None:
    plain, first = Digits(split_seed=0), Digits(split_seed=0, test_shift=1)
    second = Digits(split_seed=0, seed=9, test_shift=1)
    assert same(list(first.test_dataloader()), list(second.test_dataloader()))
    assert same(list(plain.val_dataloader()), list(first.val_dataloader()))
    assert not same(list(plain.test_dataloader()), list(first.test_dataloader()))


class Recorder(lightning.LightningModule):
    """Notes which samples each step saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[int, list[int], float]] = []

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch.index.tolist(), float(batch.inputs.sum())))
        return self.layer(batch.inputs.mean().view(1, 1)).sum()

    def validation_step(self, batch: Batch, _: int) -> None:
        self.log("val", batch.inputs.mean(), batch_size=len(batch.index))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, model: Recorder, resume: Path | None = None, **checkpoint: Any) -> Recorder:
    keep = [] if resume else [ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **checkpoint)]
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpointing = resume is None
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=[*keep], enable_checkpointing=checkpointing, **quiet
    )
    data = Fake(shape=[1, 8, 8], train_images=40, test_images=8, batch_size=8, augment={"pad": 1, "flip": True})
    trainer.fit(model, data, ckpt_path=resume, weights_only=False)
    return model


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's, with torch 2.14
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint|.*exists and is not empty")
@pytest.mark.parametrize(
    "checkpoint", [{}, {"save_on_train_epoch_end": True}, {"every_n_train_steps": 2}], ids=["val", "epoch", "step"]
)
def test_a_resumed_run_sees_the_same_batches(tmp_path: Path, checkpoint: dict[str, Any]) -> None:
    straight = fit(tmp_path, Recorder(), **checkpoint)
    assert len({tuple(i) for _, i, _ in straight.seen}) == 15  # another order and crop in every epoch
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) >= 3
    for path in checkpoints:
        step = int(path.stem.rpartition("step=")[2])
        resumed = fit(tmp_path, Recorder(), resume=path)
        assert resumed.seen == straight.seen[step:], path.name
