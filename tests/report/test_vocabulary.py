"""What a study may measure, found out before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kd.errors import KdError
from kd.report import frame, run_row, vocabulary
from kd.studies.study import Comparison, Evaluation, Figure, Published, Row

MOVED = {
    "moved": Evaluation("moved", ("data.test_shift=2",)),
    "bias3": Evaluation("bias3", bias=(3,)),
    "turned": Evaluation("turned", ("data.test_shift=1",), rows=("alone",)),
}


@pytest.fixture
def small(study):
    return replace(study, evaluations=MOVED)


def test_everything_that_runs_have_is_known(study, runs, teacher_run: Path) -> None:
    """The made-up runs and a real one: each number of theirs may be asked for."""
    real = frame.table([run_row.of_run(teacher_run, "teacher")])
    columns = {str(c) for found in (frame.of_study(study, runs), real) for c in found if not frame.is_text(str(c))}
    measured = columns - {"seed", "epochs"}
    assert len(measured) > 60
    vocabulary.check(replace(study, columns=tuple(measured), evaluations=MOVED))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"measure": "test/acc_1"}, r"study\.yaml: measure = test/acc_1 .* no run measures that \(near: test/acc1"),
        ({"columns": ("test/nll", "moved/erors")}, r"columns = moved/erors is .* \(near: moved/errors, moved/error"),
        ({"columns": ("shifted/acc1",)}, r"columns = shifted/acc1 is not allowed"),
        ({"columns": ("bias3/nll",)}, r"columns = bias3/nll is not allowed"),
        ({"columns": ("selected/train/acc1",)}, r"columns = selected/train/acc1 is not allowed"),
        ({"columns": ("test/class_20",)}, r"columns = test/class_20 is not allowed"),
        ({"comparisons": {"x": Comparison("x", "alone", "alone", "test/acc2")}}, r"x: measure = test/acc2"),
        (
            {"comparisons": {"x": Comparison("x", "alone", "alone", "test/acc1", than_measure="teacher/test/errors")}},
            r"comparisons: x: than_measure = teacher/test/errors",
        ),
        (
            {"comparisons": {"x": Comparison("x", "alone", "teacher", "turned/acc1")}},
            r"x: measure = turned/acc1 is not allowed for the row teacher: the evaluation turned is made for alone",
        ),
        ({"figures": (Figure("lines", "test/eror", "width"),)}, r"figures: number 1: measure = test/eror .*test/error"),
        (
            {"published": Published("s", "p", {"alone": {"test/eror": {"value": 0.1}}})},
            r"published\.yaml: numbers: alone: measure = test/eror is not allowed",
        ),
        (
            {"published": Published("s", "p", {"alone": {"test/acc1": {"value": 93.6}}})},
            r"published\.yaml: numbers: alone: test/acc1 = 93\.6 must be a fraction",
        ),
    ],
)  # fmt: skip
def test_what_no_run_has_is_refused(small, changed, sentence) -> None:
    with pytest.raises(KdError, match=sentence):
        vocabulary.check(replace(small, **changed))


def test_terms_and_other_tasks_have_names_of_their_own(small) -> None:
    vocabulary.check(replace(small, columns=("train/my_term", "last/train/kd")))
    rows = {**small.rows, "odd": Row("odd", ("task._target_=mine.Task",))}
    vocabulary.check(replace(small, rows=rows, columns=("test/miou",)))
