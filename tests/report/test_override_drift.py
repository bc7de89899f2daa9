"""A report says when its runs were told something else than study.yaml says now."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml

from kd.records import record, sources, weight_files
from kd.report import frame, override_drift
from kd.studies import references
from kd.studies.study import Study

MADE = (
    "these results were made with other overrides than study.yaml has now; once their runs are removed, "
    "`kd study made_up`"
)


@pytest.fixture
def read(study: Study, runs: Path) -> Study:
    """The study, its distilled row with a teacher of the study; every run was told what its row says."""
    own = ("loss=[kd]", "teacher.checkpoint={teacher}", "notes={teacher}/last")
    distilled = replace(study.rows["distilled"], overrides=own)
    study = replace(study, rows={**study.rows, "distilled": distilled}, folder=Path("experiments/made_up"))
    for name in study.rows:
        tell(study, runs, name)
    return study


def tell(study: Study, runs: Path, name: str, *added: str) -> None:
    """Write into the records of a row what ``kd study`` would have told its runs."""
    for file in (runs / name).glob("seed*/result.json"):
        seed = int(file.parent.name.removeprefix("seed"))
        own = references.resolve_overrides(study, study.rows[name], seed, runs.resolve())
        overrides = [f"seed={seed}", *own, *added, f"name={name}"]
        file.write_text(json.dumps({**json.loads(file.read_text()), "overrides": overrides}))


def changed(study: Study, name: str) -> Study:
    """The study with another recipe for a row."""
    row = replace(study.rows[name], overrides=("recipe.epochs=9", *study.rows[name].overrides[1:]), label="another")
    return replace(study, rows={**study.rows, name: row})


@pytest.mark.parametrize("kept", [False, True], ids=["from the runs", "from results.csv"])
def test_rows_that_the_study_has_otherwise_now(read: Study, runs: Path, tmp_path: Path, kept: bool) -> None:
    def notes(study: Study) -> list[str]:
        if not kept:
            return override_drift.notes(study, frame.of_study(study, runs))
        return override_drift.notes(study, frame.read_results(tmp_path / "results.csv", study))

    frame.write_results(tmp_path / "results.csv", read, frame.of_study(read, runs))
    assert notes(read) == []
    assert notes(changed(read, "alone")) == [f"row alone: {MADE} makes them anew"]
    (note,) = notes(changed(read, "teacher"))
    assert note.startswith("rows teacher, distilled: "), "a student is as old as its teacher"


def test_results_of_before_cannot_tell(read: Study, runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    frame.write_results(file, read, frame.of_study(read, runs))
    pd.read_csv(file, dtype=str).drop(columns=["overrides_hash", "added_overrides"]).to_csv(file, index=False)
    assert override_drift.notes(changed(read, "alone"), frame.read_results(file, read)) == []


def test_what_was_added_on_the_command_line(read: Study, runs: Path) -> None:
    tell(read, runs, "shuffled", "hardware.threads=1", "recipe.epochs=1", "hydra.launcher.n_jobs=2")
    note = "the runs also have the overrides recipe.epochs=1, which study.yaml does not have"
    assert override_drift.notes(read, frame.of_study(read, runs)) == [note]


def test_what_does_not_change_a_result_is_not_told(read: Study, runs: Path) -> None:
    tell(
        read,
        runs,
        "shuffled",
        "data.root=elsewhere",
        "protocol.keep_predictions=true",
        "hardware.threads=1",
        "logger=[]",
    )
    assert override_drift.notes(read, frame.of_study(read, runs)) == []
    tell(read, runs, "shuffled", "hardware=gpu", "hardware.precision=bf16-mixed", "data.split_seed=7")
    (note,) = override_drift.notes(read, frame.of_study(read, runs))
    assert "overrides data.split_seed=7, hardware.precision=bf16-mixed, hardware=gpu, which" in note


def test_what_is_interpolated_has_its_value_in_a_record(read: Study, runs: Path) -> None:
    def with_overrides(*own: str) -> Study:
        return replace(read, rows={**read.rows, "alone": replace(read.rows["alone"], overrides=own)})

    tell(with_overrides("recipe.epochs=40", "protocol.val_every=40"), runs, "alone")
    for said, count in (("protocol.val_every=${recipe.epochs}", 0), ("protocol.monitor=${x}", 1)):
        study = with_overrides("recipe.epochs=40", said)
        assert len(override_drift.notes(study, frame.of_study(study, runs))) == count


def test_a_row_may_read_a_run_of_another_study(read: Study, runs: Path) -> None:
    own = ("loss=[kd]", "teacher.checkpoint='/runs/study_other/teacher/seed0'")
    study = replace(read, rows={**read.rows, "alone": replace(read.rows["alone"], overrides=own)})
    tell(study, runs, "alone")
    assert override_drift.notes(study, frame.of_study(study, runs)) == []


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_what_has_read_weights_that_were_trained_anew_does_not_count(read, runs, tmp_path, role) -> None:
    teacher, student = runs / "teacher" / "seed0", runs / "distilled" / "seed0"
    (teacher / weight_files.SELECTED).write_bytes(b"weights")
    config = {r: {"checkpoint": str(teacher) if r == role else None} for r in ("student", "teacher")}
    (student / "config.yaml").write_text(yaml.safe_dump(config))
    found = json.loads((student / "result.json").read_text())
    record.write(student, {**found, "weights_read": weight_files.read_by(config)})

    def status(runs_dir: Path) -> tuple[str, str]:
        here = frame.of_study(read, runs_dir).set_index(["row", "seed"])
        return here.loc[("distilled", 0), "status"], str(here.loc[("distilled", 0), "error"])

    assert status(runs)[0] == "finished"
    shutil.copytree(runs, tmp_path / "moved")
    (teacher / weight_files.SELECTED).write_bytes(b"others")
    assert status(runs)[0] == "outdated"
    assert f"{role}.checkpoint = {teacher} holds other weights than when the run began: remove" in status(runs)[1]
    assert status(tmp_path / "moved")[0] == "finished", "its teacher was moved with it"


def test_what_was_made_by_other_code_does_not_count(read, runs, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("own_term.py").write_text("def own(): return 1.0\n")
    run_dir = runs / "distilled" / "seed0"
    (run_dir / "config.yaml").write_text(yaml.safe_dump({r: {"checkpoint": None} for r in ("student", "teacher")}))
    record.write(run_dir, {**record.read(run_dir), "code_read": {"own_term.own": sources.code_of("own_term.own")}})

    def of(runs_dir: Path) -> pd.DataFrame:
        return frame.of_study(read, runs_dir).set_index(["row", "seed"])[["status", "error"]]

    before = of(runs)
    assert before.loc[("distilled", 0), "status"] == "finished"
    shutil.copytree(runs, tmp_path / "moved")
    Path("own_term.py").write_text("def own(): return 0.01\n")
    for runs_dir in (runs, tmp_path / "moved"):
        after = of(runs_dir)
        status, error = after.loc[("distilled", 0)]
        assert status == "outdated"
        assert error.startswith(
            "_target_ = own_term.own is other code than when the run began (changed: own_term.py): remove this run"
        )
        assert after.drop(("distilled", 0)).equals(before.drop(("distilled", 0)))


def test_runs_may_be_moved(read: Study, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "elsewhere")
    assert override_drift.notes(read, frame.of_study(read, tmp_path / "elsewhere")) == []
