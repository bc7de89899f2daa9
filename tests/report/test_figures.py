"""What the figures draw: the numbers in them, read back from matplotlib."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas

from kd.errors import KdError
from kd.report import cost, curves, figures, frame, style
from kd.report.measures import Measure
from kd.studies.study import Figure, Published, Row

pytestmark = pytest.mark.slow  # pages, figures, exports and processes take their time

ACC, ERRORS = Measure("last/test/acc1"), Measure("last/test/errors")


@pytest.fixture
def found(study, runs):
    return frame.of_study(study, runs)


def texts(axes) -> list[str]:
    return [t.get_text() for t in axes.texts]


def test_bars_start_at_zero_only_where_that_hides_nothing() -> None:
    near = figures.bars([figures.Bar("a", np.array([95.0, 96.0])), figures.Bar("b", np.array([97.0]))], "t", "x").axes[
        0
    ]
    assert near.get_xlim()[0] > 90
    assert not near.patches
    far = figures.bars([figures.Bar("a", np.array([5.0, 6.0])), figures.Bar("b", np.array([97.0]))], "t", "x").axes[0]
    assert far.get_xlim()[0] == 0
    assert [p.get_width() for p in far.patches] == [5.5, 97.0]
    assert [label.get_text() for label in far.get_yticklabels()] == ["a", "b"]
    assert texts(far)[:2] == ["5.5", "97.0"]
    negative = figures.bars([figures.Bar("a", np.array([-0.4])), figures.Bar("b", np.array([0.3]))], "t", "x").axes[0]
    low, high = negative.get_xlim()
    assert low < -0.4
    assert high > 0.3


def test_one_row_far_off_does_not_press_the_others_together() -> None:
    rows = [
        figures.Bar(name, np.array(found)) for name, found in (("a", [73.0, 80.0]), ("b", [110.0]), ("c", [4718.0]))
    ]
    axes = figures.bars(rows, "t", "errors", log=True).axes[0]
    assert axes.get_xscale() == "log"
    assert not axes.patches, "a bar would begin at a zero that the axis does not have"
    assert axes.get_xlabel() == "errors, logarithmic"
    with_zero = figures.bars([*rows, figures.Bar("d", np.array([0.0]))], "t", "errors", log=True).axes[0]
    assert with_zero.get_xscale() == "linear"


def test_study_bars_show_every_seed_and_only_comparable_published_numbers(study, found) -> None:
    axes = figures.study_bars(study, found, ERRORS).axes[0]
    dots = sum(len(c.get_offsets()) for c in axes.collections)
    assert dots == (found["status"] == "finished").sum()
    same = replace(study, published=Published("s", "p", {"alone": {"test/errors": {"value": 61}}}, comparable=True))
    more = figures.study_bars(same, found, ERRORS).axes[0]
    diamonds = [c for c in more.collections if len(c.get_offsets()) == 1 and c.get_offsets()[0][0] == 61]
    assert len(diamonds) == 1
    many = {f"r{i}": Row(f"r{i}", ()) for i in range(50)}
    assert figures.study_bars(replace(study, rows={"alone": study.rows["alone"]}), found, ACC) is None
    assert figures.study_bars(replace(study, rows=many), found, ACC) is None


def test_a_map_frames_the_best_of_each_line(study, found) -> None:
    figure = figures.of_grid(study, found, Figure("map", "test/errors", "temperature", y="width"))
    axes = figure.axes[0]
    means = axes.images[0].get_array()
    assert means.shape == (3, 5)
    for row, width in enumerate((6, 32, 256)):
        for column, t in enumerate((1, 2, 4, 8, 20)):
            assert means[row, column] == frame.values(found, f"w{width}_t{t}", "last/test/errors").mean()
    framed = [round(p.get_x() + 0.46) for p in axes.patches]
    assert framed == [int(np.argmin(line)) for line in means] == [1, 2, 4]
    assert axes.get_title(loc="left") == "Test errors by temperature and width"


def test_lines_over_a_grid_with_the_student_alone(study, found) -> None:
    rows = {n: replace(r, alone="alone") if r.values.get("width") == 6 else r for n, r in study.rows.items()}
    wanted = Figure("lines", "test/errors", "temperature", group="width")
    none = {n: replace(r, alone=None) for n, r in study.rows.items()}
    drawn = [figures.of_grid(replace(study, rows=r), found, wanted) for r in (rows, none)]
    assert [figures.dashed(figure) for figure in drawn] == [True, False]
    axes = drawn[0].axes[0]
    assert axes.get_xscale() == "log"
    lines = [line for line in axes.lines if len(line.get_xdata()) == 5]
    assert [line.get_ydata()[0] for line in lines] == [
        frame.values(found, f"w{w}_t1", "last/test/errors").mean() for w in (6, 32, 256)
    ]
    dashed = [line for line in axes.lines if len(line.get_xdata()) == 2]
    assert [line.get_ydata()[0] for line in dashed] == [frame.values(found, "alone", "last/test/errors").mean()]
    assert texts(axes) == ["width 6", "width 6, alone", "width 32", "width 256"]
    inside = {**rows, "alone": replace(study.rows["alone"], values={"width": 6})}  # a row of the same grid
    assert texts(figures.of_grid(replace(study, rows=inside), found, wanted).axes[0]) == texts(axes)
    every = {n: replace(r, alone="alone") if r.values else r for n, r in study.rows.items()}
    axes = figures.of_grid(replace(study, rows=every), found, wanted).axes[0]
    assert len([line for line in axes.lines if len(line.get_xdata()) == 2]) == 1
    assert texts(axes) == ["width 6", "alone", "width 32", "width 256"], "one student alone, named once"
    words = {n: replace(r, values={**r.values, "temperature": f"T{r.values['temperature']}"}) if r.values else r
             for n, r in study.rows.items()}  # fmt: skip
    linear = figures.of_grid(replace(study, rows=words), found, wanted).axes[0]
    assert [t.get_text() for t in linear.get_xticklabels()] == ["T1", "T2", "T4", "T8", "T20"]
    assert figures.of_grid(study, found, Figure("lines", "test/errors", "depth")) is None


def test_the_pareto_front(study, found) -> None:
    axes = cost.pareto(study, found, ACC).axes
    assert [a.get_xlabel() for a in axes] == ["latency, ms a sample"]  # the others order the two networks as it does
    front = axes[0].lines[0]
    students = found["student/parameters"] == 3466
    assert front.get_xdata()[0] == pytest.approx(found["student/latency_ms"][students].median())
    best = 100 * frame.values(found, "distilled", "last/test/acc1").mean()
    assert front.get_ydata() == pytest.approx([best, 97.5])
    assert texts(axes[0]) == ["soft targets, T = 4", "teacher"]  # of 19 points only the front has names
    small = replace(study, rows={n: r for n, r in study.rows.items() if n in ("alone", "distilled")})
    assert cost.pareto(small, found, ACC) is None
    fast = found.assign(**{"student/latency_ms": found["student/latency_ms"].mask(~students, 0.01)})
    axes = cost.pareto(study, fast, ACC).axes  # the large network is the fast one; MACs and parameters agree
    assert [a.get_xlabel() for a in axes] == ["latency, ms a sample", "multiply-accumulates a sample"]
    assert axes[1].lines[0].get_xdata().tolist() == [3392, 84480]


def test_rows_of_one_network_cost_the_same(study, found) -> None:
    points = cost._points(study, found, ACC, "student/latency_ms")
    costs = {label: cost for label, cost, _, _ in points}
    sizes = found.groupby("row")["student/parameters"].first()
    assert len(costs) > len(set(sizes)) == len(set(costs.values()))


def test_learning_curves_end_before_the_test_rows(study, runs, found) -> None:
    axes = curves.learning(study, found, runs).axes[0]
    assert texts(axes) == ["teacher", "student alone", "soft targets, T = 4", "soft targets of another image"]
    line = axes.lines[1]
    assert line.get_xdata().tolist() == list(range(1, 21))
    assert line.get_ydata()[-1] == pytest.approx(93.2, abs=1)
    assert axes.get_ylabel() == "validation top-1, %"
    (runs / "alone" / "seed0" / "metrics.csv").write_text("")
    with pytest.raises(KdError, match=r"metrics\.csv cannot be read"):
        curves.learning(study, found, runs)


def test_without_validations_the_training_curve_and_without_files_none(study, runs, found) -> None:
    for file in runs.rglob("metrics.csv"):
        file.write_text(file.read_text().replace("val/acc1", "val/acc5"))
    assert curves.learning(study, found, runs).axes[0].get_ylabel() == "training top-1, %"
    for file in runs.rglob("metrics.csv"):
        file.unlink()
    assert curves.learning(study, found, runs) is None


def test_calibration_is_torchmetrics_error() -> None:
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(500, 10)) * 2, rng.integers(0, 10, 500)
    soft = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    count, confidence, accuracy, error = curves.calibration(soft.max(1), soft.argmax(1) == target)
    reference = multiclass_calibration_error(torch.tensor(soft), torch.tensor(target), num_classes=10, n_bins=15)
    assert error == pytest.approx(float(reference), abs=1e-6)
    assert count.sum() == 500
    assert np.isnan(accuracy[count == 0]).all()
    inside = count > 0
    assert (np.abs(confidence - (np.arange(15) + 0.5) / 15)[inside] <= 0.5 / 15 + 1e-9).all()


def test_reliability_has_a_panel_for_each_row_with_predictions(study, runs, found) -> None:
    axes = [a for a in curves.reliability(study, found, runs).axes if a.get_visible()]
    assert [a.get_title(loc="left") for a in axes][:3] == ["teacher", "student alone", "soft targets, T = 4"]
    assert all(texts(a)[0].startswith("ECE ") for a in axes)
    for file in runs.rglob("predictions_test.npz"):
        file.unlink()
    assert curves.reliability(study, found, runs) is None


def test_labels_are_moved_apart_and_no_further() -> None:
    moved = style.spread_out([1.0, 1.0, 5.0], 1.0, 0.0, 10.0)
    assert moved == pytest.approx([0.5, 1.5, 5.0])
    assert style.spread_out([9.9, 9.8, 9.7], 1.0, 0.0, 10.0) == pytest.approx([10.0, 9.0, 8.0], abs=0.02)
    assert style.spread_out([3.0, 1.0], 1.0, 0.0, 10.0) == [3.0, 1.0]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (3e3, 1e5, [5e3, 1e4, 2e4, 5e4, 1e5]),
        (0.9, 1100, [1, 10, 100, 1000]),
        (2.0, 6.0, [2, 3, 4, 5, 6]),
        (0.027, 0.048, [0.03, 0.035, 0.04, 0.045]),
    ],
)
def test_logarithmic_ticks_are_round(low, high, ticks) -> None:
    axes = Canvas().subplots()
    style.log_axis(axes, "x", low, high)
    found = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert {*np.round(found, 9)} >= {*ticks}
    assert 3 <= len(found) <= 10
    style.log_axis(axes, "x", low, high, [low, high])
    assert axes.get_xticks().tolist() == [low, high]


@pytest.mark.parametrize(("value", "text"), [(3466, "3.466k"), (1e6, "1M"), (2e9, "2G"), (0.05, "0.05")])
def test_short_numbers(value, text) -> None:
    assert style.short(value) == text
