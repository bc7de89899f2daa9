"""``kd train -m`` from the command line."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow

FAST = ["recipe.epochs=2", "hardware=cpu"]


def test_a_sweep_over_nothing_is_an_error(kd, tmp_path) -> None:
    for empty in ("seed=range(0,0)", "experiment=glob(nothing*)"):
        said = kd("train", "-m", empty)
        assert said.code == 1
        assert f"{empty} is a sweep over nothing" in said.err
    assert not list(tmp_path.iterdir())


def test_a_sweep_by_glob(kd, tmp_path) -> None:
    said = kd("train", "-m", "experiment=glob(digits_a*)", "recipe.epochs=1", "protocol.val_every=1", "hardware=cpu")
    assert said.code == 0, said.err
    (record,) = tmp_path.rglob("result.json")
    assert said.out.splitlines()[0] == f"sweep of 1 job in {record.parents[1]}: 0 finished, 1 to run"


def test_a_typo_in_a_sweep_stops_before_the_first_job(kd, tmp_path) -> None:
    said = kd("train", "-m", "loss=[ce],[ce,kdd]", "seed=0,1")
    assert said.code == 1
    assert "loss=kdd does not exist (near: kd, " in said.err
    assert not list(tmp_path.iterdir())


def test_a_sweep_runs_every_combination(kd, tmp_path, teacher_run) -> None:
    said = kd("train", "-m", "loss=[ce],[ce,kd]", "seed=0,1", f"teacher.checkpoint={teacher_run}", *FAST)
    assert said.code == 0, said.err
    results = [json.loads(f.read_text()) for f in sorted(tmp_path.rglob("result.json"))]
    assert len(results) == 4
    assert {(r["overrides"][0], r["seed"]) for r in results} == {
        (loss, seed) for loss in ("loss=[ce]", "loss=[ce,kd]") for seed in (0, 1)
    }


def test_a_failed_job_does_not_stop_a_sweep(kd, tmp_path) -> None:
    said = kd("train", "-m", "recipe.optimizer.lr=1e30,0.01", *FAST)
    assert said.code == 1
    assert "1 of 2 jobs have no result" in said.err
    status = {f.parent.name: json.loads(f.read_text())["status"] for f in tmp_path.rglob("result.json")}
    assert status == {"lr-1e+30": "failed", "lr-0.01": "finished"}
