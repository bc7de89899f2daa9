"""Runs without a study: ordered and set off by validation, with test beside it, and a head that says what they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from kd.records import manifest, record
from kd.records.manifest import Job, Manifest
from kd.report import frame, sweep_summary
from kd.report.sources import gathered
from kd.report.tables import main_grid, measures, numbers
from kd.report.validation import by_validation, monitored, order

OUTCOMES = {"0.1": (0.90, 0.95), "0.3": (0.92, 0.91), "0.2": (0.91, 0.97)}  # learning rate → validation, test


def measured(run_dir: Path, val: dict[str, float], test: dict[str, float], monitor: str = "val/acc1") -> None:
    """Give a made-up run other numbers on validation than on test."""
    found = record.read(run_dir)
    for epoch in ("last", "selected"):
        found["student"][epoch]["val"] |= val
        found["student"][epoch]["test"] |= test
    mode = "min" if monitor.endswith("nll") else "max"
    found["protocol"] |= {"monitor": monitor, "mode": mode}
    record.write(run_dir, found)


@pytest.fixture
def sweep(write, tmp_path) -> Path:
    """Three learning rates with two seeds each: validation and test disagree on the best."""
    folder, jobs = tmp_path / "sweep", {}
    for lr, (val, test) in OUTCOMES.items():
        for seed in (0, 1):
            name = f"lr-{lr}_seed-{seed}"
            told = (f"recipe.optimizer.lr={lr}", f"seed={seed}", "recipe.epochs=20")
            jobs[name] = Job(name, f"lr={lr} seed={seed}", told)
            run_dir = write(folder / name, seed, test, teacher=0.975, overrides=list(told))
            measured(run_dir, {"acc1": val, "nll": val}, {"acc1": test, "nll": test})
    manifest.write(folder, Manifest("sweep", "sweep", jobs))
    return folder


def table_of(directory: Path) -> list[list[str]]:
    """The first table of a page in Markdown."""
    part = (directory / "report.md").read_text().split("\n## ")[1]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("|")]


def test_a_sweep_is_ordered_and_set_off_by_validation(kd, sweep) -> None:
    said = kd("report", "sweep")
    assert said.code == 0, said.err
    head, _, *rows = table_of(sweep)
    assert head[2:5] == [
        "validation top-1, % (val-selected)",
        "test top-1, % (val-selected)",
        "test top-1, % (last epoch)",
    ]
    assert [row[0] for row in rows] == ["**lr=0.3**", "lr=0.2", "lr=0.1"], "test would have said 0.2, 0.1, 0.3"
    assert [row[2].split(" ")[0].strip("*") for row in rows] == ["92.00", "91.00", "90.00"]
    assert [row[3].split(" ")[0].strip("*") for row in rows] == ["91.00", "97.00", "95.00"]
    text = (sweep / "report.md").read_text()
    assert "Bold: the row with the best validation top-1 (val-selected)." in text
    assert "Rows: best first, by the mean over seeds of the validation top-1 (val-selected)" in text
    assert {p.stem for p in (sweep / "figures").iterdir()} >= {"bars", "bars_test", "lines_1"}
    lines = [line for line in said.out.splitlines() if "lr=" in line]
    assert [line.split("│")[1].strip() for line in lines] == ["lr=0.3", "lr=0.2", "lr=0.1"]


def test_a_small_monitor_is_better_small(sweep) -> None:
    for run_dir in sweep.glob("lr-*"):
        found = record.read(run_dir)
        measured(run_dir, found["student"]["last"]["val"], found["student"]["last"]["test"], "val/nll")
    given = gathered([str(sweep)])
    assert list(given.study.rows) == ["lr=0.1", "lr=0.2", "lr=0.3"]
    shown = measures(given.study, given.frame)
    assert [m.column for m in shown[:3]] == ["selected/val/nll", "selected/test/nll", "last/test/nll"]
    assert "selected/test/acc1" in [m.column for m in shown]
    assert main_grid(given.study, numbers(given.study, given.frame), shown).strong == (0,)
    assert [figure.measure for figure in given.study.figures] == ["selected/val/nll"]


def test_runs_of_two_monitors_are_ordered_by_accuracy(sweep) -> None:
    run_dir = next(sweep.glob("lr-*"))
    measured(run_dir, {}, {}, "val/nll")
    given = gathered([str(sweep)])
    assert monitored(given.frame).column == "selected/val/acc1"
    without = given.frame.drop(columns=[c for c in given.frame if "/val/" in c])
    assert monitored(without).column == "selected/test/acc1"
    untold = by_validation(given.study, without)
    assert untold.measure == "selected/test/acc1"
    assert "no validation measure" in order(untold, without)


def test_a_search_is_ordered_by_its_first_objective(kd, sweep) -> None:
    manifest.write(sweep, replace(manifest.read(sweep), objectives=("latency_ms", "val/acc1")))
    for run_dir in sweep.glob("lr-*"):
        found = record.read(run_dir)
        found["student"]["latency_ms"] = {"0.1": 0.02, "0.3": 0.04, "0.2": 0.01}[run_dir.name[3:6]]
        record.write(run_dir, found)
    assert kd("report", "sweep").code == 0
    head, _, *rows = table_of(sweep)
    assert head[2:5] == ["latency, ms a sample", "validation top-1, % (val-selected)", "test top-1, % (val-selected)"]
    assert [row[0] for row in rows] == ["**lr=0.2**", "lr=0.1", "lr=0.3"]
    assert (
        "by the mean over seeds of the latency, the first objective of the search; the test"
        in (sweep / "report.md").read_text()
    )


def test_a_sweep_without_a_finished_run_is_one_sentence(kd, sweep) -> None:
    for run_dir in sweep.glob("lr-*"):
        overrides = record.read(run_dir)["overrides"]
        record.write(run_dir, {"schema": 1, "status": "failed", "error": "why", "name": "x", "overrides": overrides})
    said = kd("report", "sweep")
    assert (said.code, "Traceback" in said.err) == (1, False)
    assert "no run is finished" in said.err


def test_the_author_of_a_study_names_its_measure(study, runs) -> None:
    found = frame.of_study(study, runs)
    assert [m.column for m in measures(study, found)][:2] == ["last/test/acc1", "selected/test/acc1"]


# ---------------------------------------------------------------------- what was swept


def test_the_head_says_what_was_swept_and_what_was_not(kd, sweep, monkeypatch) -> None:
    config = {
        "student": {"model": {"_target_": "kd.models.mlp.mlp", "hidden": [32, 32], "dropout": 0.0}},
        "teacher": {"checkpoint": "runs/teacher"},
        "loss": {"ce": {}, "kd": {}},
        "recipe": {"epochs": 20, "batch_size": 64, "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.1}},
    }
    for run_dir in sweep.glob("lr-*"):
        config["recipe"]["optimizer"]["lr"] = float(run_dir.name.split("_")[0].removeprefix("lr-"))
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    assert kd("report", "sweep").code == 0
    text = (sweep / "report.md").read_text()
    assert "Swept: recipe.optimizer.lr (0.1, 0.3, 0.2); seed (0, 1)." in text
    assert (
        "The same in all runs: data Digits 4822861089d4: 808/270/1000 train/val/test; student mlp (hidden [32, 32]; "
        "3,466 parameters); loss ce + kd; epochs 20; batch size 64; optimiser Adam; teacher teacher (85,002 "
        "parameters, validation top-1 97.50 %)."
    ) in text
    assert "Swept" in (sweep / "report.html").read_text()


def test_a_run_that_failed_hides_nothing_of_the_others(kd, sweep, write) -> None:
    write(sweep / "lr-0.1_seed-1", 1, 0.9, status="failed", overrides=["recipe.optimizer.lr=0.1", "seed=1"])
    assert kd("report", "sweep").code == 0
    text = (sweep / "report.md").read_text()
    assert "Swept: recipe.optimizer.lr (0.1, 0.3, 0.2); recipe.epochs (20, not set); seed (0, 1)." in text
    assert "teacher teacher (85,002 parameters" in text


def test_other_runs_differ_and_a_run_by_itself_does_not(write, tmp_path) -> None:
    for name, loss in (("a", "[ce]"), ("b", "[ce,kd]")):
        write(tmp_path / name / "seed3", 3, 0.9, overrides=[f"loss={loss}", "seed=3", f"name={name}"])
    both = gathered([str(tmp_path / "a"), str(tmp_path / "b")])
    assert both.about[:2] == [
        "Different between the runs: loss ([ce], [ce,kd]).",
        "The same in all runs: data Digits 4822861089d4: 808/270/1000 train/val/test; teacher none; seed 3.",
    ]
    alone = gathered([str(tmp_path / "a")])
    assert [text.split(":")[0] for text in alone.about] == ["The same in all runs"]


def test_many_values_are_a_range_and_drawn_numbers_are_short() -> None:
    drawn = [f"{0.01234567890123456 * n}" for n in range(1, 9)]
    assert sweep_summary._listed(drawn) == "8 values from 0.01235 to 0.09877"
    assert sweep_summary._listed([*drawn, "[ce]"]) == "9 values"
    assert sweep_summary._listed(drawn[:1]) == "0.01235"
    assert json.dumps(sweep_summary._differing([{"a": "1", "b": "2"}, {"a": "1"}])) == '{"b": ["2", "not set"]}'
