"""Numbers mean one thing: float32, one set of logits, NaN named by its row, a teacher as it was at that moment."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from kd.config.compose import checked
from kd.distill.distiller import Distiller
from kd.distill.evaluation import NotFinite, measure
from kd.errors import KdError
from kd.losses.base import Batch, Output
from kd.models.mlp import mlp
from kd.records.record import config_hash, read_config
from kd.run import build, finish
from kd.tasks.classification import Classification

FAST = ["recipe.epochs=1", "hardware=cpu", "hydra.run.dir=run"]


def record(folder: Path = Path("run")) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def numbers(kd, *arguments: str) -> dict[str, Any]:
    said = kd("eval", *arguments, "out=out.json")
    assert said.code == 0, said.err
    return json.loads(Path("out.json").read_text())


def logged(column: str) -> list[float]:
    with open("run/metrics.csv", newline="") as lines:
        return [float(row[column]) for row in csv.DictReader(lines) if row[column]]


# ---------------------------------------------------------------------- one precision, one set of logits


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_record_predictions_and_kd_eval_say_the_same(kd, teacher_run, precision) -> None:
    """The predictions are kept without another point in the curves, and every metric is that of these logits."""
    told = [f"hardware.precision={precision}", "protocol.keep_predictions=true", f"teacher.checkpoint={teacher_run}"]
    said = kd("train", *FAST, *told, "loss=[ce,kd]")
    assert said.code == 0, said.err
    found = record()["student"]
    assert logged("val/acc1") == pytest.approx([found["last"]["val"]["acc1"]])  # the run's only epoch
    for split in ("val", "test"):
        kept = np.load(f"run/predictions_{split}.npz")
        logits, target = torch.from_numpy(kept["logits"]), torch.from_numpy(kept["target"])
        assert logits.dtype == torch.float32
        metrics = Classification().meter(10)
        metrics.add(logits, target)
        wanted = found["selected"][split]
        assert metrics.compute(False) == pytest.approx({k: wanted[k] for k in ("acc1", "acc5", "nll", "ece")}, rel=1e-6)
        assert numbers(kd, "run=run", f"split={split}")["metrics"] == pytest.approx(wanted, rel=1e-5)
    assert found["selected"]["test_per_class"] == pytest.approx(metrics.per_class())
    if precision == "bf16-mixed":  # measured without autocast: few logits are numbers of bfloat16
        assert (logits != logits.bfloat16().float()).float().mean() > 0.9


# ---------------------------------------------------------------------- NaN and infinity


def spoilt(
    hidden: list[int], total: float, value: float = float("nan"), *, num_classes: int, input_shape: Any, **_: Any
):
    """An MLP that answers ``value`` to the images with this sum of pixels when it is measured."""
    net = mlp(hidden, num_classes=num_classes, input_shape=input_shape)

    def spoil(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        if module.training or len(logits) < 3:  # so small is the dry batch
            return logits
        return torch.where((inputs[0].sum((1, 2, 3)) - total).abs().unsqueeze(1) < 1e-4, value, logits)

    net.register_forward_hook(spoil)
    return net


def one_image(split: str) -> tuple[int, float]:
    """Index and sum of pixels of an image that no other of val and test has."""
    data = build.datamodule(checked(["hardware=cpu"]))
    batches = {name: next(iter(getattr(data, f"{name}_dataloader")())) for name in ("val", "test")}
    sums = {name: batch.inputs.sum((1, 2, 3)) for name, batch in batches.items()}
    every = torch.cat(list(sums.values()))
    row = next(i for i, s in enumerate(sums[split]) if ((every - s).abs() < 1e-3).sum() == 1)
    return int(batches[split].index[row]), float(sums[split][row])


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_prediction_that_is_no_number_names_network_split_and_row(kd, who, split) -> None:
    index, total = one_image(split)
    value = "inf" if split == "val" else "nan"
    node = f"{{_target_:tests.test_measured.spoilt,total:{total},value:{value},hidden:[8]}}"
    group = [f"model@{who}=none", f"{who}.model={node}", *(["model@teacher=mlp"] if who == "student" else [])]
    said = kd("train", *FAST, *group, "teacher.allow_random=true", "loss=[ce]")
    assert said.code == 1
    assert f"the answer of the {who} is not finite for 1 row of {split} (NaN or infinity; index {index})" in said.err
    assert "Traceback" not in said.err
    assert record()["status"] == "failed"
    if (who, split) == ("student", "val"):
        assert "after epoch 1; last good checkpoint: none yet" in said.err


def test_kd_eval_names_the_row(kd, tmp_path, teacher_run) -> None:
    index, total = one_image("test")
    shutil.copytree(teacher_run, "run")
    own = (tmp_path / "run" / "config.yaml").read_text()
    changed = f"_target_: tests.test_measured.spoilt\n    total: {total}\n"
    (tmp_path / "run" / "config.yaml").write_text(own.replace("_target_: kd.models.mlp.mlp\n", changed))
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    found["config_hash"] = config_hash(read_config("run"))  # as if the run had begun with it
    (tmp_path / "run" / "result.json").write_text(json.dumps(found))
    said = kd("eval", "run=run")
    assert said.code == 1
    for word in ("the student (run/student.safetensors)", "of test", f"index {index}"):
        assert word in said.err


def test_the_lowest_index_of_all_batches_is_kept() -> None:
    finite = NotFinite()
    logits = torch.zeros(3, 4)
    finite.update(logits, torch.tensor([5, 1, 2]))
    finite.check("the student", "test")
    for bad, index in ((-torch.inf, 7), (torch.nan, 3), (torch.inf, 9)):
        logits[1, 2] = bad
        finite.update(logits, torch.tensor([8, index, 0]))
    assert finite.compute() == (3, 3)


def test_measuring_outside_of_a_trainer_names_student_and_teacher() -> None:
    batch = Batch(torch.zeros(2, 1), torch.tensor([0, 1]), torch.tensor([4, 6]))
    good, bad = torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, torch.nan]])
    for network, teacher, who in ((bad, good, "the student"), (good, bad, "the teacher")):
        answers = (lambda b, n=network: Output(n)), [batch], torch.device("cpu"), (lambda b, t=teacher: Output(t))
        with pytest.raises(KdError, match=rf"{who} is not finite for 1 row of val \(NaN or infinity; index 6\)"):
            measure(Classification(), 2, *answers, split="val")


# ---------------------------------------------------------------------- a teacher that does not stay what it was


class Mutual(Distiller):
    """Trains the network in the teacher's place along, on the labels."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        assert self.teacher is not None
        self.teacher.requires_grad_(True)

    def trainable(self) -> list[nn.Parameter]:
        assert self.teacher is not None
        return [*super().trainable(), *self.teacher.parameters()]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert self.teacher is not None
        return super().training_step(batch, batch_idx) + F.cross_entropy(self.teacher.root(batch.inputs), batch.targets)


class Drifting(Distiller):
    """Moves the teacher after each epoch, without a gradient, as a moving average does."""

    def on_train_epoch_end(self) -> None:
        assert self.teacher is not None
        for p in self.teacher.parameters():
            p.data.mul_(1.1)


MUTUAL = ["distiller._target_=tests.test_measured.Mutual", "loss=[ce,kd]"]
RANDOM = ["model@teacher=mlp", "teacher.allow_random=true"]


def alone(state: dict[str, Tensor], prefix: str = "") -> nn.Module:
    net = mlp([32, 32], num_classes=10, input_shape=(1, 8, 8)).eval()
    net.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return net


def answering(network: nn.Module) -> Callable[[Batch], Output]:
    return lambda batch: Output(network(batch.inputs))


def test_a_network_trained_in_the_teachers_place(kd, monkeypatch) -> None:
    """It is measured as it was at the end, kept for a resume, and never measured as if it were loaded."""
    told = [*MUTUAL, *RANDOM, "recipe.epochs=3", "hardware=cpu", "hardware.threads=1", "protocol.monitor=val/kl"]
    whole = kd("train", *told, "hydra.run.dir=run")
    assert whole.code == 0, whole.err
    assert "teacher, before it is trained along: val/acc1" in whole.out
    found = record()
    last = torch.load("run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    teacher, student = alone(last, "teacher.networks.0."), alone(load_file("run/student_last.safetensors"))
    data = build.datamodule(checked(["hardware=cpu"]))
    loaders = {"val": data.val_dataloader(), "test": data.test_dataloader()}
    for split, loader in loaders.items():
        arguments = (Classification(), 10, answering(teacher), loader, torch.device("cpu"))
        assert found["teacher"][split] == pytest.approx(measure(*arguments)[0], rel=1e-5)
        arguments = (Classification(), 10, answering(student), loader, torch.device("cpu"), answering(teacher))
        beside, _ = measure(*arguments)
        assert found["student"]["last"][split] == pytest.approx(beside, rel=1e-5)
    assert found["teacher"]["weights"] == "trained along, not kept"
    selected = found["student"]["selected"]
    assert selected["epoch"] < 2  # the teacher of that epoch is gone
    assert set(selected["val"]) - set(selected["test"]) == {"agreement", "kl"}
    said = kd("eval", "run=run", "who=teacher")
    assert said.code == 1
    assert "the teacher of run was trained along with the student and was not kept" in said.err
    again = numbers(kd, "run=run", "weights=last")
    assert "agreement" not in again["metrics"]
    assert "was not kept" in again["without"]
    assert again["metrics"] == pytest.approx({k: beside[k] for k in ("acc1", "acc5", "nll", "ece")}, rel=1e-5)
    with monkeypatch.context() as patched:
        patched.setattr(finish, "close", lambda *a: 1 / 0)  # the run fails after its last epoch
        with pytest.raises(ZeroDivisionError):
            kd("train", *told, "hydra.run.dir=other")
    resumed = kd("train", "resume=other")
    assert resumed.code == 0, resumed.err
    assert record(Path("other"))["teacher"]["val"] == found["teacher"]["val"]
    assert record(Path("other"))["teacher"]["test"] == found["teacher"]["test"]


@pytest.mark.parametrize("distiller", ["Mutual", "Drifting"])
def test_a_loaded_teacher_that_the_run_changed_is_not_measured_as_loaded(kd, teacher_run, distiller) -> None:
    told = [
        f"distiller._target_=tests.test_measured.{distiller}",
        "recipe.epochs=2",
        f"teacher.checkpoint={teacher_run}",
        "loss=[ce,kd]",
    ]
    assert kd("train", *FAST, *told).code == 0
    found, before = record()["teacher"], record(teacher_run)["student"]["selected"]
    assert found["weights"] == "trained along, not kept"
    assert found["val"]["nll"] != pytest.approx(before["val"]["nll"], rel=1e-3)
    assert kd("eval", "run=run", "who=teacher").code == 1
    assert "agreement" not in numbers(kd, "run=run")["metrics"]
    other = numbers(kd, "run=run", "who=teacher", "teacher.checkpoint=[" + str(teacher_run) + "]")
    assert other["metrics"] == pytest.approx(before["test"], rel=1e-5)  # one that the user names is


def test_a_frozen_teacher_is_called_so(kd, teacher_run) -> None:
    assert kd("train", *FAST, f"teacher.checkpoint={teacher_run}", "loss=[ce,kd]").code == 0
    assert record()["teacher"]["weights"] == "selected", "not trained along"
    state = torch.load("run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert not any(name.startswith("teacher.") for name in state)
    assert "agreement" in numbers(kd, "run=run")["metrics"]


def test_a_random_teacher_is_not_measured_again(kd) -> None:
    assert kd("train", *FAST, *RANDOM, "loss=[ce,kd]").code == 0
    said = kd("eval", "run=run", "who=teacher")
    assert said.code == 1
    assert "the teacher has random weights, which were not kept" in said.err
    torch.manual_seed(11)  # of another process, which draws other weights
    assert "agreement" not in numbers(kd, "run=run")["metrics"]


# ---------------------------------------------------------------------- what a distiller and data must be


class Manual(Distiller):
    """Steps its optimiser itself."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.automatic_optimization = False


@pytest.mark.parametrize("setting", ["recipe.gradient_clip=0.5", "recipe.accumulate=2"])
def test_clipping_and_accumulation_with_manual_optimisation(kd, setting) -> None:
    said = kd("train", *FAST, "distiller._target_=tests.test_measured.Manual", setting)
    assert said.code == 1
    assert f"{setting.replace('=', ' = ')} is not allowed with Manual" in said.err
    assert "Traceback" not in said.err + said.out
    assert not Path("run/metrics.csv").exists()
