"""Images that a table lists: csv with paths, Hugging Face datasets, rows from Python; and a user's own datasets."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kd.config.compose import checked
from kd.data.images.imagefolder import ImageFolder
from kd.data.images.table import ImageTable
from kd.data.text.early import refuse_files
from kd.data.torch_datasets import TorchDatasets
from kd.errors import KdError

COUNTS = {"train": {"cat": 8, "dog": 8}, "test": {"cat": 3, "dog": 3}}
SMALL = {"image_size": 16, "val_fraction": 0.25, "batch_size": 4, "num_workers": 0, "augment": {"flip": False}}


@pytest.fixture
def tables(image_folder: Callable[..., Path]) -> Path:
    """A folder of images, and beside it train.csv and test.csv that list them."""
    folder = image_folder(**COUNTS)
    for part, classes in COUNTS.items():
        lines = [f"{part}/{name}/{i:03}.png,{name}" for name, count in classes.items() for i in range(count)]
        (folder / f"{part}.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    return folder


def table(folder: Path, **more: Any) -> ImageTable:
    files = {"train": str(folder / "train.csv"), "test": str(folder / "test.csv")}
    return ImageTable(**{**files, **SMALL, **more})


def rows(data: Any, part: str) -> list[tuple[str, int]]:
    """Name and target of each image."""
    data.setup()
    there = data.parts[part]
    return [(there.content.name(i), t) for i, t in zip(there.index.tolist(), there.targets.tolist(), strict=True)]


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_table_is_what_the_folder_is(tables: Path, in_memory: bool) -> None:
    listed, folder = (
        table(tables, in_memory=in_memory),
        ImageFolder(folder=str(tables), in_memory=in_memory, **SMALL),
    )
    assert [t for _, t in rows(listed, "test")] == [t for _, t in rows(folder, "test")]
    assert listed.class_names == folder.class_names == ["cat", "dog"]
    ours, theirs = ([b.inputs for b in data.test_dataloader()] for data in (listed, folder))
    assert torch.equal(torch.cat(ours), torch.cat(theirs))
    assert {name for name, _ in rows(listed, "train")} | {name for name, _ in rows(listed, "val")} == {
        f"train/{name}/{i:03}.png" for name in ("cat", "dog") for i in range(8)
    }
    batch = next(iter(listed.train_dataloader()))
    assert batch.inputs.shape == (4, 3, 16, 16)


def test_a_row_that_is_added_moves_no_other(tables: Path) -> None:
    before = dict(rows(table(tables), "val"))
    lines = (tables / "train.csv").read_text().splitlines()
    Image.new("RGB", (20, 20)).save(tables / "new.png")
    (tables / "train.csv").write_text("\n".join([lines[0], "new.png,dog", *lines[1:]]) + "\n")
    after = dict(rows(table(tables), "val"))
    assert {k: v for k, v in after.items() if k != "new.png"} == before


def test_paths_below_the_root_and_several_tables(tables: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    for part in COUNTS:
        (tables / f"{part}.csv").rename(tmp_path / "lists" / f"{part}.csv")
    lists = {"train": ["lists/train.csv"], "test": "lists/test.csv"}
    found = ImageTable(**lists, **SMALL, root=str(tmp_path))
    with pytest.raises(KdError, match=r"16 of 16 images of .*train\.csv are not there: train/cat/000\.png"):
        found.setup()
    (tmp_path / "lists" / "more.csv").write_text("path,label\nset/test/cat/000.png,cat\n")
    lists = {"train": str(tmp_path / "lists" / "train.csv"), "test": ["lists/test.csv", "lists/more.csv"]}
    for part in COUNTS:  # below the root now
        (tables / part).rename(tmp_path / part)
    (tmp_path / "lists" / "more.csv").write_text("path,label\ntrain/cat/000.png,cat\n")
    with pytest.raises(KdError, match=r"1 images of test are in train as well, .*train/cat/000\.png"):
        ImageTable(**lists, **SMALL, root=str(tmp_path)).setup()


WRONG = {
    "column": (
        {"label": "lable"},
        r"data\.label = lable is no column of .*train\.csv \(near: label\): it has path, label",
    ),
    "image": ({"image": "file"}, r"data\.image = file is no column of .*train\.csv: it has path, label"),
    "no test": ({"test": None}, r"there is no test set: set data\.test, or cut it from train with data\.test_fraction"),
    "both": ({"test_fraction": 0.2}, r"data\.test_fraction = 0\.2 is not allowed: there is a test set"),
    "nothing": ({"train": None}, r"data\.train = null is not allowed: it must be a table"),
    "names": ({"label_names": ["dog", "cow"]}, r"train\.csv has a label that data\.label_names does not have: 'cat'"),
    "file": ({"train": "nowhere.csv"}, r"data\.train = nowhere\.csv: there is no such file"),
    "hub": ({"train": None, "test": None, "name": "owner/nothing"}, r"data\.name = owner/nothing cannot be loaded: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_a_sentence(tables: Path, name: str) -> None:
    changed, sentence = WRONG[name]
    with pytest.raises(KdError, match=sentence) as caught:
        table(tables, **changed).setup()
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_column_stops_before_torch(tables: Path) -> None:
    config = checked(["data=csv", f"data.train={tables / 'train.csv'}", f"data.test={tables / 'test.csv'}"])
    refuse_files(config["data"])
    with pytest.raises(KdError, match=r"data\.label = class is no column of .*train\.csv"):
        refuse_files({**config["data"], "label": "class"})


def test_labels_that_train_does_not_have(tables: Path) -> None:
    with (tables / "test.csv").open("a") as file:
        file.write("test/dog/000.png,cow\n")
    with pytest.raises(KdError, match=r"test\.csv has a label that train does not have: 'cow'"):
        table(tables).setup()
    (tables / "test.csv").write_text("path,label\ntest/dog/000.png,\n")
    with pytest.raises(KdError, match=r"test\.csv has 1 images without a label \(test/dog/000\.png\)"):
        table(tables).setup()


def test_images_that_are_missing_or_damaged(tables: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tables / "train" / "cat" / "002.png").unlink()
    with pytest.raises(KdError, match=r"1 of 16 images of .*train\.csv are not there: train/cat/002\.png"):
        table(tables).setup()
    (tables / "train" / "dog" / "001.png").write_bytes(b"no image")
    found = table(tables, skip_unreadable=True)
    found.setup()
    assert sum(found.sizes[part] for part in ("train", "val")) == 14
    assert "2 of 16 images" in caplog.text
    assert "train/cat/002.png, train/dog/001.png" in caplog.text


# ---------------------------------------------------------------------- Hugging Face


@pytest.fixture
def saved(tables: Path) -> Path:
    """The same images in a folder that datasets has saved, their bytes inside of it."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    splits = {}
    for part, classes in COUNTS.items():
        names = [(name, i) for name, count in classes.items() for i in range(count)]
        images = [{"bytes": (tables / part / n / f"{i:03}.png").read_bytes(), "path": None} for n, i in names]
        columns = {"image": images, "label": [list(classes).index(n) for n, _ in names]}
        splits[part] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(splits).save_to_disk(str(tables / "saved"))
    return tables / "saved"


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("given", ["name", "splits", "objects"])
def test_datasets_with_an_image_column(tables: Path, saved: Path, in_memory: bool, given: str) -> None:
    import datasets

    how: dict[str, Any] = {"name": {"name": str(saved)}}.get(given, {})
    if given == "splits":
        how = {part: {"name": str(saved), "split": part} for part in COUNTS}
    if given == "objects":
        how = {part: datasets.load_from_disk(str(saved))[part] for part in COUNTS}
    found = ImageTable(**how, image="image", in_memory=in_memory, **SMALL)
    found.setup()
    assert found.class_names == ["cat", "dog"]
    folder = ImageFolder(folder=str(tables), in_memory=in_memory, **SMALL)
    folder.setup()
    ours, theirs = (torch.cat([b.inputs for b in data.test_dataloader()]) for data in (found, folder))
    assert torch.equal(ours, theirs)
    assert found.sizes["train"] + found.sizes["val"] == 16
    assert next(iter(found.train_dataloader())).inputs.shape == (4, 3, 16, 16)


@pytest.mark.slow
def test_a_run_on_a_folder_of_datasets(kd: Any, saved: Path) -> None:
    arguments = ["data=hf", f"data.name={saved}", "data.image_size=16", "data.num_workers=1", "data.in_memory=false"]
    arguments += ["model@student=resnet8", "recipe.epochs=1", "recipe.batch_size=4", "data.val_fraction=0.25"]
    said = kd("train", *arguments, "hardware=cpu", "hydra.run.dir=run", "data.drop_last=true")
    assert said.code == 0, said.err
    record = json.loads(Path("run/result.json").read_text())
    assert record["data"]["class_names"] == ["cat", "dog"]
    assert record["data"]["sizes"]["test"] == 6


# ---------------------------------------------------------------------- datasets of torch

OWN = """
import torch

class Spots(torch.utils.data.Dataset):
    classes = ["dark", "light"]

    def __init__(self, count=24, names=True):
        self.targets = [i % 2 for i in range(count)]
        if not names:
            self.classes = None

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, row):
        noise = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(row))
        return noise + self.targets[row], self.targets[row]
"""


@pytest.fixture
def spots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "own_spots.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    import own_spots

    yield own_spots.Spots
    sys.modules.pop("own_spots")


def test_a_dataset_of_torch_is_cut_in_equal_shares(spots: Any) -> None:
    data = TorchDatasets(train=spots(), test_fraction=0.25, val_fraction=1 / 3, batch_size=4, seed=1)
    data.setup()
    rows = {split: [int(i) for _, _, i in part] for split, part in data.parts.items()}
    assert {split: len(found) for split, found in rows.items()} == {"test": 6, "val": 6, "train": 12}
    assert sorted(row for found in rows.values() for row in found) == list(range(24))
    assert all(sum(row % 2 for row in found) == len(found) // 2 for found in rows.values())
    assert (data.num_classes, data.class_names) == (2, ["dark", "light"])
    inputs, labels, index = next(iter(data.train_dataloader()))
    assert inputs.shape == (4, 1, 8, 8)
    assert torch.equal(labels, index % 2)
    again = TorchDatasets(train=spots(), test_fraction=0.25, val_fraction=1 / 3, seed=1)
    again.setup()
    assert torch.equal(again.parts["val"].index, data.parts["val"].index)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, r"data\.train = null is not allowed: it must be a dataset"),
        (
            {"train": [(1.0, 0)], "test_fraction": 0.2},
            r"data\.train, a list, gives a float as an input: it must be a ten",
        ),
        (
            {"train": [torch.zeros(3)], "test_fraction": 0.2},
            r"gives items of type Tensor: each must be \(input, label\)",
        ),
        ({"train": iter([1])}, r"data\.train is a list_iterator: it must be a map-style dataset"),
        ({"train": [(torch.zeros(3), 0)] * 9}, r"there is no test set: set data\.test"),
        ({"train": [], "test_fraction": 0.2}, r"data\.train, a list, is empty"),
    ],
)
def test_what_is_no_dataset_is_a_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KdError, match=sentence):
        TorchDatasets(**given).setup()


def test_a_run_on_a_dataset_of_torch(kd: Any, spots: Any) -> None:
    arguments = ["model@student=mlp", "recipe.epochs=1", "recipe.batch_size=4", "hardware=cpu", "hydra.run.dir=run"]
    said = kd("train", "data._target_=own_spots.Spots", *arguments)
    assert said.code == 1
    splits = ["data.train={_target_:own_spots.Spots}", "data.test={_target_:own_spots.Spots,count:6}"]
    said = kd("train", "data=torch_dataset", *splits, *arguments)
    assert said.code == 0, said.err
    record = json.loads(Path("run/result.json").read_text())
    assert record["data"]["sizes"] == {"train": 22, "val": 2, "test": 6, "labelled": 22}
    assert record["data"]["class_names"] == ["dark", "light"]
    said = kd("train", "data=torch_dataset", "data.train={_target_:own_spots.Spots,conut:3}", *arguments)
    assert "data.train.conut is not an argument of own_spots.Spots (near: count)" in said.err


def test_sets_of_the_hub_without_it(tmp_path: Path) -> None:
    """datasets would try for half a minute; what it has kept is under another name."""
    from kd.data.text.records import _in_cache

    assert not _in_cache("PolyAI/banking77", tmp_path / "nowhere")
    (tmp_path / "PolyAI___banking77").mkdir()
    (tmp_path / "rajpurkar___s_qu_ad").mkdir()
    assert _in_cache("PolyAI/banking77", tmp_path)
    assert _in_cache("rajpurkar/SQuAD", tmp_path)
    assert not _in_cache("owner/banking77", tmp_path)
