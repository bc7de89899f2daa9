"""Ten kinds of tasks, terms and set-ups from outside the package, each trained, killed and resumed, swept, reported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kd.distill.distiller import Distiller

pytestmark = pytest.mark.slow

TOYS = Path(__file__).parent / "toys"
COMMON = ["--config-dir", str(TOYS / "conf"), "recipe.epochs=4", "recipe.batch_size=8", "hardware=cpu"]
COMMON += ["recipe.optimizer.lr=0.05"]
BLOBS = "data=blobs model@student=points"
TAUGHT = "model@teacher=points teacher.model.width=9 teacher.allow_random=true"


def no_metrics_of_the_teacher(record: dict[str, Any], run: Path) -> None:
    assert "val" not in record["teacher"]
    assert "agreement" not in record["student"]["selected"]["test"]


def selected_by_the_least(record: dict[str, Any], run: Path) -> None:
    assert (record["protocol"]["monitor"], record["protocol"]["mode"]) == ("val/mse", "min")
    with open(run / "metrics.csv") as lines:
        head, *rows = [line.rstrip("\n").split(",") for line in lines]
    errors = [float(row[head.index("val/mse")]) for row in rows if row[head.index("val/mse")]]
    assert record["student"]["selected"]["epoch"] == errors.index(min(errors))
    assert "acc1" not in json.dumps(record)


def of_supervised_positions(record: dict[str, Any], run: Path) -> None:
    test = record["student"]["selected"]["test"]
    assert set(test) == {"loss", "alike"}
    assert test["loss"] < 2.3  # below ln 11: each token is the one before it plus one


def bank_is_full(record: dict[str, Any], run: Path) -> None:
    kept = load_file(run / "terms.safetensors")
    assert kept["bank.features"].shape == (48, 6)
    assert (kept["bank.features"] != 0).any(1).all()
    assert kept["bank.targets"].tolist() == [i % 3 for i in range(48)]


def peer_is_kept(record: dict[str, Any], run: Path) -> None:
    assert record["student"]["parameters"] == 4 * 6 + 6 + 6 * 3 + 3
    assert load_file(run / "peer.safetensors")["0.weight"].shape == (7, 4)
    assert {"ce", "peer/kd", "loss", "acc1"} <= set(record["student"]["last"]["train"])


def head_is_deployed(record: dict[str, Any], run: Path) -> None:
    state = load_file(run / "student.safetensors")
    assert {tuple(v.shape) for k, v in state.items() if k.startswith("2.")} == {
        (3, 9),
        (3,),
    }  # the teacher's classifier
    assert record["student"]["parameters"] == 4 * 6 + 6 + 6 * 9 + 9 + 9 * 3 + 3
    assert record["student"]["adapter_parameters"] == 0
    assert record["student"]["selected"]["test"]["agreement"] > 0.4


def nothing_more(record: dict[str, Any], run: Path) -> None:
    assert record["student"]["selected"]["test"]


CASES: dict[str, tuple[str, Callable[[dict[str, Any], Path], None]]] = {
    "regression": (
        "data=plane task=regression model@student=points student.model.inputs=3 student.model.outputs=1 "
        "model@teacher=points teacher.model.inputs=3 teacher.model.outputs=1 teacher.allow_random=true "
        "loss=[squared,imitate] loss.imitate.weight=0.1",
        selected_by_the_least,
    ),
    "tokens": (
        "data=sentences task=nexttoken model@student=language model@teacher=language loss=[ce,kd] "
        "teacher.allow_random=true teacher.model.width=16 loss.kd.weight=0.1",
        of_supervised_positions,
    ),
    "dense": (
        "data=pixelmaps task=pixels model@student=maps model@teacher=maps teacher.model.width=8 "
        "teacher.allow_random=true loss=[ce,kd]",
        nothing_more,
    ),
    "memory bank": (f"{BLOBS} loss=[ce,bank]", bank_is_full),
    "mutual learning": (
        f"{BLOBS} distiller._target_=toys.Mutual networks.peer={{_target_:toys.points,width:7}} loss=[ce,kd] "
        "recipe.gradient_clip=1.0 recipe.accumulate=2",
        peer_is_kept,
    ),
    "headless teacher": (
        f"{BLOBS} model@teacher=headless teacher.allow_random=true loss=[ce,feature]",
        no_metrics_of_the_teacher,
    ),
    "top-k answers": (
        f"{BLOBS} {TAUGHT} teacher.answers={{_target_:toys.KeptTopK}} loss=[ce,kd] loss.kd.temperature=1",
        no_metrics_of_the_teacher,
    ),
    "reused classifier": (f"{BLOBS} {TAUGHT} loss=[reused]", head_is_deployed),
    "input gradient": (f"{BLOBS} {TAUGHT} loss=[ce,jacobian]", nothing_more),
    "two views, soft labels": (f"data=twoviews model@student=points {TAUGHT} loss=[ce,consistent]", nothing_more),
}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOYS)
    yield
    sys.modules.pop("toys", None)


def killed_in_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    begin = Distiller.on_train_epoch_start

    def interrupted(self: Distiller) -> None:
        if self.current_epoch == epoch:
            raise KeyboardInterrupt
        begin(self)

    monkeypatch.setattr(Distiller, "on_train_epoch_start", interrupted)


@pytest.mark.parametrize("name", CASES)
def test_a_run_its_resume_a_sweep_and_a_report(kd, tmp_path, name) -> None:
    words, check = CASES[name]
    overrides = words.split()
    said = kd("train", *COMMON, *overrides, "hydra.run.dir=whole")
    assert said.code == 0, said.err
    record = json.loads(Path("whole/result.json").read_text())
    assert record["status"] == "finished"
    check(record, Path("whole"))

    said = kd("eval", "whole", "out=measured.json")
    assert said.code == 0, said.err
    measured = json.loads(Path("measured.json").read_text())["metrics"]
    test = record["student"]["selected"]["test"]
    assert measured == pytest.approx({name: test[name] for name in measured}, rel=1e-5)
    assert record["metrics"][0]["name"] in measured

    with pytest.MonkeyPatch.context() as patched:
        killed_in_epoch(patched, 2)
        assert kd("train", *COMMON, *overrides, "hydra.run.dir=killed").code == 130
    said = kd("train", "resume=killed")
    assert said.code == 0, said.err
    for file in ("student.safetensors", "student_last.safetensors"):
        one, other = load_file(Path("whole") / file), load_file(Path("killed") / file)
        assert all(torch.equal(one[key], other[key]) for key in {*one, *other}), file
    resumed = json.loads(Path("killed/result.json").read_text())
    for part in ("last", "selected"):
        assert resumed["student"][part] == record["student"][part]

    said = kd("train", "-m", *COMMON, *overrides, "seed=0,1", "hydra.sweep.dir=sweep")
    assert said.code == 0, said.err
    assert len(list(Path("sweep").glob("*/result.json"))) == 2
    said = kd("report", "sweep")
    assert said.code == 0, said.err
    page = Path("sweep/report.html").read_text()
    assert record["metrics"][0]["title"] in page


def test_a_head_that_stays_is_in_checkpoints_and_no_other_run_takes_it_for_a_plain_student(kd, tmp_path) -> None:
    words, _ = CASES["reused classifier"]
    overrides = words.split()
    assert kd("train", *COMMON, *overrides, "hydra.run.dir=whole").code == 0
    with pytest.MonkeyPatch.context() as patched:
        killed_in_epoch(patched, 1)
        assert kd("train", *COMMON, *overrides, "hydra.run.dir=killed").code == 130
    (Path("killed") / "student.safetensors").unlink()  # as if it was killed between the two writes
    said = kd("train", "resume=killed")
    assert said.code == 0, said.err
    one, other = (load_file(Path(run) / "student.safetensors") for run in ("whole", "killed"))
    assert all(torch.equal(one[key], other[key]) for key in {*one, *other})
    for file in ("student.safetensors", "checkpoints/last.ckpt"):
        said = kd("train", *COMMON, *BLOBS.split(), f"teacher.checkpoint=whole/{file}", "loss=[kd]", "hydra.run.dir=x")
        assert said.code == 1
        assert "keeps a head of loss.reused" in said.err
