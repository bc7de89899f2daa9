"""A table does not mix weights of a teacher: the share of a gap is of the weights that taught."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kd.report import claims, frame, tables, teacher_weights
from kd.studies.study import Row, Study

pytestmark = pytest.mark.slow  # pages, figures, exports and processes take their time

OVERRIDES = ("experiment=digits_kd", "teacher.checkpoint={teacher}")


@pytest.fixture
def read(study: Study) -> Study:
    """The study, its distilled row taught by its teacher's row."""
    return replace(study, rows={**study.rows, "distilled": replace(study.rows["distilled"], overrides=OVERRIDES)})


def teach(runs: Path, **teacher: object) -> None:
    """Let the records of the distilled row say this of their teacher."""
    for file in (runs / "distilled").glob("seed*/result.json"):
        found = json.loads(file.read_text())
        found["teacher"] |= teacher
        file.write_text(json.dumps(found))


def test_the_epoch_that_taught_must_be_the_one_that_is_shown(read: Study, runs: Path) -> None:
    last = json.loads((runs / "teacher" / "seed0" / "result.json").read_text())["student"]["last"]["epoch"]
    teach(runs, epoch=last, weights="last")
    found = frame.of_study(read, runs)
    assert teacher_weights.notes(read, found) == []
    assert claims.compare(read, found, None)["share"].interval.headline is not None
    teach(runs, epoch=last - 1, weights="selected")
    found = frame.of_study(read, runs)
    (note,) = teacher_weights.notes(read, found)
    assert note.startswith("row distilled: given the val-selected teacher (test top-1 ")
    share = claims.compare(read, found, None)["share"]
    assert np.isnan(share.interval.estimate)
    assert "other weights of “teacher”" in share.interval.note
    table = tables.numbers(read, found)
    assert np.isnan(table.loc["distilled", "gap recovered"])
    assert not np.isnan(table.loc["shuffled", "gap recovered"]), "that row does not say whose it is"
    assert claims.compare(read, found, None)["helps"].interval.n == 5, "students are compared as before"


def test_results_of_before_are_told_by_the_teachers_numbers(read: Study, runs: Path) -> None:
    own = json.loads((runs / "teacher" / "seed0" / "result.json").read_text())["student"]["last"]["test"]
    teach(runs, test=own)
    assert not teacher_weights.differ(read, frame.of_study(read, runs), "distilled", "teacher")
    teach(runs, test={**own, "nll": own["nll"] + 0.001})
    assert teacher_weights.differ(read, frame.of_study(read, runs), "distilled", "teacher")


@pytest.mark.parametrize(
    ("overrides", "teacher"),
    [
        (OVERRIDES, "teacher"),
        (("teacher.checkpoint={a@2}", "data.split_seed={seed}"), "a"),
        (("student.checkpoint={stage1}", "teacher.checkpoint={b}"), "b"),
        (("teacher.checkpoint=[{a@0},{a@1}]",), None),
        (("loss=[ce]",), None),
    ],
)
def test_whose_student_a_row_is(overrides: tuple[str, ...], teacher: str | None) -> None:
    assert teacher_weights.teacher_of(Row("x", overrides)) == teacher
