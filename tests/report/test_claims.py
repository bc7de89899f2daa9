"""Comparisons on made-up runs, and the tables of a report."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from kd.errors import KdError
from kd.report import claims, frame, provenance, stats, tables
from kd.report.measures import Measure
from kd.studies.study import Comparison, Published

pytestmark = pytest.mark.slow  # pages, figures, exports and processes take their time


@pytest.fixture
def found(study, runs):
    return frame.of_study(study, runs)


def test_the_comparisons_of_a_study(study, runs, found) -> None:
    compared = claims.compare(study, found, runs)
    distilled, alone = (frame.values(found, row, "last/test/acc1").to_numpy() for row in ("distilled", "alone"))
    helps = compared["helps"]
    assert helps.interval.estimate == pytest.approx((distilled - alone).mean())
    assert helps.interval.n == 5
    assert helps.interval.p == pytest.approx(scipy_stats.ttest_rel(distilled, alone).pvalue)
    share = compared["share"].interval
    assert share.estimate == pytest.approx((distilled - alone).mean() / (0.975 - alone).mean())
    assert share.n == 5  # the one teacher stands beside every seed
    assert compared["control"].interval.n == 3  # a failed and a missing run are left out on both sides
    ps = [compared[name].interval.p for name in ("helps", "control")]
    assert [compared[name].corrected for name in ("helps", "control")] == pytest.approx(_holm(ps))
    assert compared["share"].interval.p == pytest.approx(helps.interval.p)  # the same test: it does not count twice
    assert [row[-1] for row in tables.comparison_grid(compared).rows][1] == "–"


def test_one_run_beside_every_seed_is_said(study, found) -> None:
    between = {
        "x": Comparison("x", "distilled", "teacher", "test/acc1"),
        "y": Comparison("y", "teacher", "teacher", "selected/test/acc1", than_measure="last/test/acc1"),
        **study.comparisons,
    }
    compared = claims.compare(replace(study, comparisons=between), found, None)
    note = "one run of “teacher”: its own spread is not in the interval"
    assert {name: c.interval.note for name, c in compared.items() if note in c.interval.note} == {
        "x": note,
        "share": note,
    }
    assert compared["x"].sentence.endswith(f"(Student's t, 5 seeds; {note})")


def _holm(ps: list[float]) -> list[float]:
    order = np.argsort(ps)
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, (len(ps) - rank) * ps[i])
        corrected[i] = min(1.0, highest)
    return corrected


def test_over_images_of_kept_predictions(study, runs, found) -> None:
    over = claims.compare(study, found, runs)["helps"].images
    selected = [frame.values(found, row, "selected/test/acc1") for row in ("distilled", "alone")]
    assert over.estimate == pytest.approx((selected[0] - selected[1]).mean())
    assert (over.images, over.seeds) == (1000, 5)
    assert over.only_row - over.only_than == round(5000 * over.estimate)
    assert claims.compare(study, found, runs)["share"].images is None
    assert claims.compare(study, found, None)["helps"].images is None


@pytest.mark.parametrize(
    ("measure", "kept"),
    [("test/acc1", True), ("selected/test/errors", True), ("teacher/test/acc1", False), ("test/nll", False)],
)
def test_only_a_measure_of_the_students_test_images_is_compared_over_them(study, runs, found, measure, kept) -> None:
    other = replace(study, comparisons={"x": Comparison("x", "distilled", "shuffled", measure)})
    assert (claims.compare(other, found, runs)["x"].images is not None) == kept


def test_predictions_of_other_images_are_not_paired(study, runs, found) -> None:
    file = runs / "alone" / "seed2" / "predictions_test.npz"
    kept = dict(np.load(file))
    np.savez(file, **{**kept, "index": kept["index"] + 1})
    assert claims.compare(study, found, runs)["helps"].images is None
    file.write_bytes(b"half a zip")
    with pytest.raises(KdError, match=r"predictions_test\.npz cannot be read"):
        claims.compare(study, found, runs)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_kept_prediction_that_is_no_number_is_named(study, runs, found, value) -> None:
    file = runs / "alone" / "seed2" / "predictions_test.npz"
    kept = dict(np.load(file))
    kept["logits"][17, 3] = value
    np.savez(file, **kept)
    index = kept["index"][17]
    with pytest.raises(KdError, match=rf"alone/seed2/predictions_test\.npz: .* not finite .* index {index}\)"):
        claims.compare(study, found, runs)


def test_two_measures_of_one_row(study, found) -> None:
    between = Comparison("x", "distilled", "distilled", "selected/test/acc1", than_measure="last/test/acc1")
    other = replace(study, comparisons={"x": between})
    compared = claims.compare(other, found, None)["x"]
    assert compared.interval.estimate == pytest.approx(0.001)
    assert compared.label == "“soft targets, T = 4”: test top-1 (val-selected) − test top-1 (last epoch)"


def test_a_single_run_is_a_shared_one_only_when_it_is_meant_to_be(study, found) -> None:
    """Of five planned seeds one is done: that is one pair, not a partner for all."""
    one = found[(found["row"] != "alone") | (found["seed"] == 2)]
    assert claims.compare(study, one, None)["helps"].interval.n == 1


def test_a_measure_that_no_run_has(study, found) -> None:
    other = replace(study, comparisons={"x": Comparison("x", "distilled", "alone", "test/acc2")})
    assert claims.compare(other, found, None)["x"].interval.note == "not measured yet"  # two runs are not finished
    done = found[found["status"] == "finished"]
    with pytest.raises(KdError, match=r"measure = test/acc2 is not in any run \(near: .*test/acc1"):
        claims.compare(other, done, None)


def test_a_worse_teacher_leaves_no_gap(study, found) -> None:
    upside_down = replace(
        study, comparisons={"x": Comparison("x", "teacher", "distilled", "test/acc1", share_of="alone")}
    )
    compared = claims.compare(upside_down, found, None)["x"]
    assert "no gap to close" in compared.interval.note
    assert compared.interval.headline is compared.interval.p is None


def test_a_worse_teacher_leaves_a_dash_in_the_main_table(study, found) -> None:
    """Alone 0.94, teacher 0.90: a student at 0.91 would "close" three quarters of that."""
    worse = found.copy()
    worse.loc[worse["row"] == "teacher", "last/test/acc1"] = 0.90
    worse.loc[worse["row"] == "distilled", "last/test/acc1"] = 0.91
    table = tables.numbers(study, worse)
    assert np.isnan(table.loc["distilled", ["gap recovered", "gap recovered low"]].astype(float)).all()
    grid = tables.main_grid(study, table, tables.measures(study, worse))
    assert grid.rows[2][grid.head.index("gap recovered, %")] == "–"


# ---------------------------------------------------------------------- tables


def test_the_main_table(study, found) -> None:
    table = tables.numbers(study, found)
    alone = frame.values(found, "alone", "last/test/acc1")
    assert table.loc["alone", "last/test/acc1"] == pytest.approx(alone.mean())
    assert table.loc["alone", "last/test/acc1 std"] == pytest.approx(alone.std(ddof=1))
    assert table.loc["shuffled", "n"] == 3
    assert np.isnan(table.loc["teacher", "last/test/acc1 std"])
    share = claims.compare(study, found, None)["share"].interval
    assert table.loc["distilled", "gap recovered"] == pytest.approx(share.estimate)
    assert table.loc["distilled", "gap recovered low"] == pytest.approx(share.theory[0])
    assert np.isnan(table.loc["alone", "gap recovered"])
    kept = frame.values(found, "distilled", "last/retention")
    assert table.loc["distilled", "retention"] == pytest.approx(kept.mean())
    assert table["mean rank"].idxmin() == "distilled"
    assert np.isnan(table.loc["teacher", "mean rank"])
    grid = tables.main_grid(study, table, tables.measures(study, found))
    assert grid.head[:4] == ("", "n", "test top-1, % (last epoch)", "test top-1, % (val-selected)")
    row = grid.rows[1]
    assert row[:3] == ("student alone", "5", f"{100 * alone.mean():.2f} ± {100 * alone.std():.2f}")
    assert grid.strong == (2,)


def test_published_beside_measured(study, found) -> None:
    grid = tables.published_grid(study, found)
    assert grid.head[4:] == ("95 % of the mean", "95 % of one run", "inside")
    assert [row[-1] for row in grid.rows] == ["not comparable"] * 3
    assert grid.rows[2][2] == "74.0 ± 2.5 (n = 3)"
    errors = frame.values(found, "distilled", "last/test/errors")
    low, high = stats.mean(errors.to_numpy()).theory
    assert grid.rows[2][4:6] == (f"{low:.1f} to {high:.1f}", "–"), "a mean beside the interval of ours"
    low, high = stats.one_more(frame.values(found, "alone", "last/test/errors"))
    assert grid.rows[1][4:6] == ("–", f"{low:.1f} to {high:.1f}"), "one run beside the interval of one run"
    numbers = {
        "alone": {"test/errors": {"value": 64}, "test/acc1": {"value": 0.99}},
        "teacher": {"test/errors": {"value": 25}},
    }
    same = replace(study, published=Published("s", "p", numbers, comparable=True))
    grid = tables.published_grid(same, found)
    assert [row[-1] for row in grid.rows] == ["yes", "no", "–"]
    assert grid.head[4:] == ("95 % of one run", "inside"), "no column that no number needs"


def test_a_single_published_run_is_one_run_and_not_the_mean(study, found) -> None:
    """A run that lies outside the interval of our mean may well be a run of ours."""
    errors = frame.values(found, "alone", "last/test/errors").to_numpy()
    single, mean = stats.one_more(errors), stats.mean(errors).theory
    value = (single[1] + mean[1]) / 2
    for n, word in ((None, "yes"), (1, "yes"), (5, "no")):
        numbers = {"alone": {"test/errors": {"value": value, **({"n": n} if n else {})}}}
        same = replace(study, published=Published("s", "p", numbers, comparable=True))
        assert tables.published_grid(same, found).rows[0][-1] == word


def test_unfinished_runs_are_a_line_for_each_row_and_reason(study, found) -> None:
    assert provenance.unfinished(study, found).rows == (
        ("soft targets of another image", "failed", "3", "the loss is not finite"),
        ("soft targets of another image", "missing", "4", "–"),
    )
    begun = found.copy()
    begun.loc[(found["row"] == "alone") & (found["seed"] > 0), ["status", "error"]] = ["missing", None]
    begun.loc[(found["row"] == "alone") & (found["seed"] == 2), ["status", "error"]] = ["failed", "no memory\nat all"]
    assert provenance.unfinished(study, begun).rows[:2] == (
        ("student alone", "missing", "1 3 4", "–"),
        ("student alone", "failed", "2", "no memory"),
    )
    assert provenance.unfinished(study, found[found["status"] == "finished"]) is None


def test_words_for_people() -> None:
    assert Measure("last/test/acc1").label == "test top-1, %"
    assert Measure("selected/test/errors").show(74.2) == "74.2"
    assert Measure("selected/test/errors").change(-3.0) == "−3.0"
    assert Measure("last/test/acc1").change(0.0) == "0.00"
    assert Measure("last/test/acc1").change(-0.00001) == "0.00"
    assert Measure("last/test/class_3").label == "test accuracy of class 3, %"
    assert Measure("moved/acc1").label == "moved: top-1, %"
    assert Measure("student/latency_ms").label == "latency, ms a sample"
    assert Measure("teacher/test/acc1").title == "teacher's test top-1"
    assert tables.p_value(0.00004) == "< 0.001"
