"""What a data set holds: its digest, splits that a renamed file does not move, and images that weights have seen."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kd.data import content
from kd.data.images.digits import Digits
from kd.data.images.imagefolder import ImageFolder
from kd.data.images.parts import Source
from kd.data.split import hashed

Write = Callable[..., Path]
CLASSES = {"cat": 40, "dog": 30, "fox": 30}


def folder(path: Path, **options: Any) -> ImageFolder:
    fixed = {"image_size": 8, "crop_pct": 1.0, "val_fraction": 0.2, "test_fraction": 0.3, "in_memory": False}
    module = ImageFolder(folder=str(path), **{**fixed, **options})
    module.setup()
    return module


def digits(**options: Any) -> Digits:
    module = Digits(val_fraction=0.25, **options)
    module.setup()
    return module


def names(module: ImageFolder, part: str) -> set[str]:
    rows = module.parts[part].rows
    return {rows.content.name(int(i)) for i in rows.positions}


@pytest.fixture
def images(image_folder: Write) -> Path:
    return image_folder(train=CLASSES)


def test_a_split_is_about_its_share_of_each_class_and_depends_on_the_seed(images: Path) -> None:
    module = folder(images)
    sizes = {part: len(module.parts[part].targets) for part in ("train", "val", "test")}
    assert sum(sizes.values()) == 100
    assert 20 <= sizes["test"] <= 40
    assert 7 <= sizes["val"] <= 21
    assert len(set(module.parts["test"].targets.tolist())) == 3
    assert names(folder(images), "test") == names(module, "test") != names(folder(images, split_seed=1), "test")


def test_a_renamed_or_added_file_moves_no_other(images: Path) -> None:
    before = {part: names(folder(images), part) for part in ("train", "val", "test")}
    (images / "train" / "dog" / "003.png").rename(images / "train" / "dog" / "zzz.png")
    for i in range(25):
        shutil.copy(images / "train" / "cat" / "000.png", images / "train" / "cat" / f"more{i}.png")
    module = folder(images)
    for part, were in before.items():
        own = {n for n in names(module, part) if "more" not in n and "zzz" not in n}
        assert own == were - {"dog/003.png"}


@pytest.mark.parametrize(
    "change",
    [
        lambda f: (f / "cat" / "000.png").rename(f / "cat" / "other.png"),
        lambda f: shutil.copy(f / "cat" / "000.png", f / "cat" / "more.png"),
        lambda f: Image.new("RGB", (24, 20), 7).save(f / "fox" / "001.png"),
        lambda f: [(f / a).rename(f / b) for a, b in (("cat", "x"), ("dog", "cat"), ("x", "dog"))],
    ],
    ids=["renamed", "added", "other pixels", "classes exchanged"],
)
def test_another_content_has_another_digest(images: Path, change: Callable[[Path], Any], tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "copy")
    before = folder(images).content
    assert folder(tmp_path / "copy").content == before == folder(images, in_memory=True).content, (
        "the place is no content"
    )
    change(images / "train")
    assert folder(images).content != before


def test_the_pixels_of_an_array_are_content() -> None:
    class Inverted(Digits):
        def load(self):
            source = super().load()
            return source._replace(train=source.train._replace(inputs=255 - source.train.inputs))

    inverted = Inverted(val_fraction=0.25)
    inverted.setup()
    assert inverted.digest == digits().digest, "the labels are the same"
    assert inverted.content != digits().content
    assert digits(test_shift=1, seed=4, label_fraction=0.5, split_seed=3).content == digits().content


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_that_became_test_images_are_found_under_any_name(images: Path, in_memory: bool) -> None:
    before = folder(images, in_memory=in_memory)
    seen = before.seen
    assert before.seen_in_test(seen) == []
    trained = {file: (images / "train" / file).read_bytes() for file in names(before, "train") | names(before, "val")}
    for i, file in enumerate(sorted((images / "train").rglob("*.png"))):
        file.rename(file.with_name(f"renamed{i}.png"))
    after = folder(images, in_memory=in_memory)
    tested = {file for file in names(after, "test") if (images / "train" / file).read_bytes() in trained.values()}
    assert tested, "the split is another one"
    assert set(after.seen_in_test(seen)) == tested


def test_arrays_are_compared_as_well() -> None:
    seen = digits(split_seed=1).seen
    both = digits(split_seed=1)
    leaked = set(both.parts["train"].index.tolist() + both.parts["val"].index.tolist())
    here = digits()
    shared = leaked & set(here.parts["test"].index.tolist())
    found = {int(name.removeprefix("number ")) for name in here.seen_in_test(seen)}
    assert found <= shared
    assert len(found) == len(shared), "all are recorded"
    assert here.seen_in_test(here.seen) == []


def test_of_a_large_set_a_sample_is_recorded(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "SEEN", 20)
    for i, file in enumerate(sorted((images / "train").rglob("*.png"))):  # photographs differ in size
        file.write_bytes(file.read_bytes() + bytes(7 * i))
    seen = folder(images).seen
    assert len(seen["samples"]) == 20
    reads: list[int] = []
    read = content.FileContent.read
    monkeypatch.setattr(content.FileContent, "read", lambda self, i: (reads.append(i), read(self, i))[1])
    for i, file in enumerate(sorted((images / "train").rglob("*.png"))):
        file.rename(file.with_name(f"renamed{i}.png"))
    after = folder(images)
    reads.clear()
    assert after.seen_in_test(seen)
    assert len(reads) < 15, "what comes later in the order of sizes is not read"


def test_what_a_set_holds_twice_is_no_leak(images: Path) -> None:
    module = folder(images)
    first, second = sorted(names(module, "train"))[0], sorted(names(module, "test"))[0]
    shutil.copy(images / "train" / first, images / "train" / second)
    seen = folder(images).seen
    (images / "train" / sorted(names(module, "train"))[1]).write_bytes((images / "train" / first).read_bytes())
    assert folder(images).seen_in_test(seen) == []


def test_a_class_must_keep_an_image_to_train_on(image_folder: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = image_folder(train={"cat": 40, "dog": 1})
    place = hashed(0, "test", "dog/000.png")
    folder(path, test_fraction=place + 0.01)  # the one dog would be a test image
    assert "dog/000.png" in names(folder(path, test_fraction=place + 0.01, val_fraction=0.99), "train")
    logging.getLogger("kd").propagate = True
    folder(path, test_fraction=place - 0.01)
    assert "no image of dog in test" in caplog.text


def test_files_of_one_size_are_told_apart_by_their_bytes(image_folder: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image_folder(train=CLASSES)
    for file in sorted((path / "train").rglob("*.png")):
        Image.open(file).save(file.with_suffix(".bmp"))
        file.unlink()
    monkeypatch.setattr(content, "SEEN", 40)
    before = folder(path)
    seen, trained = before.seen, names(before, "train") | names(before, "val")
    kept = {(path / "train" / file).read_bytes() for file in trained if file.startswith("fox")}
    for i, file in enumerate(sorted((path / "train" / "fox").iterdir())):  # the last class of the listing
        file.rename(file.with_name(f"renamed{i}.bmp"))
    after = folder(path)
    leaked = [n for n in names(after, "test") if (path / "train" / n).read_bytes() in kept]
    assert leaked
    found = after.seen_in_test(seen)
    assert found
    assert set(found) <= set(leaked)


def test_test_images_that_are_training_images_are_counted(images: Path) -> None:
    class Twice(Digits):
        def load(self):
            train = super().load().train
            doubled = train._replace(inputs=train.inputs.clone())
            doubled.inputs[100:110] = doubled.inputs[0:10]
            return Source(train, doubled)

    assert digits().copies_in_test() == 0
    module = Twice(train_size=50)
    module.setup()
    kept = {module.parts["train"].inputs[i].numpy().tobytes() for i in module.parts["train"].index}
    expected = sum(image.numpy().tobytes() in kept for image in module.parts["test"].inputs)
    assert module.copies_in_test() == expected
    assert 40 <= expected <= 60
    for i in range(20):
        shutil.copy(images / "train" / "cat" / "000.png", images / "train" / "cat" / f"more{i}.png")
    assert folder(images).copies_in_test() == 0, "files are not read for it"
