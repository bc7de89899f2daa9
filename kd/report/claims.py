"""Compute the comparisons of a study with their intervals; ``verdicts`` judges its conditions by them. No torch."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from kd.errors import KdError
from kd.records import record
from kd.report import stats, teacher_weights
from kd.report.frame import FINISHED, finished, measure_of, values
from kd.report.measures import EPOCHS, Measure, resolve
from kd.report.stats import Interval, OverImages
from kd.studies.study import Comparison, Study


@dataclass(frozen=True)
class Compared:
    """One comparison with its interval over seeds, and the same over test images if kept.

    ``corrected``: p by Holm; None for a share.
    """

    comparison: Comparison
    label: str
    measure: Measure
    interval: Interval
    images: OverImages | None = None
    corrected: float | None = None

    def show(self, value: float) -> str:
        """Write a number of this comparison: ``+1.20``, or ``91 %`` for the share of a gap."""
        return show_change(self.comparison, self.measure, value)

    def size(self, value: float) -> str:
        """Write the size of a difference, without a sign: ``1.20 points``."""
        return f"{self.show(abs(value)).lstrip('+')}{self.unit}"

    @property
    def unit(self) -> str:
        """Return the unit of a difference, with a space before it."""
        return unit_of(self.comparison, self.measure)

    @property
    def title(self) -> str:
        """Return its name in the study, which tells it from others of the same rows, and the rows."""
        return f"{self.comparison.name}: {self.label}"

    @property
    def sentence(self) -> str:
        """Write the estimate with its interval."""
        found, bounds = self.interval, self.interval.headline
        if np.isnan(found.estimate):
            return f"{self.title}: {found.note}"
        text = f"{self.title}: {self.show(found.estimate)}{self.unit}"
        if bounds is None:
            return f"{text} ({found.note})"
        note = f"; {found.note}" if found.note else ""
        return f"{text}, 95\u00a0% interval {self.show(bounds[0])} to {self.show(bounds[1])} ({found.method}{note})"


def show_change(comparison: Comparison, measure: Measure, value: float) -> str:
    """Write a number of a comparison: ``+1.20``, or ``91 %`` for the share of a gap."""
    if comparison.share_of:
        return f"{100 * value:.0f}\u00a0%".replace("-", "−")
    return measure.change(value)


def unit_of(comparison: Comparison, measure: Measure) -> str:
    """Return the unit of a difference, with a space before it; "" for the share of a gap."""
    unit = "" if comparison.share_of else measure.change_unit
    return f" {unit}" if unit else ""


def label_of(study: Study, row: str) -> str:
    """Return what a row is called on the page."""
    return study.rows[row].label or row


def known(study: Study, frame: pd.DataFrame, measure: str) -> str | None:
    """Find the column of a measure; None while runs are missing that may have it. ``KdError`` if no run has it."""
    try:
        return resolve(frame.columns, measure, study.epoch)
    except KdError:
        if (frame["status"] == FINISHED).all():
            raise
        return None


def aligned(study: Study, frame: pd.DataFrame, wanted: Sequence[tuple[str, str]]) -> list[np.ndarray]:
    """Return one array for each (row, column), of the seeds that all of these rows have finished.

    A row that is meant to have a single run, a teacher that all students share, stands beside every seed.
    """
    found = [values(frame, row, column) for row, column in wanted]
    single = [_is_shared(study, frame, row, column) for row, column in wanted]
    several = [series.index for series, one in zip(found, single, strict=True) if not one]
    if not several:
        return [series.to_numpy() for series in found]
    shared = several[0]
    for index in several[1:]:
        shared = shared.intersection(index)
    return [
        np.full(len(shared), series.iloc[0]) if one else series.loc[shared].to_numpy()
        for series, one in zip(found, single, strict=True)
    ]


def _is_shared(study: Study, frame: pd.DataFrame, row: str, column: str) -> bool:
    return len(values(frame, row, column)) == 1 and len(study.rows[row].seeds or study.seeds) == 1


def _with_shared(study: Study, frame: pd.DataFrame, wanted: Sequence[tuple[str, str]], interval: Interval) -> Interval:
    """Add a note to the interval on each row whose one run stands beside every seed."""
    shared = dict.fromkeys(label_of(study, row) for row, column in wanted if _is_shared(study, frame, row, column))
    if interval.headline is None or not shared:
        return interval
    notes = [f"one run of “{label}”: its own spread is not in the interval" for label in shared]
    return replace(interval, note="; ".join([interval.note, *notes] if interval.note else notes))


def compare(study: Study, frame: pd.DataFrame, runs_dir: Path | None) -> dict[str, Compared]:
    """Compute every comparison of the study, with p values corrected for their number.

    Shares are left out of the correction: their p is that of the difference, which would count twice.
    """
    found = {name: compare_one(study, frame, c, runs_dir) for name, c in study.comparisons.items()}
    tested = [n for n, c in found.items() if c.interval.p is not None and not c.comparison.share_of]
    corrected = stats.holm([found[name].interval.p for name in tested])  # type: ignore[misc]
    for name, p in zip(tested, corrected, strict=True):
        found[name] = replace(found[name], corrected=p)
    return found


def compare_one(study: Study, frame: pd.DataFrame, comparison: Comparison, runs_dir: Path | None) -> Compared:
    """Compute one comparison, its p uncorrected; arguments as of :func:`compare`."""
    column = known(study, frame, comparison.measure)
    other = known(study, frame, comparison.than_measure or comparison.measure)
    measure = measure_of(frame, column or comparison.measure)
    label = _label(study, comparison, measure, measure_of(frame, other or comparison.than_measure or measure.column))
    if is_with_itself(comparison):
        return Compared(comparison, label, measure, Interval(np.nan, 0, note="a row beside itself cannot differ"))
    if column is None or other is None:
        return Compared(comparison, label, measure, Interval(np.nan, 0, note="not measured yet"))
    wanted = [(comparison.row, column), (comparison.than, other)]
    if comparison.share_of:
        wanted.append((comparison.share_of, column))
        interval = _with_shared(study, frame, wanted, gap_closed(study, frame, wanted, measure))
        return Compared(comparison, label, measure, interval)
    interval = _with_shared(study, frame, wanted, stats.difference(*aligned(study, frame, wanted)))
    images = None
    if runs_dir is not None and other == column and _of_test_images(column):
        images = _over_images(frame, comparison, runs_dir)
    return Compared(comparison, label, measure, interval, images)


def is_with_itself(comparison: Comparison) -> bool:
    """Tell whether a row stands beside itself in one and the same measure: there is nothing to compare."""
    return comparison.row == comparison.than and comparison.than_measure in (None, comparison.measure)


def _label(study: Study, comparison: Comparison, measure: Measure, other: Measure) -> str:
    """Name the rows of a comparison, with the measures where there are two of them."""
    row, than = label_of(study, comparison.row), label_of(study, comparison.than)
    if comparison.share_of:
        return f"share of the gap from “{than}” to “{label_of(study, comparison.share_of)}” that “{row}” closes"
    if other.column == measure.column:
        return f"“{row}” − “{than}”"
    titles = [m.title for m in (measure, other)]
    if titles[0] == titles[1]:
        titles = [f"{m.title} ({m.epoch})" for m in (measure, other)]
    if comparison.row == comparison.than:
        return f"“{row}”: {titles[0]} − {titles[1]}"
    return f"“{row}”, {titles[0]} − “{than}”, {titles[1]}"


def _of_test_images(column: str) -> bool:
    """Tell whether a column counts the student's right test images, which kept predictions can do too."""
    epoch, _, rest = column.partition("/")
    return epoch in EPOCHS and rest in ("test/acc1", "test/errors", "test/error")


def gap_closed(
    study: Study, frame: pd.DataFrame, wanted: Sequence[tuple[str, str]], measure: Measure
) -> stats.Interval:
    """Compute the share of the gap between a second and a third row that a first one closes; (row, column) of each."""
    found = aligned(study, frame, wanted)
    if teacher_weights.differ(study, frame, wanted[0][0], wanted[2][0]):
        label = label_of(study, wanted[2][0])
        return Interval(np.nan, len(found[0]), note=f"it learned from other weights of “{label}” than those shown")
    if n := len(found[0]):
        gap = float((found[2] - found[1]).mean())
        if gap >= 0 if measure.lower_is_better else gap <= 0:
            return Interval(np.nan, n, note="the teacher is not better: there is no gap to close")
    return stats.share(*found)


def _over_images(frame: pd.DataFrame, comparison: Comparison, runs_dir: Path) -> OverImages | None:
    """Compare both rows on the same test images, where both kept predictions (those of the val-selected student)."""
    sides = [_predictions(frame, row, runs_dir) for row in (comparison.row, comparison.than)]
    pairs = []
    for seed in sorted(sides[0].keys() & sides[1].keys()):
        (index, target, row), (index_than, target_than, than) = sides[0][seed], sides[1][seed]
        if len(index) != len(index_than) or (index != index_than).any() or (target != target_than).any():
            return None  # other test images: nothing to pair
        pairs.append((index, row, than))
    return stats.over_images(pairs) if pairs else None


def _predictions(frame: pd.DataFrame, row: str, runs_dir: Path) -> dict[int, tuple[np.ndarray, ...]]:
    found: dict[int, tuple[np.ndarray, ...]] = {}
    for run in finished(frame)[finished(frame)["row"] == row].itertuples():
        kept = predictions(runs_dir / str(run.run))
        if kept is not None:
            index, target, logits = kept
            found[int(run.seed)] = (index, target, logits.argmax(1) == target)
    return found


def predictions(run_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Read index, target and logits (rows × classes) of a run's test images, sorted by index; None if not kept.

    ``KdError`` when the file cannot be read, or holds logits that are not finite.
    """
    file = run_dir / record.PREDICTIONS["test"]
    if not file.is_file():
        return None
    try:
        with np.load(file) as kept:
            index, target, logits = (kept[name] for name in ("index", "target", "logits"))
            bad = np.flatnonzero(~np.isfinite(logits).all(1))
            if not bad.size:
                return index, target, logits
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile):
        raise KdError(f"{file} cannot be read: it is not what kd writes") from None
    raise KdError(
        f"{file}: the student's answer is not finite for {bad.size} image(s) of test (NaN or infinity; index "
        f"{index[bad[0]]}): remove the run and train it anew"
    )
