"""A loss, a model and a data set of one's own, from outside the package: a Python file, YAML files and --config-dir."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from kd.config.composition import CONF, options

MODULE = '''
"""Three plug-ins of kd."""

import math

import torch
from kd.data.images.base import DataModule
from kd.data.images.parts import Samples, Source
from kd.losses.base import Batch, Output, Term
from torch import Tensor, nn


class MyTerm(Term):
    """Mean squared distance of the logits, times ``scale``."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return self.scale * (student.logits - teacher.logits).square().mean()


def my_net(width: int, *, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    first = nn.Linear(math.prod(input_shape), width)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Linear(width, num_classes))


class MyData(DataModule):
    """Dark images and bright ones, ``images`` to train with and as many to test."""

    def __init__(self, *, images: int = 64, **common) -> None:
        super().__init__(**common)
        self.images, self.num_classes, self.input_shape = images, 2, (1, 4, 4)
        self.class_names = ["dark", "bright"]

    def load(self) -> Source:
        return Source(self.draw(seed=0), self.draw(seed=1))

    def draw(self, seed: int) -> Samples:
        targets = torch.arange(self.images) % 2
        noise = torch.randint(0, 100, (self.images, 1, 4, 4), generator=torch.Generator().manual_seed(seed))
        return Samples((noise + 150 * targets[:, None, None, None]).to(torch.uint8), targets)
'''
FILES = {
    "loss/mine.yaml": "mine:\n  _target_: mymodule.MyTerm\n  weight: 0.5\n  scale: 2.0\n",
    "model/mynet.yaml": "model:\n  _target_: mymodule.my_net\n  width: 8\n",
    "data/mydata.yaml": "defaults: [_base, _self_]\n_target_: mymodule.MyData\nimages: 96\nval_fraction: 0.25\n",
}
CHOICE = ["--config-dir", "myconf", "loss=[ce,mine]", "data=mydata", "model@student=mynet", "model@teacher=mynet"]
CHOICE += ["teacher.allow_random=true", "recipe.epochs=2", "hardware=cpu"]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A working directory with the module and its configuration files."""
    (tmp_path / "mymodule.py").write_text(MODULE)
    for name, text in FILES.items():
        (tmp_path / "myconf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "myconf" / name).write_text(text)
    return tmp_path


@pytest.fixture
def importable(outside: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, with the module on this process's path, and forgotten afterwards."""
    monkeypatch.syspath_prepend(outside)
    monkeypatch.delitem(sys.modules, "mymodule", raising=False)
    return outside


def test_a_term_a_model_and_a_data_set_from_outside_train(kd, importable) -> None:
    said = kd("train", *CHOICE, "teacher.model.width=16")
    assert said.code == 0, said.err
    (file,) = importable.rglob("result.json")
    result = json.loads(file.read_text())
    assert result["status"] == "finished"
    assert result["data"]["class_names"] == ["dark", "bright"]
    assert result["student"]["parameters"] == 16 * 8 + 8 + 8 * 2 + 2
    assert result["teacher"]["parameters"] == 16 * 16 + 16 + 16 * 2 + 2
    assert list(result["code_read"]) == ["mymodule.MyData", "mymodule.MyTerm", "mymodule.my_net"]
    assert all(re.fullmatch("[0-9a-f]{12}", code["mymodule"]) for code in result["code_read"].values())
    with open(file.parent / "metrics.csv", newline="") as lines:
        values = [float(row["train/mine"]) for row in csv.DictReader(lines) if row["train/mine"]]
    assert len(values) == 2  # one an epoch: its two batches are fewer than log_every
    assert all(value > 0 for value in values)
    assert values[-1] == pytest.approx(result["student"]["last"]["train"]["mine"])


def test_the_groups_from_outside_stand_beside_the_own_ones(kd, importable) -> None:
    losses = ", ".join(sorted([*options("loss", [CONF]), "mine"]))
    assert f"loss: {losses}\n" in kd("train", "--help", "--config-dir", "myconf").out


def test_the_methods_from_outside_stand_beside_the_own_ones(kd, importable) -> None:
    table = kd("methods", "--config-dir", "myconf").out.splitlines()
    assert [line.split()[0] for line in table] == ["name", *sorted([*options("loss", [CONF]), "mine"])]
    assert next(line for line in table if line.startswith("mine")).split() == ["mine", "logits", "0.5", "-", "no"]
    page = kd("methods", "mine", "--config-dir", "myconf").out
    assert "mymodule.MyTerm" in page
    assert "scale: 2.0" in page
    assert "mymodule" not in sys.modules


TYPOS = [
    ("loss/mine.yaml", "scale:", "scael:", "loss.mine.scael", "scale"),
    ("loss/mine.yaml", "weight:", "wieght:", "loss.mine.wieght", "weight"),
    ("loss/mine.yaml", "MyTerm", "MyTrem", "loss.mine._target_", "MyTerm"),
    ("model/mynet.yaml", "width:", "widht:", "student.model.widht", "width"),
    ("data/mydata.yaml", "images:", "imagse:", "data.imagse", "images"),
    ("data/mydata.yaml", "val_fraction:", "val_fractoin:", "data.val_fractoin", "val_fraction"),
]


@pytest.mark.parametrize(("file", "right", "wrong", "key", "near"), TYPOS, ids=[t[3] for t in TYPOS])
def test_a_typo_outside_names_key_and_near_key(kd, importable, file, right, wrong, key, near) -> None:
    path = importable / "myconf" / file
    path.write_text(path.read_text().replace(right, wrong))
    said = kd("train", *CHOICE)
    assert said.code == 1
    assert key in said.err
    assert f"(near: {near}" in said.err
    assert "Traceback" not in said.err
    assert not list(importable.rglob("result.json"))
    if near != "MyTerm":
        assert file in said.err


def test_an_unknown_option_outside_names_the_near_one(kd, importable) -> None:
    said = kd("train", "--config-dir", "myconf", "loss=[ce,mien]")
    assert said.code == 1
    assert "loss=mien does not exist (near: mine" in said.err


@pytest.mark.slow
def test_the_command_finds_a_module_of_the_working_directory(outside) -> None:
    command = Path(sysconfig.get_path("scripts")) / "kd"
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([command, "train", *CHOICE], cwd=outside, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = outside.rglob("result.json")
    assert json.loads(file.read_text())["status"] == "finished"
