"""Notes explain what is on the page, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from kd import report
from kd.report import cost, frame, notes, provenance
from kd.report.measures import Measure
from kd.report.page import unbroken
from kd.report.report import _roles
from kd.studies.study import Comparison, Published

pytestmark = pytest.mark.slow  # pages, figures, exports and processes take their time


@pytest.fixture
def small(study):
    """The study without its grid and its figures."""
    return replace(study, rows={n: r for n, r in study.rows.items() if not r.values}, figures=())


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch) -> None:
    monkeypatch.setattr("kd.report.report.draw", lambda *_: {})


def page(study, found: pd.DataFrame, out: Path) -> str:
    return report.build(study, found, None, out).paths["md"].read_text()


def test_bold_is_what_the_sentence_says(small, runs, tmp_path) -> None:
    found = frame.of_study(small, runs)
    bold = "Bold: the row with the best test top-1 (last epoch), the measure of the study; left out: “teacher”."
    assert bold in page(small, found, tmp_path)
    equal = found.copy()
    equal.loc[equal["row"] != "teacher", "last/test/acc1"] = 0.9
    assert "Bold" not in page(small, equal, tmp_path)
    equal.loc[equal["row"].isin(["alone", "distilled"]), "last/test/acc1"] = 0.95
    assert "Bold: the rows with" in page(small, equal, tmp_path)


def test_words_are_explained_where_they_are(small, runs, tmp_path) -> None:
    found = frame.of_study(small, runs)
    text = page(small, found, tmp_path)
    for word in ("Gap recovered:", "Retention:", "Agreement:", "Fieller's for ratios", "bootstrap", "p of a share"):
        assert word in text
    rows = {"alone": small.rows["alone"]}
    bare = replace(small, rows=rows, comparisons={}, supported=(), columns=(), published=None, claim="")
    text = page(bare, found[found["row"] == "alone"], tmp_path)
    for word in ("ap recovered", "etention", "greement", "Fieller", "bootstrap", "p of a share", "Bold", "–: "):
        assert word not in text
    assert "Mean ± standard deviation over n seeds." in text


def test_intervals_of_two_seeds_have_one_word(small, runs, tmp_path) -> None:
    found = frame.of_study(small, runs)
    few = "seeds is very wide"
    assert "An interval of 3 seeds" in page(small, found, tmp_path), "one row has three finished seeds"
    text = page(small, found[found["seed"] < 2], tmp_path)
    assert text.count(few) == 1
    assert "An interval of 2 seeds" in text
    assert few not in page(small, found[found["row"] != "shuffled"], tmp_path)
    said = notes.few_seeds([2, 5])
    for n, width in ((2, "9.0"), (3, "2.5"), (10, "0.7")):
        assert f"{stats.t.ppf(0.975, n - 1) / n**0.5:.1f}" == width
        assert f"{width} with {n}" in said
    assert notes.few_seeds([1, 4, 10]) == ""


def test_a_missing_interval_has_its_reason(small, runs, tmp_path) -> None:
    found = frame.of_study(small, runs)
    alike = found.copy()
    alike.loc[alike["row"] == "distilled", "last/test/acc1"] = 0.96
    alike.loc[alike["row"] == "alone", "last/test/acc1"] = 0.94
    text = page(small, alike, tmp_path)
    assert "gap recovered of soft targets, T = 4 (all seeds gave the same share: no spread to judge by)" in text
    assert "–: there is no interval, for the reason in brackets." in text
    assert "for the reason in brackets" not in page(small, found, tmp_path)
    assert "–: not measured, or of no meaning for that row." in text


def test_what_no_run_has_yet_is_not_in_the_tables(small, runs, tmp_path) -> None:
    """An evaluation of another row, which has not begun: a row beside itself, and no minus of twice the same."""
    given = Published("a paper", "theirs", {"alone": {"later/acc1": {"value": 0.9}, "test/acc1": {"value": 0.9}}})
    between = Comparison("later", "alone", "alone", "later/acc1", than_measure="test/acc1")
    twice = Comparison("twice", "alone", "alone", "test/acc1")
    wanted = {"helps": small.comparisons["helps"], "later": between, "twice": twice}
    more = replace(small, columns=("later/acc1",), comparisons=wanted, supported=(), published=given)
    built = report.build(more, frame.of_study(more, runs), None, tmp_path)
    text = built.paths["md"].read_text()
    assert built.compared["later"].label == "“student alone”: later: top-1 − test top-1"
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert not [line for line in tables if "later" in line or "twice" in line]
    assert "Not in the table: later (not measured yet); twice (a row beside itself cannot differ)." in text
    assert "“student alone” − “student alone”" not in text


def test_a_head_does_not_break_at_a_hyphen_and_many_columns_are_set_close(small, runs, tmp_path) -> None:
    assert unbroken("test top-1, % <b>") == 'test <span class="unbroken">top-1,</span> % &lt;b&gt;'
    found = frame.of_study(small, runs)
    html = report.build(small, found, None, tmp_path).paths["html"].read_text()
    assert html.count('<table class="wide">') == 1, "the results have ten columns, the comparisons eight"
    bare = replace(small, columns=(), rows={"alone": small.rows["alone"]}, comparisons={}, supported=(), published=None)
    alone = found[found["row"] == "alone"]
    assert '<table class="wide">' not in report.build(bare, alone, None, tmp_path).paths["html"].read_text()


def test_only_colours_that_are_drawn_are_explained(small, runs) -> None:
    found = frame.of_study(small, runs)
    assert _roles(small, found) == " Dark: teachers; grey: students alone; blue: all others."
    assert _roles(small, found[found["row"] != "alone"]) == " Dark: teachers; blue: all others."
    assert _roles(small, found[found["row"] == "distilled"]) == ""


def test_a_duration_has_the_unit_that_fits_its_column() -> None:
    assert provenance.durations([0.4, 2.25]) == ("seconds", ["0.4", "2.2"])
    assert provenance.durations([30.0, 600.0]) == ("minutes", ["0.5", "10.0"])
    assert provenance.durations([1800.0, 36_000.0]) == ("hours", ["0.50", "10.00"])
    assert provenance.durations([36_000.0, 11.0])[0] == "seconds"
    assert provenance.durations([0.0]) == ("seconds", ["0.0"])
    assert provenance.durations([]) == ("seconds", [])


def test_the_caption_of_the_cost_figure(study, runs) -> None:
    found = frame.of_study(study, runs)
    accuracy, errors = Measure("last/test/acc1"), Measure("last/test/errors")
    figure = cost.pareto(study, found, accuracy)
    assert "higher is better" in cost.caption(figure, accuracy)
    assert "a row below it" in cost.caption(figure, accuracy)
    assert "lower is better" in cost.caption(figure, errors)
    drawn = any("latency" in axes.get_xlabel() for axes in figure.axes)
    assert ("Latency: one sample" in cost.caption(figure, accuracy)) == drawn
    for axes in figure.axes:
        axes.set_xlabel("parameters")
    assert "Latency: one sample" not in cost.caption(figure, accuracy)
