"""One run → one row, and the frame through results.csv and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from kd.errors import KdError
from kd.records import record
from kd.report import frame, run_row


def test_the_row_of_a_real_run(teacher_run: Path) -> None:
    """A run of ``kd train`` itself, so that the made-up records of the other tests cannot drift from it."""
    found = record.read(teacher_run)
    row = run_row.of_run(teacher_run, "teacher", teacher_run.parent)
    last = found["student"]["last"]
    assert row["run"] == teacher_run.name
    assert (row["seed"], row["status"], row["error"], row["epochs"]) == (0, "finished", None, 4)
    assert row["monitor"] == "max val/acc1"
    assert row["last/test/acc1"] == last["test"]["acc1"]
    assert row["last/val/nll"] == last["val"]["nll"]
    assert row["last/train/ce"] == last["train"]["ce"]
    assert row["last/gap"] == last["train"]["acc1"] - last["test"]["acc1"]
    assert row["last/test/errors"] == round(719 * (1 - last["test"]["acc1"]))
    assert row["selected/test/class_3"] == found["student"]["selected"]["test_per_class"][3]
    assert row["student/parameters"] == found["student"]["parameters"]
    assert row["student/latency_ms"] > 0
    assert row["peak_memory_mb"] == max(found["peak_memory_mb"].values())
    assert "last/retention" not in row
    assert row["data"].endswith("808/270/719 train/val/test")
    assert row["classes"] is None  # the digits are called 0 to 9
    assert row["version/kd"] == found["versions"]["kd"]


def test_retention_and_evaluations(write, tmp_path) -> None:
    run = write(tmp_path / "kd" / "seed1", 1, 0.9, teacher=0.96, selected=0.93)
    (run / "evaluations.json").write_text(json.dumps({"moved": {"made": {}, "metrics": {"acc1": 0.55, "nll": 1.5}}}))
    row = run_row.of_run(run, "kd")
    assert row["last/retention"] == pytest.approx(0.9 / 0.96)
    assert row["selected/retention"] == pytest.approx(0.93 / 0.96)
    assert (row["moved/acc1"], row["moved/nll"], row["moved/errors"]) == (0.55, 1.5, 450)
    assert row["moved/error"] == pytest.approx(0.45)
    assert row["teacher/macs"] == 84_480


def test_what_a_student_began_with_is_no_number(write, tmp_path) -> None:
    run = write(tmp_path / "kd" / "seed1", 1, 0.9)
    found = json.loads((run / "result.json").read_text())
    found["student"]["started_from"] = {"file": "weights.pth", "digest": "12"}
    (run / "result.json").write_text(json.dumps(found))
    assert frame.table([run_row.of_run(run, "kd")])["last/test/acc1"].tolist() == [0.9]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"schema": 1, "status": "fin', "is not valid JSON"),
        ('{"schema": 99}', "was written by a newer version of kd"),
        ("[1, 2]", "it is not what kd writes"),
        ('{"schema": 1, "status": "finished"}', "it is not what kd writes"),
        ('{"schema": 1, "student": 3}', "it is not what kd writes"),
    ],
)
def test_a_record_that_cannot_be_read(tmp_path, content, sentence) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(KdError, match=sentence):
        run_row.of_run(tmp_path, "x")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        '{"moved": 3}',
        '{"moved": {"made": {}, "metrics": {"nll": NaN}}}',
        '{"moved": {"made": {}, "metrics": {"acc1": "x"}}}',
        '{"moved": {"metrics": {}}}',
    ],
)
def test_evaluations_that_cannot_be_read(write, tmp_path, content) -> None:
    run = write(tmp_path / "kd" / "seed1", 1, 0.9)
    (run / "evaluations.json").write_text(content)
    with pytest.raises(KdError, match=r"evaluations\.json cannot be read"):
        run_row.of_run(run, "kd")


def test_a_study_lists_what_is_missing_and_what_failed(study, runs) -> None:
    found = frame.of_study(study, runs)
    assert list(found.columns[:5]) == ["row", "seed", "status", "error", "run"]
    left = found[found["status"] != "finished"]
    assert left[["row", "seed", "status"]].values.tolist() == [["shuffled", 3, "failed"], ["shuffled", 4, "missing"]]
    assert left["error"].tolist() == ["the loss is not finite", None]
    assert len(found) == 1 + 3 * 5 + 15 * 2
    assert list(frame.values(found, "shuffled", "last/test/acc1").index) == [0, 1, 2]
    assert found["run"].iloc[0] == "teacher/seed0"


def test_other_seeds_are_read_where_the_study_has_them(study, runs, write) -> None:
    write(runs / "alone" / "seed7", 7, 0.94)
    assert 7 not in frame.of_study(study, runs)["seed"].to_numpy()
    more = replace(study, rows={**study.rows, "alone": replace(study.rows["alone"], seeds=(0, 7))})
    assert list(frame.values(frame.of_study(more, runs), "alone", "last/test/acc1").index) == [0, 7]


def test_results_csv_and_back(study, runs, tmp_path) -> None:
    before = frame.of_study(study, runs)
    file = tmp_path / "results.csv"
    frame.write_results(file, study, before)
    after = frame.read_results(file, study)
    pd.testing.assert_frame_equal(before, after, check_exact=True, check_dtype=False)
    head, first = file.read_text().splitlines()[:2]
    assert head.startswith("schema,study,reported,row,seed,status")
    assert first.startswith("1,made_up,last,teacher,0,finished,,teacher/seed0,")
    assert ",25," in first  # errors are whole numbers
    frame.write_results(file, study, after)
    assert frame.read_results(file, study).equals(after)


def named(runs: Path, rows: Sequence[str], names: Sequence[str]) -> None:
    """Give the runs of some rows names of classes."""
    for file in (f for row in rows for f in runs.glob(f"{row}/seed*/result.json")):
        found = json.loads(file.read_text())
        if "data" in found:
            file.write_text(json.dumps({**found, "data": {**found["data"], "class_names": list(names)}}))


def test_classes_have_their_names_where_all_runs_agree(study, runs, tmp_path) -> None:
    garments = ["T-shirt/top", "Trouser", "Pull|over", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"]
    assert frame.measure_of(frame.of_study(study, runs), "last/test/class_6").title == "test accuracy of class 6"
    named(runs, list(study.rows), garments)
    found = frame.of_study(study, runs)
    file = tmp_path / "results.csv"
    frame.write_results(file, study, found)
    for read in (found, frame.read_results(file, study)):
        assert frame.measure_of(read, "last/test/class_6").label == "test accuracy of class 6 (Shirt), %"
        assert frame.measure_of(read, "moved/class_2").title == "moved: accuracy of class 2 (Pull/over)"
    named(runs, ["alone"], [str(i) for i in range(10)])  # another data set
    assert frame.measure_of(frame.of_study(study, runs), "last/test/class_6").title == "test accuracy of class 6"
    named(runs, list(study.rows), [f"kind {i}" for i in range(21)])  # of so many no class is reported
    assert not frame.of_study(study, runs)["classes"].any()


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("schema,", "scheme,", "it is not a results file of kd"),
        ("\n1,made_up", "\n9,made_up", "was written by a newer version of kd"),
        ("made_up,last", "another,last", "holds the results of the study another, not of made_up"),
        (
            "made_up,last",
            "made_up,selected",
            "of another protocol: it reports the selected epoch, the study the last one",
        ),
        ("last,teacher,", "last,tutor,", "of another protocol: the study has no row tutor"),
        (",0,finished", ",zero,finished", "it is not a results file of kd"),
    ],
)
def test_results_that_are_refused(study, runs, tmp_path, old, new, sentence) -> None:
    file = tmp_path / "results.csv"
    frame.write_results(file, study, frame.of_study(study, runs))
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(KdError, match=sentence):
        frame.read_results(file, study)


@pytest.mark.parametrize("content", ["", "\n", "schema,study,reported\n", '"'])
def test_results_that_are_none(study, tmp_path, content) -> None:
    (tmp_path / "results.csv").write_text(content)
    with pytest.raises(KdError, match="it is not a results file of kd"):
        frame.read_results(tmp_path / "results.csv", study)


def test_seeds_of_two_protocols_have_no_mean(study, runs, write) -> None:
    frame.check_protocol(frame.of_study(study, runs))
    write(runs / "alone" / "seed1", 1, 0.94, epochs=10)
    with pytest.raises(KdError, match=r"row alone: .* different protocols \(recipe.epochs = 10 and 20\)"):
        frame.check_protocol(frame.of_study(study, runs))


def test_a_run_on_mixed_images_has_no_training_accuracy(write, tmp_path) -> None:
    run = write(tmp_path / "kd" / "seed1", 1, 0.9)
    found = json.loads((run / "result.json").read_text())
    del found["student"]["last"]["train"]["acc1"]
    (run / "result.json").write_text(json.dumps(found))
    row = run_row.of_run(run, "kd")
    assert "last/gap" not in row
    assert row["last/test/acc1"] == 0.9
