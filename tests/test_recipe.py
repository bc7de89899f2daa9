"""The recipe and the callbacks: length, warm-up, parameter groups, averages, validation by step, early stopping."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kd.config.compose import checked
from kd.distill.optimisation import WarmUp
from kd.errors import KdError
from kd.run.callbacks import WholeCheckpoints
from kd.run.optim import Groups, matches

TOYS = Path(__file__).parent / "toys"
COMMON = ["--config-dir", str(TOYS / "conf"), "data=blobs", "model@student=points", "recipe.batch_size=8"]
COMMON += ["hardware=cpu", "recipe.optimizer.lr=0.05", "hydra.run.dir=run"]  # six batches an epoch
STEPS = ["recipe.epochs=null", "recipe.steps=15", "recipe.scheduler.T_max=15", "recipe.scheduler_interval=step"]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(TOYS)
    yield
    sys.modules.pop("toys", None)


def trained(kd: Any, *overrides: str, where: str = "run") -> dict[str, Any]:
    said = kd("train", *COMMON[:-1], *overrides, f"hydra.run.dir={where}")
    assert said.code == 0, said.err
    return json.loads(Path(where, "result.json").read_text())


def curve(column: str, where: str = "run") -> list[float]:
    head, *rows = [line.split(",") for line in Path(where, "metrics.csv").read_text().splitlines()]
    place = head.index(column)
    return [float(row[place]) for row in rows if row[place]]


# ---------------------------------------------------------------------- what is refused before torch is there

WRONG = {
    "recipe.steps=5": "recipe.epochs = 30 and recipe.steps = 5 are not allowed together",
    "recipe.epochs=null recipe.scheduler=null": "recipe.epochs and recipe.steps have no value",
    "recipe.epochs=null recipe.steps=0 recipe.scheduler=null": "recipe.steps = 0 is not allowed: it must be a whole",
    "recipe.epochs=null recipe.steps=9": "recipe.scheduler.T_max has no value where the length is in steps",
    "recipe.warmup=31": "recipe.warmup = 31.0 is not allowed: it must be above 0, and at most recipe.epochs = 30",
    "recipe.warmup=0": "recipe.warmup = 0.0 is not allowed",
    "recipe.warmup=1 recipe.warmup_start=1": "recipe.warmup_start = 1.0 is not allowed",
    "recipe.warmup_start=0.1": "recipe.warmup_start = 0.1 needs recipe.warmup",
    "recipe.layer_decay=0": "recipe.layer_decay = 0.0 is not allowed: it must be a number above 0 and at most 1",
    "recipe.layer_decay=1.1": "recipe.layer_decay = 1.1 is not allowed",
    "recipe.no_decay=norms": "recipe.no_decay = norms is not allowed: it must be norm_and_bias or null",
    "recipe.ema={decay:1}": "recipe.ema.decay = 1 is not allowed: it must be a number, 0 or more and below 1",
    "recipe.ema={decay:0.9,warmpu:true}": "recipe.ema.warmpu is not a key of the average (near: warmup)",
    "recipe.ema=0.9": "recipe.ema = 0.9 is not allowed: it must be {decay: 0.999, warmup: true}",
    "recipe.groups=[{pattern:'*',lr:fast}]": "recipe.groups.0.lr = fast is not allowed",
    "recipe.groups=[{pattern:'*',weight_decy:1}]": "recipe.groups.0.weight_decy is not a key of a group (near: weight",
    "recipe.networks={peer:{}}": "recipe.networks.peer: there is no networks.peer",
    "protocol.val_every=5 protocol.val_every_steps=5": "protocol.val_every = 5 and protocol.val_every_steps = 5 are",
    "protocol.val_every_steps=0": "protocol.val_every_steps = 0 is not allowed: it must be a whole number, 1 or",
    "callbacks=[early_stopping] callbacks.early_stopping.patiense=3": "(near: patience",
    "callbacks.early_stopping.patience=3": "choose it with callbacks=[early_stopping]",
}


@pytest.mark.slow
@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_recipe_is_one_sentence(words: str) -> None:
    with pytest.raises(KdError) as caught:
        checked(words.split())
    said = str(caught.value)
    assert WRONG[words] in said
    assert len(said.splitlines()) == 1


# ---------------------------------------------------------------------- warm-up, length


def test_the_rise_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=7)
    for step in range(12):
        assert WarmUp(7, start=0.1).share(step, 7) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_steps_end_inside_an_epoch_with_warm_up_on_a_cosine(kd, tmp_path) -> None:
    """Two and a half epochs; the rate of each step by a second formula; means, validation and record of the end."""
    record = trained(kd, *STEPS, "recipe.warmup=4", "distiller.log_every=1", "protocol.val_every_steps=4")
    from math import cos, pi

    expected = [0.05 * min(1, t / 4) * (1 + cos(pi * t / 15)) / 2 for t in range(15)]
    assert curve("lr") == pytest.approx(expected, abs=1e-12)
    assert len(curve("val/acc1")) == 4  # after 4, 8, 12 and 15 steps
    last = record["student"]["last"]
    assert (last["epoch"], last["step"], record["protocol"]["steps"]) == (2, 15, 15)
    assert last["val"]["acc1"] == curve("val/acc1")[-1]
    assert last["train"]["loss"] == pytest.approx(sum(curve("train/loss")[-3:]) / 3, rel=1e-6)  # of three steps


class Stream:
    """A loader without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def test_a_stream_closes_its_epochs(kd, tmp_path, monkeypatch) -> None:
    import toys

    batches = toys.Blobs.train_dataloader
    monkeypatch.setattr(toys.Blobs, "train_dataloader", lambda self: Stream(batches(self)))
    streamed = trained(kd, *STEPS, where="stream")
    monkeypatch.setattr(toys.Blobs, "train_dataloader", batches)
    whole = trained(kd, *STEPS, where="whole")
    assert streamed["student"]["last"]["train"] == whole["student"]["last"]["train"]
    assert streamed["student"]["last"]["digest"] == whole["student"]["last"]["digest"]


def stopped_after(monkeypatch: pytest.MonkeyPatch, checkpoint: int) -> None:
    """Interrupt the run as soon as so many checkpoints are written."""
    save, written = WholeCheckpoints.save_checkpoint, []

    def then_stop(self: Any, *arguments: Any, **more: Any) -> None:
        save(self, *arguments, **more)
        written.append(1)
        if len(written) == checkpoint:
            raise KeyboardInterrupt

    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", then_stop)


AVERAGED = ["recipe.ema={decay:0.8}", "recipe.warmup=4", "recipe.optimizer.weight_decay=0.01"]
RESUMED = {
    "in the middle of an epoch": ([*STEPS, *AVERAGED, "protocol.val_every_steps=4"], 2),
    "at the end of the run": ([*STEPS, *AVERAGED, "protocol.val_every_steps=4"], 4),
    "between epochs, steps": ([*STEPS, *AVERAGED], 1),
    "between epochs": (["recipe.epochs=3", "recipe.warmup=1.5", "recipe.ema={decay:0.8}"], 1),
    "epochs, validated by step": (["recipe.epochs=3", "protocol.val_every_steps=5", "recipe.warmup=1"], 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_same_to_the_bit(kd, tmp_path, name) -> None:
    overrides, checkpoint = RESUMED[name]
    whole = trained(kd, *overrides, where="whole")
    with pytest.MonkeyPatch.context() as patched:
        stopped_after(patched, checkpoint)
        assert kd("train", *COMMON[:-1], *overrides, "hydra.run.dir=cut").code == 130
    said = kd("train", "resume=cut")
    assert said.code == 0, said.err
    for file in ("student.safetensors", "student_last.safetensors"):
        one, other = load_file(Path("whole", file)), load_file(Path("cut", file))
        assert all(torch.equal(one[key], other[key]) for key in {*one, *other}), file
    cut = json.loads(Path("cut/result.json").read_text())
    for part in ("last", "selected"):
        assert cut["student"][part] == whole["student"][part]
    if name != "at the end of the run":  # there the tests are logged one epoch earlier
        assert Path("cut/metrics.csv").read_text() == Path("whole/metrics.csv").read_text()


# ---------------------------------------------------------------------- parameter groups


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.table, self.norm = nn.Embedding(5, 4), nn.LayerNorm((2, 4))
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.extra = nn.Parameter(torch.zeros(2, 2))

    def no_weight_decay(self) -> set[str]:
        return {"extra"}


def count(groups: list[dict[str, Any]], **keys: float) -> int:
    return sum(p.numel() for g in groups for p in g["params"] if {k: v for k, v in g.items() if k != "params"} == keys)


def test_what_has_no_weight_decay() -> None:
    groups = Groups(no_decay=True)({"student": Small(), "objective": nn.Linear(3, 2)})
    assert count(groups) == 4 * 4 + 4 * 3 + 3 * 2
    assert count(groups, weight_decay=0.0) == 4 + 5 * 4 + 2 * 2 * 4 + 4 + 3 + 2 * 2 + 2


def test_the_rules_of_a_recipe_by_glob_and_regex() -> None:
    rules = [
        {"pattern": "head.*", "lr": "x10"},
        {"pattern": r"objective\..*", "lr": 0.5, "weight_decay": 0.25},
    ]
    groups = Groups(rules=rules, rates={"": 0.1})({"student": Small(), "objective": nn.Linear(3, 2)})
    assert count(groups, lr=1.0) == 4 * 3 + 3
    assert count(groups, lr=0.5, weight_decay=0.25) == 3 * 2 + 2
    assert matches("*.bias", "a.bias")
    assert not matches("*.bias", "bias.a")


def test_a_pattern_that_matches_nothing_says_near_names(kd) -> None:
    said = kd("train", *COMMON, "recipe.groups=[{pattern:'0.wieght',lr:x2}]")
    assert said.code == 1
    assert "recipe.groups.0.pattern = 0.wieght matches no trained parameter (near: 0.weight" in said.err


def test_layers_further_from_the_head_are_slower() -> None:
    import timm

    net = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2, embed_dim=12, num_heads=3, img_size=32)
    groups = Groups(layer_decay=0.5, rates={"": 0.1})({"student": net})
    sizes = {round(g.get("lr", 0.1), 9): sum(p.numel() for p in g["params"]) for g in groups}
    blocks = [sum(p.numel() for p in block.parameters()) for block in net.blocks]
    assert sizes[0.05] == blocks[1] + sum(p.numel() for p in net.norm.parameters())
    assert sizes[0.025] == blocks[0]
    assert sum(sizes.values()) == sum(p.numel() for p in net.parameters())


def test_a_run_with_groups_logs_the_rate_of_the_fastest(kd, tmp_path) -> None:
    said = kd("train", *COMMON, "recipe.epochs=1", "recipe.no_decay=norm_and_bias", "recipe.optimizer.weight_decay=0.1",
              "recipe.groups=[{pattern:'2.*',lr:x2}]")  # fmt: skip
    assert said.code == 0, said.err
    assert "parameter groups: " in said.out
    assert curve("lr")[0] == pytest.approx(0.1)


# ---------------------------------------------------------------------- the average


def test_the_average_is_that_of_a_second_implementation(kd, tmp_path, monkeypatch) -> None:
    from kd.distill.distiller import Distiller

    seen: list[dict[str, torch.Tensor]] = []
    step = Distiller.on_train_batch_end

    def remember(self: Distiller, *arguments: Any) -> None:
        seen.append({k: v.detach().double().clone() for k, v in self.student.state_dict().items()})
        step(self, *arguments)

    monkeypatch.setattr(Distiller, "on_train_batch_end", remember)
    record = trained(kd, "recipe.epochs=2", "recipe.ema={decay:0.7,warmup:true}")
    average = seen[0]
    for number, weights in enumerate(seen[1:], start=2):
        decay = min(0.7, 1 - number ** (-2 / 3))
        average = {k: decay * average[k] + (1 - decay) * weights[k] for k in weights}
    kept = load_file("run/student_last.safetensors")
    for key, value in kept.items():
        torch.testing.assert_close(value.double(), average[key], rtol=1e-5, atol=1e-6)
    raw = torch.load("run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(raw["student.0.weight"].double(), seen[-1]["0.weight"])
    from kd.run import weights as reading

    assert torch.equal(reading.read("run/checkpoints/last.ckpt")[0]["0.weight"], kept["0.weight"])
    assert record["student"]["parameters"] == 4 * 6 + 6 + 6 * 3 + 3
    assert record["student"]["adapter_parameters"] == 0


# ---------------------------------------------------------------------- several optimisers


def test_a_peer_with_a_recipe_of_its_own(kd, tmp_path) -> None:
    peer = ["distiller._target_=toys.Mutual", "networks.peer={_target_:toys.points,width:7}", "loss=[ce,kd]"]
    own = "recipe.networks={peer:{optimizer:{_target_:torch.optim.SGD,lr:0.2},scheduler:null}}"
    trained(kd, *peer, own, *STEPS, "recipe.warmup=3", "distiller.log_every=1")
    assert curve("lr/peer")[3:] == [0.2] * 12
    assert curve("lr")[5] < curve("lr")[3] == pytest.approx(0.05 * (1 + torch.cos(torch.tensor(torch.pi / 5))) / 2)
    said = kd("train", *COMMON[:-1], *peer[1:2], own, "hydra.run.dir=other")
    assert "recipe.networks.peer is not allowed: this distiller gives an optimiser of its own to no network" in said.err


# ---------------------------------------------------------------------- callbacks

MINE = '''
from lightning.pytorch.callbacks import Callback


class Note(Callback):
    """Writes what Lightning's callbacks can see at the end of an epoch."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_epoch_end(self, trainer, module):
        with open(self.file, "a") as lines:
            print(*sorted(trainer.callback_metrics), file=lines)
'''


def test_callbacks_of_the_config_and_of_ones_own(kd, tmp_path, monkeypatch) -> None:
    (tmp_path / "mycallbacks.py").write_text(MINE)
    (tmp_path / "own/callbacks").mkdir(parents=True)
    (tmp_path / "own/callbacks/note.yaml").write_text("note:\n  _target_: mycallbacks.Note\n  file: seen.txt\n")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--config-dir", "own", "recipe.epochs=2", "hardware=cpu", "callbacks=[note,lr_monitor,early_stopping]"]
    said = kd("train", *arguments, "hydra.run.dir=run")
    assert said.code == 0, said.err
    assert "val/acc1" in Path("seen.txt").read_text().splitlines()[0]
    assert any(column.startswith("lr-") for column in Path("run/metrics.csv").read_text().splitlines()[0].split(","))
    said = kd("train", *arguments, "callbacks.early_stopping.monitor=val/acc2", "hydra.run.dir=other")
    assert "callbacks.early_stopping.monitor = val/acc2 is not measured (near: val/acc" in said.err


@pytest.mark.parametrize("monitor", ["val/acc1", "train/loss"])
def test_a_run_that_is_stopped_early_is_finished(kd, tmp_path, monitor) -> None:
    early = ["callbacks=[early_stopping]", f"callbacks.early_stopping.monitor={monitor}", "recipe.epochs=9"]
    early += ["callbacks.early_stopping.mode=max", "callbacks.early_stopping.patience=1"]
    early += ["callbacks.early_stopping.min_delta=2"]  # nothing is ever that much better
    record = trained(kd, *early)
    assert record["status"] == "finished"
    assert (record["stopped"]["epoch"], record["stopped"]["step"]) == (1, 12)
    assert monitor in record["stopped"]["why"]
    assert record["student"]["last"]["epoch"] == 1
    assert record["protocol"]["epochs"] == 9
    assert "is finished" in kd("train", "resume=run").err


def test_a_callback_that_changes_the_last_weights_is_measured(kd, tmp_path) -> None:
    swa = ["callbacks=[swa]", "callbacks.swa.swa_epoch_start=2", "recipe.epochs=5", "callbacks.swa.swa_lrs=0.3"]
    record = trained(kd, *swa)
    assert record["student"]["last"]["digest"] != record["student"]["selected"]["digest"]
