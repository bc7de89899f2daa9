"""Mistakes in a call of kd.distill are one sentence in the words of Python; what the call leaves as it was."""

from __future__ import annotations

import functools
import json
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kd as api
from kd.config.compose import checked
from kd.errors import KdError, RunFailure
from kd.losses.base import Batch, Output, Term
from kd.models.mlp import mlp
from kd.run import build
from tests.test_api import blobs, distilled, loaders, network

distill = functools.partial(api.distill, epochs=1, accelerator="cpu", verbose=False)


class Squares(Term):
    """Mean squared difference of the logits and half the cross-entropy."""

    needs_labels = True

    def forward(self, student: Output, teacher: Output, batch: Batch) -> torch.Tensor:
        return squares(student, teacher, batch)


def squares(student: Output, teacher: Output, batch: Batch) -> torch.Tensor:
    labels = nn.functional.cross_entropy(student.logits, batch.targets)
    return (student.logits - teacher.logits).square().mean() + 0.5 * labels


def mapped(*keys: str) -> list[dict[str, torch.Tensor]]:
    points, targets = blobs(0, 12).tensors
    return [dict(zip(keys, (points, targets), strict=True))]


def moved(shift: int = 0, bad: bool = False) -> list[DataLoader]:
    """Loaders of labels that begin at ``shift``; ``bad``: of training inputs with one NaN."""
    found = []
    for split in range(3):
        points, targets = blobs(split).tensors
        if bad and split == 0:
            points[20, 1] = torch.nan
        found.append(DataLoader(TensorDataset(points, targets + shift), batch_size=16))
    return found


# ---------------------------------------------------------------------- one sentence


FACTORY = "it must be a function of the parameters, such as functools.partial(torch.optim.Adam, lr=0.01)"
ADAM = torch.optim.Adam(network().parameters())
SCHEDULE = torch.optim.lr_scheduler.StepLR(ADAM, 1)
OPTIONS: list[tuple[dict[str, Any], str]] = [
    (
        {"task": "text_classification"},
        "task = 'text_classification' is not allowed: it must be an object of a class of kd",
    ),
    ({"optimizer": ADAM}, f"optimizer = an object of Adam is not allowed: {FACTORY}"),
    ({"optimizer": "adam"}, f"optimizer = 'adam' is not allowed: {FACTORY}"),
    ({"scheduler": SCHEDULE}, "scheduler = an object of StepLR is not allowed: it must be a function of the optimiser"),
    ({"loss": {"mine": Squares}}, "loss.mine is the class Squares: give an object of it, Squares()"),
    ({"monitor": "val/x"}, "monitor = val/x is not measured"),
    ({"teacher": None, "loss": {"kd": 1}}, "loss.kd needs a teacher: give a teacher, or leave the term out of loss"),
    ({"teacher": "nowhere"}, "nowhere does not exist: give a run directory"),
    ({"teacher": 3}, "teacher = 3 is not allowed: it must be a torch module, a run directory, or None"),
    ({"student": "resnet8"}, "student = 'resnet8' is not allowed: it must be a torch module"),
    ({"train": blobs(0)}, "train is a Dataset: wrap it in a torch.utils.data.DataLoader(train, batch_size=64)"),
    ({"val": None}, "val = None is not allowed: it must be a loader of batches"),
    ({"test": None, "run_dir": "run"}, "test = None is not allowed with a run_dir"),
    ({"train": moved(1)[0]}, "the labels go to 3, the student has 3 outputs (0 … 2)"),
    (
        {"train": mapped("x", "y")},
        "loss.ce needs labels, the training data has none: its batches have the entries x, y, and labels are labels or "
        "label or targets or target",
    ),
]


@pytest.mark.parametrize(("options", "said"), OPTIONS, ids=[said[:40] for _, said in OPTIONS])
def test_a_mistake_is_one_sentence(options: dict[str, Any], said: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    train, val, test = loaders()
    given = {"student": network(), "teacher": network(9), "train": train, "val": val, "test": test, **options}
    with pytest.raises(KdError) as caught:
        distill(**given)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_student_as_its_own_teacher_is_refused() -> None:
    both = network()
    with pytest.raises(KdError, match="student and teacher are the same object"):
        distilled(both, both)
    with pytest.raises(KdError, match="student and teacher are the same object"):
        distilled(both, api.Teacher([both]))


def test_a_run_directory_that_is_taken_is_named_as_in_python(tmp_path) -> None:
    distilled(network(), None, epochs=1, run_dir=tmp_path / "run", verbose=False)
    with pytest.raises(KdError, match=r"holds a run already: choose another run_dir$"):
        distilled(network(), None, epochs=1, run_dir=tmp_path / "run")
    with pytest.raises(KdError, match="does not say which network it belongs to: give the network"):
        distilled(network(), tmp_path / "run", epochs=1)


def test_inputs_that_are_not_finite_are_said() -> None:
    with pytest.raises(
        RunFailure, match=r"epoch 1: the inputs themselves are not finite \(NaN or infinity, in batch 2"
    ):
        distill(network(), None, *moved(bad=True))
    train, bad, _ = loaders()[0], moved(bad=True)[0], None
    with pytest.raises(RunFailure, match=r"teacher is not finite for 1 row of val .*index 20\): the inputs themselves"):
        distill(network(), network(9), train, bad, loaders()[2])
    with pytest.raises(
        RunFailure, match=r"student is not finite for 1 row of val .* the inputs themselves .* epoch 1; "
    ):
        distill(network(), None, train, bad, loaders()[2])


def test_a_loss_that_is_not_finite_by_itself_names_arguments_of_python() -> None:
    nan = {"mine": lambda student, teacher, batch: student.logits.sum() * torch.nan}
    with pytest.raises(RunFailure, match=r"\(a lower lr of the optimizer or gradient_clip may help\)"):
        distill(network(), None, *loaders(), loss=nan)


# ---------------------------------------------------------------------- what is accepted


def test_a_plain_function_is_a_term() -> None:
    found = []
    for loss in (squares, Squares(), {"term": squares, "weight": 1.0}):
        torch.manual_seed(0)
        student, teacher = network(), network(9)
        found.append(distill(student, teacher, *loaders(), loss={"mine": loss}))
    assert found[0].history == found[1].history == found[2].history
    assert found[0].record["config_hash"]


def test_a_run_directory_teaches(teacher_run) -> None:
    """The teacher is measured as it was in its own run."""
    data = build.datamodule(checked(["hardware=cpu"]))
    sets = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    student = mlp([8], num_classes=10, input_shape=(1, 8, 8))
    result = distill(student, teacher_run, *sets)
    own = json.loads((teacher_run / "result.json").read_text())["student"]
    assert result.record["teacher"]["checkpoint"] == str(teacher_run)
    assert result.record["teacher"]["test"] == own["selected"]["test"]
    assert result.record["teacher"]["weights"] == "selected"


def test_without_a_test_set_there_are_no_test_metrics() -> None:
    train, val, test = loaders()
    torch.manual_seed(0)
    without = distill(network(), network(9), train, val)
    torch.manual_seed(0)
    beside = distill(network(), network(9), train, val, test)
    assert without.metrics == {}
    assert without.record["student"]["selected"]["val"] == beside.record["student"]["selected"]["val"]
    assert "test" not in without.record["teacher"]
    assert without.record["data"]["sizes"]["test"] == 0
    assert "test" not in without.summary


# ---------------------------------------------------------------------- what is printed, what is left


def test_it_prints_what_kd_train_prints_and_writes_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    distilled(network(), network(9))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("distill: student 51 parameters, teacher 75 parameters; loss 0.1 × ce + 0.9 × kd")
    assert [line[:9] for line in said if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert said[-1].startswith("retention")
    distill(network(), None, *loaders())
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_two_splits_of_one_set_are_said(capsys) -> None:
    train, _, test = loaders()
    distill(network(), None, train, DataLoader(train.dataset, batch_size=48), test)
    said = capsys.readouterr().out
    assert said == "val and train are one data set: the epoch is picked by what the student was trained on\n"
    distill(network(), None, train, test, test)
    assert capsys.readouterr().out == "test and val are one data set: its metrics are of what picked the epoch\n"


def test_the_teacher_is_left_as_it_was() -> None:
    teacher = nn.Sequential(network(5), nn.Dropout(0.5))
    teacher[0][0].requires_grad_(False)
    teacher[1].eval()
    modes = [module.training for module in teacher.modules()]
    wanted = [p.requires_grad for p in teacher.parameters()]
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    distill(network(), teacher, *loaders())
    assert [module.training for module in teacher.modules()] == modes
    assert [p.requires_grad for p in teacher.parameters()] == wanted
    assert sorted(map(str, modes)) == ["False", "True", "True", "True", "True", "True"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    with pytest.raises(RunFailure):
        distill(network(), teacher, *moved(bad=True))
    assert [p.requires_grad for p in teacher.parameters()] == wanted


@pytest.mark.filterwarnings("ignore")  # what a plain trainer says about itself
def test_a_plain_trainer_leaves_its_teacher_frozen() -> None:
    teacher = network(9).train()
    module = api.Distiller(network(), teacher, api.Objective({"mine": Squares()}))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet).fit(module, *loaders()[:2])
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
