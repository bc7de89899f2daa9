"""Images with a class at each pixel: npz files and folders, crops and flips of both, splits, and what goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import same
from PIL import Image

from kd.config.compose import checked
from kd.config.instantiate import make
from kd.data.images.masks import MaskFileLoader, MaskLoader
from kd.data.images.segmentation import Segmentation
from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch

PLAIN = {"mean": [0.0], "std": [1 / 255]}  # inputs are the bytes
COUNTS = {"train": 20, "test": 4}


def drawn(count: int, size: tuple[int, int] = (8, 10), classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Masks of random ids, some ignored, and images whose channels are the id times ten, the row and the column."""
    random = np.random.default_rng(count)
    masks = random.integers(0, classes + 1, (count, *size)).astype(np.uint8)
    masks[masks == classes] = 255
    places = np.broadcast_to(np.indices(size).transpose(1, 2, 0), (count, *size, 2))
    images = np.concatenate([(masks.astype(int) * 10 % 256)[..., None], places], 3).astype(np.uint8)
    return images, masks


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., Path]:
    """Writes train.npz, test.npz … and returns the folder."""

    def write(counts: dict[str, int] = COUNTS, **more: Any) -> Path:
        for part, count in counts.items():
            images, masks = drawn(count)
            np.savez(tmp_path / f"{part}.npz", **{"image": images, "mask": masks, **more})
        return tmp_path

    return write


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., Path]:
    """Writes images/ and masks/ of each part as PNG files and returns the folder."""

    def write(counts: dict[str, int] = COUNTS, size: tuple[int, int] = (8, 10)) -> Path:
        for part, count in counts.items():
            for i, pair in enumerate(zip(*drawn(count, size), strict=True)):
                for name, pixels in zip(("images", "masks"), pair, strict=True):
                    file = tmp_path / "set" / part / name / "town" / f"{i:03}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(file)
        return tmp_path / "set"

    return write


def module(folder: Path, **options: Any) -> Segmentation:
    return Segmentation(folder=str(folder), **{"num_classes": 3, "val_fraction": 0.25, "batch_size": 4, **options})


def parts(data: Segmentation) -> dict[str, list[int]]:
    """The index of each part's samples."""
    data.setup()
    return {name: part.index.tolist() for name, part in data.parts.items()}


def consistent(batch: Batch) -> None:
    """The first channel of an image is its mask times ten wherever there is an image."""
    first, targets = batch.inputs[:, 0].round().long(), batch.targets
    inside = batch.inputs.sum(1) > 0
    assert torch.equal(first[inside], (targets * 10 % 256)[inside])


def test_arrays_are_read_and_val_is_cut_by_a_hash(npz) -> None:
    data = module(npz(), **PLAIN)
    assert data.sizes["train"] + data.sizes["val"] == 20
    assert data.sizes["test"] == 4
    assert 0 < data.sizes["val"] < 20
    assert (data.num_classes, data.input_shape) == (3, (3, 8, 10))
    images, masks = drawn(4)
    (batch,) = data.test_dataloader()
    assert torch.equal(batch.targets, torch.from_numpy(masks).long())
    assert torch.equal(batch.inputs.round(), torch.from_numpy(images).permute(0, 3, 1, 2).float())
    assert data.split_facts["cut_by"] == "name"


def test_a_sample_that_is_added_moves_no_other(npz) -> None:
    before, after = (parts(module(npz({"train": count, "test": 2}))) for count in (20, 30))
    assert set(before["val"]) <= set(after["val"])
    assert set(before["train"]) <= set(after["train"])


def test_names_of_classes_come_along(npz) -> None:
    data = module(npz(classes=np.array(["sky", "car", "road"])), num_classes=None)
    data.setup()
    assert (data.num_classes, data.class_names) == (3, ["sky", "car", "road"])
    with pytest.raises(KdError, match=r"data.num_classes = 4 is not allowed: there are 3 names"):
        module(npz(classes=np.array(["sky", "car", "road"])), num_classes=4).setup()
    with pytest.raises(KdError, match=r"the classes of .* are not known: set data.num_classes"):
        module(npz(), num_classes=None).setup()


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_crops_and_flips_move_image_and_mask_together(npz, mode: str) -> None:
    data = module(npz(), augment={"pad": 3, "pad_mode": mode, "flip": True}, **PLAIN)
    loader = data.train_dataloader()
    assert isinstance(loader, MaskLoader)
    moved, plain = 0, {}
    for batch in module(npz(), **PLAIN).answering_dataloader():
        plain |= dict(zip(batch.index.tolist(), batch.targets, strict=True))
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            consistent(batch)
            outside = batch.inputs.sum(1) == 0
            if mode == "constant":  # row 0 and column 0 of id 0 are black as well
                assert (batch.targets[outside] == 255).any()
            moved += sum(not torch.equal(t, plain[i]) for i, t in zip(batch.index.tolist(), batch.targets, strict=True))
    assert moved > 10


def test_another_epoch_is_another_crop_and_the_same_one_the_same(npz) -> None:
    loader = module(npz(), augment={"pad": 2, "flip": True}).train_dataloader()
    first, again, second = [], [], []
    for epoch, found in ((0, first), (1, second), (0, again)):
        loader.set_epoch(epoch)
        found.extend(loader)
    assert same(first, again)
    assert not same(first, second)


def test_an_ignored_id_is_255_in_batches_whatever_it_is_in_the_files(npz) -> None:
    data = module(npz(), num_classes=3, ignore_index=255)
    masks = torch.cat([batch.targets for batch in data.test_dataloader()])
    other = Path(str(npz()))
    for part, count in COUNTS.items():
        images, ids = drawn(count)
        np.savez(other / f"{part}.npz", image=images, mask=np.where(ids == 255, 9, ids).astype(np.uint8))
    assert torch.equal(torch.cat([b.targets for b in module(other, ignore_index=9).test_dataloader()]), masks)


def test_images_without_labels_keep_their_ignored_pixels(npz) -> None:
    data = module(npz(), label_fraction=0.5)
    assert data.sizes["labelled"] == (data.sizes["train"] + 1) // 2
    masks = drawn(20)[1]
    seen = {True: 0, False: 0}
    for batch in data.train_dataloader():
        for index, targets in zip(batch.index.tolist(), batch.targets, strict=True):
            ids = torch.from_numpy(masks[index]).long()
            withheld = bool((targets == UNLABELLED).any())
            seen[withheld] += 1
            assert torch.equal(targets == 255, ids == 255)
            assert withheld or torch.equal(targets, ids)
    assert seen[False] == data.sizes["labelled"]
    assert seen[True] > 0


def test_folders_in_memory_and_from_files_evaluate_alike(folders) -> None:
    folder = folders()
    memory, disk = module(folder, **PLAIN), module(folder, in_memory=False, **PLAIN)
    assert isinstance(memory.train_dataloader(), MaskLoader)
    assert isinstance(disk.train_dataloader(), MaskFileLoader)
    for name in ("val", "test"):
        assert same(list(getattr(memory, f"{name}_dataloader")()), list(getattr(disk, f"{name}_dataloader")()))
    assert parts(memory) == parts(disk)


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
def test_files_are_cropped_and_flipped_together_by_seed_and_epoch_alone(folders) -> None:
    folder = folders()

    def epoch(number: int, **options: Any) -> list[Batch]:
        augment = {"flip": True, "scale": [1.0, 1.0]}
        loader = module(folder, in_memory=False, augment=augment, **PLAIN, **options).train_dataloader()
        loader.set_epoch(number)
        return list(loader)

    reference = epoch(1)
    assert same(epoch(1, num_workers=1), reference)
    assert not same(epoch(2), reference)
    flipped = sum(int(image[2, 0, 0] > image[2, 0, -1]) for batch in reference for image in batch.inputs)
    assert 0 < flipped < sum(map(len, reference))
    for batch in reference:
        whole = batch.inputs[:, 1, -1, 0].round() == 7  # not cropped: the last row is there
        consistent(batch.map(lambda t, kept=whole: t[kept]))


def test_images_of_several_sizes_are_resized_the_mask_by_its_nearest_pixel(folders) -> None:
    folder = folders({"train": 6, "test": 2})
    large = folder / "train" / "images" / "town" / "000.png"
    for name in ("images", "masks"):
        file = folder / "train" / name / "town" / "000.png"
        with Image.open(file) as image:
            image.resize((20, 16), Image.Resampling.NEAREST).save(file)
    with pytest.raises(KdError, match=rf"{large} is 16 x 20, .*001.png is 8 x 10: .* need data.image_size"):
        module(folder).setup()
    data = module(folder, image_size=[8, 10], val_fraction=0.4, **PLAIN)
    data.setup()
    assert data.input_shape == (3, 8, 10)
    assert torch.equal(data.parts["train"].masks[0], torch.from_numpy(drawn(6)[1][0]))


def test_a_palette_is_read_as_ids(folders) -> None:
    folder = folders({"train": 6, "test": 2})
    for file in (folder / "test" / "masks" / "town").iterdir():
        with Image.open(file) as image:
            ids = np.array(image)
        coloured = Image.new("P", ids.shape[::-1])
        coloured.putpalette([*range(256)] * 3)
        coloured.putdata(ids.flatten().tolist())
        coloured.save(file)
    masks = torch.cat([batch.targets for batch in module(folder, val_fraction=0.4).test_dataloader()])
    assert torch.equal(masks, torch.from_numpy(drawn(2)[1]).long())


# ---------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("memory", [True, False])
def test_a_mask_of_another_size_is_named(folders, memory: bool) -> None:
    folder = folders()
    mask = folder / "test" / "masks" / "town" / "001.png"
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(mask)
    with pytest.raises(
        KdError, match=rf"^{mask} is 4 x 5 and its image .*001.png is 8 x 10: both must be of one size$"
    ):
        module(folder, in_memory=memory).setup()


@pytest.mark.parametrize("memory", [True, False])
def test_an_id_that_is_no_class_is_named(folders, memory: bool) -> None:
    folder = folders()
    mask = folder / "train" / "masks" / "town" / "003.png"
    Image.fromarray(np.full((8, 10), 7, np.uint8)).save(mask)
    ids = "ids are 0 to 2, or data.ignore_index = 255"
    with pytest.raises(KdError, match=rf"^{mask} has the class id 7: with data.num_classes = 3 {ids}$"):
        module(folder, in_memory=memory).setup()


def test_arrays_are_checked_as_files_are(npz, tmp_path: Path) -> None:
    with pytest.raises(KdError, match=r"train.npz has the class id 2: with data.num_classes = 2 ids are 0 to 1"):
        module(npz(), num_classes=2).setup()
    images, masks = drawn(20)
    wrong = {
        "has no array mask": {"image": images},
        r"mask uint8 \(20, 4, 10\)": {"image": images, "mask": masks[:, :4]},
        "image is float32": {"image": images.astype(np.float32), "mask": masks},
    }
    for words, arrays in wrong.items():
        np.savez(tmp_path / "train.npz", **arrays)
        with pytest.raises(KdError, match=words):
            module(tmp_path).setup()
    (tmp_path / "train.npz").write_bytes(b"PK no archive")
    with pytest.raises(KdError, match=r"train.npz cannot be read as an npz file"):
        module(tmp_path).setup()
    with pytest.raises(KdError, match=r"data.image_size = \[8, 8\] is not for npz files"):
        module(npz(), image_size=8).setup()


def test_a_mask_that_lacks_or_has_colours_is_named(folders) -> None:
    folder = folders()
    mask = folder / "train" / "masks" / "town" / "002.png"
    Image.fromarray(np.zeros((8, 10, 3), np.uint8)).save(mask)
    with pytest.raises(KdError, match=rf"^{mask} is no mask: .* its mode is RGB$"):
        module(folder).setup()
    mask.unlink()
    image = folder / "train" / "images" / "town" / "002.png"
    with pytest.raises(KdError, match=rf"^{image} has no mask: it must lie in .*masks, with the ending .png$"):
        module(folder).setup()


def test_a_folder_without_what_it_needs_is_refused(npz, tmp_path: Path) -> None:
    with pytest.raises(KdError, match=r"neither .*train/images nor .*train.npz: data.folder must hold"):
        module(tmp_path / "nowhere").setup()
    with pytest.raises(KdError, match=r"there is no test set in .*: add one, or cut it .* data.test_fraction=0.2"):
        module(npz({"train": 20})).setup()
    data = module(npz({"train": 20}), test_fraction=0.3)
    assert 0 < data.sizes["test"] < 20
    with pytest.raises(KdError, match=r"data.test_fraction = 0.2 is not allowed: .* has a test set"):
        module(npz(), test_fraction=0.2).setup()


@pytest.mark.parametrize(
    ("key", "value"), [("drop_classes", [1]), ("test_shift", 1), ("mixup", 1.0), ("teacher_view", "clean")]
)
def test_options_of_sets_with_one_class_an_image_are_refused(npz, key: str, value: Any) -> None:
    with pytest.raises(KdError) as caught:
        module(npz(), **{key: value})
    assert str(caught.value).startswith(f"data.{key} = {value} is not allowed: ")


def test_test_images_that_weights_have_seen_are_found_whatever_their_masks_are(npz) -> None:
    before = module(npz())
    seen, content = before.seen, before.content
    assert before.seen_in_test(seen) == []
    images, masks = drawn(20)
    np.savez(npz({"train": 21}) / "test.npz", image=images, mask=np.zeros_like(masks))
    after = module(before.folder)
    assert len(after.seen_in_test(seen)) == 20
    np.savez(npz() / "train.npz", image=images, mask=np.where(masks == 255, 0, masks))  # the same images
    other = module(before.folder)
    other.setup()
    assert other.content != content  # the masks are part of what the set is


def test_real_images_with_masks_are_read(kd_data: str) -> None:
    data = make(
        {**checked(["data=segmentation", "data.folder=stamps_seg", "data.augment.pad=4"])["data"], "root": kd_data},
        "data",
    )
    data.setup()
    assert data.sizes == {"train": 1099, "val": 101, "test": 300, "labelled": 1099}
    assert (data.num_classes, data.class_names[0], data.input_shape) == (9, "background", (3, 64, 64))
    assert max(int(batch.targets.max()) for batch in data.test_dataloader()) == 8
