"""The comparisons of a study with their intervals, and what its claim comes to. No torch."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from kd.errors import KdError
from kd.records import record
from kd.report import stats, taught
from kd.report.frame import FINISHED, finished, measure_of, values
from kd.report.measures import EPOCHS, Measure, resolve
from kd.report.stats import Interval, OverImages
from kd.studies.spec import Comparison, Condition, Study

SUPPORTED, CONTRADICTED, OPEN, INCOMPLETE = "supported", "contradicted", "not shown", "incomplete"


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
        """A number of this comparison: ``+1.20``, or ``91 %`` for the share of a gap."""
        if self.comparison.share_of:
            return f"{100 * value:.0f}\u00a0%".replace("-", "−")
        return self.measure.change(value)

    @property
    def unit(self) -> str:
        """The unit of a difference, with a space before it."""
        unit = "" if self.comparison.share_of else self.measure.change_unit
        return f" {unit}" if unit else ""

    @property
    def title(self) -> str:
        """Its name in the study, which tells it from others of the same rows, and the rows."""
        return f"{self.comparison.name}: {self.label}"

    @property
    def sentence(self) -> str:
        """The estimate with its interval."""
        found, bounds = self.interval, self.interval.headline
        if np.isnan(found.estimate):
            return f"{self.title}: {found.note}"
        text = f"{self.title}: {self.show(found.estimate)}{self.unit}"
        if bounds is None:
            return f"{text} ({found.note})"
        note = f"; {found.note}" if found.note else ""
        return f"{text}, 95\u00a0% interval {self.show(bounds[0])} to {self.show(bounds[1])} ({found.method}{note})"


def label_of(study: Study, row: str) -> str:
    """What a row is called on the page."""
    return study.rows[row].label or row


def known(study: Study, frame: pd.DataFrame, measure: str) -> str | None:
    """The column of a measure; None while it may still come, because runs are missing. ``KdError`` if no run has it."""
    try:
        return resolve(frame.columns, measure, study.epoch)
    except KdError:
        if (frame["status"] == FINISHED).all():
            raise
        return None


def aligned(study: Study, frame: pd.DataFrame, wanted: Sequence[tuple[str, str]]) -> list[np.ndarray]:
    """One array for each (row, column), of the seeds that all of these rows have finished.

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
    """The interval, with a note on each row whose one run stands beside every seed."""
    shared = dict.fromkeys(label_of(study, row) for row, column in wanted if _is_shared(study, frame, row, column))
    if interval.headline is None or not shared:
        return interval
    notes = [f"one run of “{label}”: its own spread is not in the interval" for label in shared]
    return replace(interval, note="; ".join([interval.note, *notes] if interval.note else notes))


def compare(study: Study, frame: pd.DataFrame, runs_dir: Path | None) -> dict[str, Compared]:
    """Every comparison of the study, with p values corrected for their number.

    Shares are left out of the correction: their p is that of the difference, which would count twice.
    """
    found = {name: _compare(study, frame, c, runs_dir) for name, c in study.comparisons.items()}
    tested = [n for n, c in found.items() if c.interval.p is not None and not c.comparison.share_of]
    corrected = stats.holm([found[name].interval.p for name in tested])  # type: ignore[misc]
    for name, p in zip(tested, corrected, strict=True):
        found[name] = replace(found[name], corrected=p)
    return found


def _compare(study: Study, frame: pd.DataFrame, comparison: Comparison, runs_dir: Path | None) -> Compared:
    column = known(study, frame, comparison.measure)
    other = known(study, frame, comparison.than_measure or comparison.measure)
    measure = measure_of(frame, column or comparison.measure)
    label = _label(study, comparison, measure, measure_of(frame, other or comparison.than_measure or measure.column))
    if itself(comparison):
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


def itself(comparison: Comparison) -> bool:
    """Whether a row stands beside itself in one and the same measure: there is nothing to compare."""
    return comparison.row == comparison.than and comparison.than_measure in (None, comparison.measure)


def _label(study: Study, comparison: Comparison, measure: Measure, other: Measure) -> str:
    """The rows of a comparison, with the measures where there are two of them."""
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
    """Whether a column counts the student's right test images, which kept predictions can do too."""
    epoch, _, rest = column.partition("/")
    return epoch in EPOCHS and rest in ("test/acc1", "test/errors", "test/error")


def gap_closed(
    study: Study, frame: pd.DataFrame, wanted: Sequence[tuple[str, str]], measure: Measure
) -> stats.Interval:
    """The share of the gap between a second and a third row that a first one closes; (row, column) of the three."""
    found = aligned(study, frame, wanted)
    if taught.by_others(study, frame, wanted[0][0], wanted[2][0]):
        label = label_of(study, wanted[2][0])
        return Interval(np.nan, len(found[0]), note=f"it learned from other weights of “{label}” than those shown")
    if n := len(found[0]):
        gap = float((found[2] - found[1]).mean())
        if gap >= 0 if measure.lower_is_better else gap <= 0:
            return Interval(np.nan, n, note="the teacher is not better: there is no gap to close")
    return stats.share(*found)


def _over_images(frame: pd.DataFrame, comparison: Comparison, runs_dir: Path) -> OverImages | None:
    """Both rows on the same test images, where both kept their predictions (those of the val-selected student)."""
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
    """Index, target and logits (rows × classes) of a run's test images, sorted by index; None if they were not kept.

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


# ---------------------------------------------------------------------- the claim


def verdict(study: Study, compared: Mapping[str, Compared], frame: pd.DataFrame) -> tuple[str, list[str]]:
    """``supported`` when every condition holds, ``contradicted`` when one cannot, else ``not shown``; and why.

    ``incomplete`` while a run of the rows that are compared is not finished: to look at some of the seeds and stop
    when they please would be no test. ``supported`` needs no correction for the number of conditions, all of them must
    hold at 95 % (an intersection-union test); ``contradicted`` is one of several intervals, and its error grows with
    their number.
    """
    if not study.supported:
        return "", []
    judged = [judge(condition, compared[condition.comparison]) for condition in study.supported]
    states = [state for state, _ in judged]
    needed = {row for c in study.supported for row in _rows_of(compared[c.comparison].comparison)}
    unfinished = (frame["row"].isin(needed) & (frame["status"] != FINISHED)).any()
    decided = SUPPORTED if set(states) == {SUPPORTED} else CONTRADICTED if CONTRADICTED in states else OPEN
    return INCOMPLETE if unfinished else decided, [sentence for _, sentence in judged]


def _rows_of(comparison: Comparison) -> set[str]:
    return {row for row in (comparison.row, comparison.than, comparison.share_of) if row}


def judge(condition: Condition, compared: Compared) -> tuple[str, str]:
    """One condition: the whole interval fulfils it, none of it does, or the interval cannot tell."""
    wanted = _wanted(condition, compared)
    bounds = compared.interval.headline
    if bounds is None:
        return OPEN, f"{compared.sentence}. It had to be {wanted}: without an interval that is not shown."
    low = -np.inf if condition.above is None else condition.above
    high = np.inf if condition.below is None else condition.below
    if condition.inside is not None:
        low, high = condition.inside
    if low < bounds[0] and bounds[1] < high:
        return SUPPORTED, f"{compared.sentence}. It had to be {wanted}, and all of the interval is."
    if bounds[1] < low or high < bounds[0]:
        return CONTRADICTED, f"{compared.sentence}. It had to be {wanted}, and none of the interval is."
    return OPEN, f"{compared.sentence}. It had to be {wanted}, and only a part of the interval is."


def _wanted(condition: Condition, compared: Compared) -> str:
    if condition.inside is not None:
        low, high = condition.inside
        return f"between {compared.show(low)} and {compared.show(high)}"
    number = condition.above if condition.above is not None else condition.below
    assert number is not None, f"a condition on {condition.comparison} without a number"
    return f"{'above' if condition.above is not None else 'below'} {compared.show(number)}"
