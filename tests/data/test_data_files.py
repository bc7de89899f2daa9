"""Folders of images: listing, memory or files, workers, and what goes wrong."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import same
from PIL import Image

from kd.data.images.files import FileLoader, decode
from kd.data.images.imagefolder import ImageFolder
from kd.data.images.loader import TensorLoader
from kd.errors import KdError
from kd.losses.base import Batch

Write = Callable[..., Path]
TRAIN, TEST = {"cat": 6, "dog": 4, "fox": 5}, {"cat": 1, "dog": 2, "fox": 1}


def module(folder: Path, **options: Any) -> ImageFolder:
    fixed = {"image_size": 16, "crop_pct": 1.0, "val_fraction": 0.2, "batch_size": 5}
    return ImageFolder(folder=str(folder), **{**fixed, **options})


def files(folder: Path, **options: Any) -> ImageFolder:
    return module(folder, in_memory=False, augment={"flip": True, "scale": [0.3, 1.0]}, **options)


def test_classes_are_the_folders_and_val_is_carved(image_folder: Write) -> None:
    data = module(image_folder(train=TRAIN, test=TEST))
    data.setup()
    assert data.class_names == ["cat", "dog", "fox"]
    assert len(data.parts["train"].targets) + len(data.parts["val"].targets) == 15
    assert len(data.parts["val"].targets) > 0
    assert data.parts["test"].targets.tolist() == [0, 1, 1, 2]


def test_a_val_folder_is_used(image_folder: Write) -> None:
    data = module(image_folder(train=TRAIN, val=TEST, test=TEST))
    data.setup()
    assert [len(data.parts[p].targets) for p in ("train", "val", "test")] == [15, 4, 4]


def test_small_folders_stay_in_memory_and_evaluate_like_files(image_folder: Write) -> None:
    folder = image_folder(train=TRAIN, test=TEST)
    memory, disk = module(folder), files(folder)
    assert isinstance(memory.train_dataloader(), TensorLoader)
    assert isinstance(disk.train_dataloader(), FileLoader)
    for name in ("val", "test"):
        assert same(list(getattr(memory, f"{name}_dataloader")()), list(getattr(disk, f"{name}_dataloader")()))


def test_a_crop_that_few_images_switch_off_is_said_and_recorded(
    image_folder: Write, caplog: pytest.LogCaptureFixture
) -> None:
    folder = image_folder(train=TRAIN, test=TEST)
    for scale, off in (([0.3, 1.0], ["data.augment.scale"]), (None, [])):
        caplog.clear()
        data = module(folder, augment={"flip": True, "scale": scale})
        data.setup()
        assert list(data.augmentation_off) == off
        assert ("data.augment.scale = [0.3, 1.0] is off" in caplog.text) == bool(off)
    disk = files(folder)
    disk.setup()
    assert not disk.augmentation_off


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
def test_files_are_augmented_by_seed_and_epoch_alone(image_folder: Write) -> None:
    folder = image_folder(train=TRAIN, test=TEST)

    def epoch(number: int, **options: Any) -> list[Batch]:
        loader = files(folder, **options).train_dataloader()
        loader.set_epoch(number)
        return list(loader)

    state = torch.random.get_rng_state()
    reference = epoch(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    assert same(epoch(1, num_workers=2), reference)
    assert not same(epoch(2), reference)
    assert len({x.sum().item() for batch in [*epoch(1), *epoch(2)] for x in batch.inputs}) == 24


def test_a_test_set_can_be_cut_from_train(image_folder: Write) -> None:
    folder = image_folder(train=TRAIN)
    with pytest.raises(KdError, match=r"there is no folder .*/test: add one, or cut it from train"):
        module(folder).setup()
    data = module(folder, test_fraction=0.2)
    data.setup()
    assert min(len(data.parts[p].targets) for p in ("train", "val", "test")) > 0
    together = torch.cat([part.index for part in data.parts.values()])
    assert together.sort().values.tolist() == list(range(15))


def test_both_a_test_folder_and_a_fraction_are_refused(image_folder: Write) -> None:
    with pytest.raises(KdError, match=r"data\.test_fraction = 0\.2 is not allowed: .* has a folder test"):
        module(image_folder(train=TRAIN, test=TEST), test_fraction=0.2).setup()


def test_class_folders_must_agree(image_folder: Write) -> None:
    folder = image_folder(train=TRAIN, test={"cat": 1, "dog": 1, "wolf": 1})
    with pytest.raises(KdError, match=r"differ: fox \(train only\), wolf \(test only\)"):
        module(folder).setup()


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
@pytest.mark.parametrize(("workers", "content"), [(0, b""), (0, b"not an image"), (0, None), (1, None)])
def test_a_damaged_file_is_named(image_folder: Write, workers: int, content: bytes | None) -> None:
    folder = image_folder(train=TRAIN, test=TEST)
    broken = folder / "train" / "dog" / "002.png"
    broken.write_bytes(broken.read_bytes()[:200] if content is None else content)
    pattern = r"^\S*dog/002\.png cannot be read as an image .*: replace or delete it$"
    if workers == 0:
        with pytest.raises(KdError, match=pattern):
            module(folder).setup()
    data = files(folder, num_workers=workers)
    with pytest.raises(KdError, match=pattern):
        list(data.train_dataloader()) + list(data.val_dataloader())


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says to be this large."""
    out = io.BytesIO()
    Image.new("L", (1, 1)).save(out, "png")
    head = b"IHDR" + struct.pack(">II", width, height) + out.getvalue()[24:29]
    return out.getvalue()[:12] + head + struct.pack(">I", zlib.crc32(head)) + out.getvalue()[33:]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize(
    ("edge", "why"), [(10_000, "100,000,000 pixels, at most 89,478,485"), (100_000, "10000000000 pixels")]
)
def test_a_decompression_bomb_is_named(tmp_path: Path, edge: int, why: str) -> None:
    (tmp_path / "bomb.png").write_bytes(claims(edge, edge))
    with pytest.raises(KdError) as caught:
        decode(tmp_path / "bomb.png", lambda image: torch.zeros(1))
    assert str(caught.value).startswith(f"{tmp_path / 'bomb.png'} cannot be read as an image (")
    assert why in str(caught.value)


def test_grey_and_transparent_images_become_rgb(image_folder: Write) -> None:
    folder = image_folder(train=TRAIN, test=TEST)
    Image.new("L", (30, 20), 128).save(folder / "train" / "cat" / "grey.png")
    Image.new("P", (30, 20), 1).save(folder / "train" / "cat" / "palette.png", transparency=b"\x00\x80")
    Image.new("RGBA", (30, 20), (9, 9, 9, 0)).save(folder / "train" / "cat" / "clear.png")
    data = module(folder)
    data.setup()
    assert isinstance(data.parts["train"].inputs, torch.Tensor)
    assert data.parts["train"].inputs.shape == (18, 3, 16, 16)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"image_size": 0}, "data.image_size = 0 is not allowed"),
        ({"crop_pct": 1.5}, "data.crop_pct = 1.5 is not allowed: it must be a number above 0 and at most 1"),
        ({"in_memory": "yes"}, "data.in_memory = yes is not allowed: it must be auto, true or false"),
        ({"num_workers": -1}, "data.num_workers = -1 is not allowed"),
        ({"folder": None}, "data.folder = null is not allowed: it must be the folder that holds"),
        ({"augment": {"scale": [0.5, 2]}}, "data.augment.scale = [0.5, 2] is not allowed"),
        ({"val_fraction": 0.01}, "data.val_fraction = 0.01 leaves no image for validation: the training set has 15"),
        ({"drop_classes": [3]}, "data.drop_classes = [3] is not allowed: classes are 0 to 2"),
        ({"in_memory": False, "augment": {"pad": 2}}, "data.augment.pad = 2 needs images in memory"),
        ({"in_memory": False, "test_shift": 2}, "data.test_shift = 2 needs images in memory"),
        ({"folder": "/nowhere/at/all"}, "there is no folder /nowhere/at/all/train: data.folder must hold train/CLASS"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(image_folder: Write, options: dict[str, Any], sentence: str) -> None:
    folder = image_folder(train=TRAIN, test=TEST)
    with pytest.raises(KdError) as caught:
        ImageFolder(**{"folder": str(folder), "image_size": 16, "val_fraction": 0.2, **options}).train_dataloader()
    assert sentence in str(caught.value)


def test_a_folder_without_images_is_refused(image_folder: Write) -> None:
    folder = image_folder(train=TRAIN)
    (folder / "test" / "cat").mkdir(parents=True)
    with pytest.raises(KdError, match=r"there is no image in .*/test: it must hold CLASS/"):
        module(folder).setup()
