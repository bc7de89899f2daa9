"""What the teacher sees, and mixtures of images: equal to slow references, the same for any batch size or rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd.data.images.augment import Augment, draw, draw_mix
from kd.data.images.digits import Digits
from kd.data.images.imagefolder import ImageFolder
from kd.data.images.loader import TensorLoader
from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch

MEAN, STD, SEED, EPOCH = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25], 3, 5
CROPS = Augment(2, flip=True)
INDEX = torch.arange(50).flip(0)[:40]  # row r of the part is image 49 - r


def images() -> Tensor:
    return torch.randint(0, 256, (50, 3, 9, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def epoch(number: int = EPOCH, **options: Any) -> list[Batch]:
    fixed = {"mean": MEAN, "std": STD, "train": True, "seed": SEED, "shuffle": True, "batch_size": 16}
    loader = TensorLoader(images(), INDEX % 7, INDEX, **{**fixed, **options})
    loader.set_epoch(number)
    return list(loader)


def seen(batch: Batch, who: str) -> Tensor:
    return batch.inputs if who == "inputs" else batch.views[who]


def by_index(batches: list[Batch], field: str = "inputs") -> dict[int, Tensor]:
    return {int(i): x for batch in batches for i, x in zip(batch.index, seen(batch, field), strict=True)}


def slow(row: int, drawn: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
    """Row ``row`` of the part, padded, cropped, flipped and normalised the textbook way, in float64."""
    image = images()[INDEX[row]].double() / 255
    if drawn is not None:
        (dy, dx), (_, height, width) = drawn[0][row].tolist(), image.shape
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        image = padded[:, 2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width]
        image = image.flip(-1) if drawn[1] is not None and drawn[1][row] else image
    return (image - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD).double()[:, None, None]


def equal(found: dict[int, Tensor], expected: Callable[[int], Tensor]) -> None:
    assert len(found) == 40
    for i, x in found.items():
        torch.testing.assert_close(x.double(), expected(49 - i), atol=3e-6, rtol=0)


# ---------------------------------------------------------------------- the teacher's view


def test_by_default_the_teacher_has_no_view_of_its_own() -> None:
    assert all("teacher" not in batch.views for batch in epoch(augment=CROPS))
    assert all("teacher" not in batch.views for batch in epoch(teacher_view="clean"))  # nothing is augmented


@pytest.mark.parametrize("view", ["clean", "independent"])
def test_the_student_sees_the_same_whatever_the_teacher_sees(view: str) -> None:
    plain, viewed = epoch(augment=CROPS), epoch(augment=CROPS, teacher_view=view)
    for one, other in zip(plain, viewed, strict=True):
        for field in ("inputs", "targets", "index"):
            assert torch.equal(getattr(one, field), getattr(other, field))


def test_a_clean_view_is_the_image_in_every_epoch() -> None:
    first, second = (by_index(epoch(n, augment=CROPS, teacher_view="clean"), "teacher") for n in (0, 1))
    equal(first, slow)
    assert all(torch.equal(first[i], second[i]) for i in first)


def test_an_independent_view_has_crops_and_flips_of_its_own() -> None:
    batches = epoch(augment=CROPS, teacher_view="independent")
    drawn = draw(CROPS, 40, SEED, EPOCH, "teacher")
    equal(by_index(batches, "teacher"), lambda row: slow(row, drawn))
    equal(by_index(batches), lambda row: slow(row, draw(CROPS, 40, SEED, EPOCH)))


def test_independent_draws_are_independent() -> None:
    (student, flip), (teacher, other) = (draw(Augment(1, flip=True), 9000, 0, 0, who) for who in ("augment", "teacher"))
    for axis in (0, 1):  # all nine pairs of offsets are equally frequent, and so are the four of flips
        pairs = torch.bincount((student[:, axis] + 1) * 3 + teacher[:, axis] + 1)
        assert pairs.tolist() == pytest.approx([1000] * 9, abs=130)
    assert torch.bincount(flip.long() * 2 + other.long()).tolist() == pytest.approx([2250] * 4, abs=200)


# ---------------------------------------------------------------------- mixup


@pytest.mark.parametrize("augment", [None, CROPS], ids=["plain", "crops"])
def test_a_mixture_equals_a_slow_reference(augment: Augment | None) -> None:
    batches = epoch(augment=augment, mixup=1.0)
    drawn = draw(augment, 40, SEED, EPOCH) if augment else None
    partners, shares = draw_mix(1.0, 40, SEED, EPOCH)

    def mixture(row: int) -> Tensor:
        share = shares[row].double()
        return share * slow(row, drawn) + (1 - share) * slow(int(partners[row]), drawn)

    equal(by_index(batches), mixture)
    assert all((batch.targets == UNLABELLED).all() and "teacher" not in batch.views for batch in batches)


@pytest.mark.parametrize("options", [{"mixup": 1.0}, {"teacher_view": "independent"}, {"teacher_view": "clean"}])
def test_neither_batch_size_nor_ranks_nor_history_matter(options: dict[str, Any]) -> None:
    field = "inputs" if "mixup" in options else "teacher"
    whole = by_index(epoch(augment=CROPS, **options), field)
    again = by_index(epoch(augment=CROPS, **options), field)
    small = by_index(epoch(augment=CROPS, batch_size=7, **options), field)
    ranks = [by_index(epoch(augment=CROPS, rank=r, world_size=2, **options), field) for r in (0, 1)]
    for other in (again, small, ranks[0] | ranks[1]):
        assert all(torch.equal(whole[i], other[i]) for i in whole)


def test_each_epoch_mixes_anew() -> None:
    first, second = (by_index(epoch(n, mixup=1.0)) for n in (0, 1))
    assert not any(torch.equal(first[i], second[i]) for i in first)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_have_the_moments_of_a_beta_distribution(alpha: float) -> None:
    partners, shares = draw_mix(alpha, 20_000, 1, 0)
    assert sorted(partners.tolist()) == list(range(20_000))
    assert (shares >= 0).all()
    assert (shares <= 1).all()
    assert shares.mean().item() == pytest.approx(0.5, abs=0.015)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
    if alpha == 1:
        assert np.histogram(shares, bins=10, range=(0, 1))[0].tolist() == pytest.approx([2000] * 10, abs=170)


def test_evaluation_is_neither_mixed_nor_viewed() -> None:
    plain, mixed = Digits(), Digits(mixup=1.0)
    viewed = Digits(teacher_view="clean", augment={"pad": 1})
    for name in ("val", "test"):
        loaders = [list(getattr(module, f"{name}_dataloader")()) for module in (plain, mixed, viewed)]
        for a, b, c in zip(*loaders, strict=True):
            assert torch.equal(a.inputs, b.inputs)
            assert torch.equal(a.inputs, c.inputs)
            assert torch.equal(a.targets, b.targets)
            assert "teacher" not in c.views


# ---------------------------------------------------------------------- answers that are computed once


def test_the_images_to_answer_come_once_in_order_on_every_rank() -> None:
    module = Digits(teacher_view="clean", augment={"pad": 1}, drop_last=True, batch_size=500, eval_batch_size=100)
    module.trainer = SimpleNamespace(global_rank=1, world_size=2)  # type: ignore[assignment]
    batches = list(module.answering_dataloader())
    assert torch.equal(torch.cat([batch.index for batch in batches]), module.parts["train"].index)
    assert [len(batch.index) for batch in batches][:2] == [100, 100]
    plain = Digits(shuffle=False, batch_size=100)
    for one, other in zip(batches, plain.train_dataloader(), strict=True):
        assert torch.equal(one.views["teacher"], other.inputs)


@pytest.mark.parametrize(
    ("options", "random"),
    [
        ({}, None),
        ({"augment": {"pad": 1}}, "data.augment"),
        ({"augment": {"flip": True}}, "data.augment"),
        ({"augment": {"pad": 1}, "teacher_view": "independent"}, "data.augment"),
        ({"augment": {"pad": 1}, "teacher_view": "clean"}, None),
        ({"mixup": 0.5}, "data.mixup"),
    ],
)
def test_what_makes_a_view_random(options: dict[str, Any], random: str | None) -> None:
    assert Digits(**options).random_view == random


# ---------------------------------------------------------------------- files


def folder(image_folder: Callable[..., Path], **options: Any) -> ImageFolder:
    path = image_folder(train={"cat": 6, "dog": 6}, test={"cat": 1, "dog": 1})
    return ImageFolder(folder=str(path), image_size=16, crop_pct=1.0, val_fraction=0.2, **options)


@pytest.mark.parametrize("option", [{"mixup": 1.0}, {"teacher_view": "clean"}], ids=lambda o: next(iter(o)))
def test_image_files_are_refused_and_images_in_memory_are_not(image_folder, option: dict[str, Any]) -> None:
    (key, value) = next(iter(option.items()))
    with pytest.raises(KdError, match=rf"^data\.{key} = {value} needs images in memory: set data\.in_memory=true$"):
        folder(image_folder, in_memory=False, augment={"flip": True}, **option).train_dataloader()
    batch = next(iter(folder(image_folder, augment={"flip": True}, **option).train_dataloader()))
    assert ("teacher" not in batch.views) == (key == "mixup")


@pytest.mark.parametrize(
    ("augment", "random"), [({"scale": [0.5, 1.0]}, "data.augment"), ({"flip": True}, "data.augment"), ({}, None)]
)
def test_files_are_answered_once_only_when_nothing_moves_them(image_folder, augment, random) -> None:
    module = folder(image_folder, in_memory=False, augment=augment)
    assert module.random_view == random
    if random is None:
        first = by_index(list(module.train_dataloader()))
        once = by_index(list(module.answering_dataloader()))
        assert all(torch.equal(first[i], once[i]) for i in first)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"teacher_view": "both"}, "data.teacher_view = both is not allowed: it must be null, clean or independent"),
        ({"mixup": 0}, "data.mixup = 0 is not allowed: it must be a finite number above 0, or null"),
        ({"mixup": True}, "data.mixup = true is not allowed: it must be a finite number above 0, or null"),
        ({"mixup": "1"}, "data.mixup = 1 is not allowed: it must be a finite number above 0, or null"),
        ({"teacher_view": "independent"}, "data.teacher_view = independent needs something to draw: set"),
        (
            {"teacher_view": "clean", "mixup": 1.0},
            "data.mixup = 1.0 needs data.teacher_view = null: both networks see the same mixture",
        ),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KdError) as caught:
        Digits(**options)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
