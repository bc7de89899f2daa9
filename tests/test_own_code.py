"""Errors in a term or a data module of the user's own: one sentence that names it and the line, the rest in the log."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from kd.errors import KdError, framed
from kd.records.weight_files import locate
from kd.run import build, compatibility
from tests.test_api import distilled, network

MODULE = """
import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset
from kd.losses.base import Term


class Early(Term):
    def forward(self, student, teacher, batch):
        return nothing.mean()


class Late(Term):
    calls = 0

    def forward(self, student, teacher, batch):
        self.calls += 1
        return student.logits.mean() if self.calls < 3 else {}["late"]


def function(student, teacher, batch):
    return student.logits.mean()


class Data(lightning.LightningDataModule):
    num_classes = 3

    def __init__(self, where="nowhere"):
        super().__init__()
        self.where = where
        if where == "init":
            missing()

    def setup(self, stage):
        if self.where == "setup":
            missing()

    def train_dataloader(self):
        return map(self.item, range(3))

    val_dataloader = test_dataloader = train_dataloader

    def item(self, number):
        if self.where == "item" and number:
            missing()
        return torch.randn(8, 4), torch.arange(8) % 3
"""
LINES = {text.strip(): number for number, text in enumerate(MODULE.splitlines(), 1) if text.strip()}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that find terms and a data module of a module outside of the package."""
    (tmp_path / "own_code.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_code", raising=False)
    files = {"loss/early": "early: {_target_: own_code.Early}", "loss/late": "late: {_target_: own_code.Late}"}
    for name, text in (files | {"data/own": "_target_: own_code.Data"}).items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / f"{name}.yaml").write_text(text)
    return ["--config-dir", "conf", "recipe.epochs=1", "hardware=cpu", "hydra.run.dir=run"]


LAST = 'return student.logits.mean() if self.calls < 3 else {}["late"]'
EARLY = f"NameError: name 'nothing' is not defined (own_code.py:{LINES['return nothing.mean()']})"
LATE = f"KeyError: 'late' (own_code.py:{LINES[LAST]})"


@pytest.mark.parametrize(("term", "error"), [("early", EARLY), ("late", LATE)])
def test_an_error_in_a_term_is_one_sentence(kd, own, term, error, monkeypatch) -> None:
    said = kd("train", *own, f"loss=[ce,{term}]", "model@teacher=mlp", "teacher.allow_random=true")
    assert said.code == 1
    assert said.err == f"kd: in loss.{term}: {error}\n"
    assert "Traceback" in Path("run/train.log").read_text()
    assert f"the traceback is in {Path('run').resolve() / 'train.log'}" in said.out
    record = json.loads(Path("run/result.json").read_text())
    assert (record["failure"], record["error"]) == ("unexpected", f"in loss.{term}: {error}")
    with pytest.raises(KdError, match=rf"holds no weights: .* in it; that run failed: in loss.{term}: "):
        locate("run")
    monkeypatch.setenv("KD_TRACEBACK", "1")
    with pytest.raises(KdError) as caught:
        kd("train", *own, f"loss=[ce,{term}]", "model@teacher=mlp", "teacher.allow_random=true", "hydra.run.dir=more")
    assert isinstance(caught.value.__cause__, (NameError, KeyError))


MISSING = [number for number, text in enumerate(MODULE.splitlines(), 1) if text.strip() == "missing()"]


@pytest.mark.parametrize(("where", "named"), [("init", "data"), ("setup", None), ("item", None)])
def test_an_error_in_a_data_module_is_one_sentence(kd, own, where, named) -> None:
    net = "student.model={_target_: torch.nn.Linear, in_features: 4, out_features: 3}"
    said = kd("train", *own, "data=own", f"data.where={where}", "model@student=none", net)
    line = MISSING[["init", "setup", "item"].index(where)]
    place = named or "data._target_ = own_code.Data"
    assert said.err == f"kd: in {place}: NameError: name 'missing' is not defined (own_code.py:{line})\n"
    assert said.code == 1


def test_a_function_in_the_place_of_a_term_says_what_must_be_there(own) -> None:
    node = {"_target_": "own_code.function", "weight": 1}
    with pytest.raises(KdError) as caught:
        build.objective({"loss": {"mine": node}})
    assert str(caught.value) == (
        "loss.mine._target_ = own_code.function is a function of student, teacher, batch, and no term: it must be a "
        "kd.losses.base.Term, a class with forward(student, teacher, batch) -> scalar"
    )
    with pytest.raises(KdError, match="is a Linear, and no term: it must be"):
        build.objective({"loss": {"mine": {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}}})


def test_an_error_of_a_worker_is_its_last_line() -> None:
    text = 'Caught KeyError in DataLoader worker process 0.\nTraceback:\n  File "/home/me/mine.py", line 7, in item\n'
    error = framed("the loader", RuntimeError(text + "RuntimeError: no such image"))
    assert str(error) == "in the loader: RuntimeError: no such image (mine.py:7)"
    assert error.kind == "unexpected"


def test_a_batch_of_more_than_the_training_set_is_said(caplog) -> None:
    result = distilled(network(), None, epochs=1, verbose=False)
    assert result.record["data"]["sizes"]["train"] == 48
    data = type("Data", (), {"sizes": {"train": 48, "val": 3, "test": 3}, "drop_last": False})()
    module = type("Module", (), {"student": torch.nn.Linear(4, 3)})()
    with caplog.at_level(logging.WARNING, logger="kd"):
        compatibility._last_batch(module, data, 48)
        assert caplog.text == ""
        compatibility._last_batch(module, data, 100)
    assert "recipe.batch_size = 100 is more than the 48 training samples: an epoch is one step" in caplog.text
