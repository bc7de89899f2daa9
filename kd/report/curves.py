"""Draw the figures that need the run directories: learning curves, and reliability from kept predictions. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from kd.errors import KdError
from kd.records import record
from kd.report import style
from kd.report.claims import label_of, predictions
from kd.report.frame import finished, metrics_of
from kd.report.style import GREY, INK, SOFT, STUDENT, TEACHER, styled
from kd.studies.study import Study

MOST = 8  # lines, or panels, that one figure can hold
BINS = 15  # of confidence, those of the calibration error


def chosen(study: Study, frame: pd.DataFrame) -> list[str]:
    """Choose the rows that such a figure shows: those compared and their references, else the first ones."""
    named: list[str | None] = []
    for comparison in study.comparisons.values():
        row = study.rows[comparison.row]
        named += [row.teacher, comparison.share_of, comparison.than, comparison.row]
    order = list(dict.fromkeys(n for n in named if n)) or list(study.rows)
    done = set(finished(frame)["row"])
    return [name for name in order if name in done][:MOST]


@styled
def learning(study: Study, frame: pd.DataFrame, runs_dir: Path) -> Canvas | None:
    """Draw the main metric on validation by epoch: the mean over seeds, and the band from lowest to highest seed."""
    main = metrics_of(frame)[0]
    for column in (f"val/{main.name}", f"train/{main.name}"):
        scale = 100 if main.share else 1
        curves = {name: scale * _curve(frame, name, runs_dir, column) for name in chosen(study, frame)}
        lines = {name: curve for name, curve in curves.items() if len(curve) > 2}
        if lines:
            break
    else:
        return None
    figure = Canvas(figsize=(8, 4.6))
    axes = figure.subplots()
    inks = _inks(study, list(lines))
    for ink, curve in zip(inks, lines.values(), strict=True):
        axes.fill_between(curve.index, curve.min(axis=1), curve.max(axis=1), color=ink, alpha=0.15, linewidth=0)
        axes.plot(curve.index, curve.mean(axis=1), color=ink)
    settled = [_settled(curve) for curve in lines.values()]  # the steep beginning would flatten all the rest
    falls = main.better == "min"
    top = max(float(c.max().max()) for c in (settled if falls else lines.values()))
    low = min(float(c.min().min()) for c in (lines.values() if falls else settled))
    axes.set_ylim(low - 0.08 * (top - low + 1e-9), top + 0.04 * (top - low + 1e-9))
    axes.set_xlim(0, max(c.index[-1] for c in lines.values()))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    split = "Validation" if column.startswith("val") else "Training"
    axes.set(xlabel="epoch", ylabel=f"{split.lower()} {main.title}{', %' if main.share else ''}")
    axes.set_title(f"{split} {main.title} while training")
    ends = [float(c.mean(axis=1).iloc[-1]) for c in lines.values()]
    style.end_labels(axes, ends, [shorten(label_of(study, n), 40, placeholder=" …") for n in lines], inks)
    return figure


def _settled(curve: pd.DataFrame) -> pd.DataFrame:
    """Leave out the first fifth of the epochs."""
    return curve[curve.index > curve.index[-1] / 5]


def _inks(study: Study, names: Sequence[str]) -> list[str]:
    """Choose colours: teachers dark, students alone grey, a colour for each of the others."""
    teachers, alone = ({getattr(row, role) for row in study.rows.values()} for role in ("teacher", "alone"))
    others = [n for n in names if n not in teachers | alone]
    return [TEACHER if n in teachers else GREY if n in alone else style.colour(others.index(n)) for n in names]


def _curve(frame: pd.DataFrame, row: str, runs_dir: Path, column: str) -> pd.DataFrame:
    """Read a metric by epoch (1, 2, …), one column a seed; epochs that all seeds have. Empty if there is no curve."""
    found = {}
    for run in finished(frame)[finished(frame)["row"] == row].itertuples():
        file = runs_dir / str(run.run) / record.METRICS
        if not file.is_file():
            continue
        try:
            metrics = pd.read_csv(file)
            series = metrics.dropna(subset=[column]).set_index("epoch")[column] if column in metrics else None
        except (OSError, ValueError, KeyError):
            raise KdError(f"{file} cannot be read: it is not what kd writes") from None
        if series is not None:
            series = series[series.index < run.epochs]  # tests after the last epoch are logged one epoch later
            found[run.seed] = series[~series.index.duplicated(keep="last")]
    if not found:
        return pd.DataFrame()
    curve = pd.concat(found, axis="columns", join="inner")
    curve.index = curve.index.astype(int) + 1
    return curve.sort_index()


@styled
def reliability(study: Study, frame: pd.DataFrame, runs_dir: Path) -> Canvas | None:
    """Draw for each row how often its answers of each confidence are right, all seeds together."""
    kept = {name: _confidence(frame, name, runs_dir) for name in chosen(study, frame)}
    kept = {name: found for name, found in kept.items() if found is not None}
    if not kept:
        return None
    across = 2 if len(kept) == 4 else min(3, len(kept))
    down = -(-len(kept) // across)
    figure = Canvas(figsize=(max(4.0, 2.9 * across), 0.5 + 3.1 * down))
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(kept) :]:
        axes.set_visible(False)
    for axes, (name, found) in zip(panels.flat, kept.items(), strict=False):
        assert found is not None
        _reliability_panel(axes, *found)
        axes.set_title(_folded(label_of(study, name)), fontsize=10)
    for axes in panels[:, 0]:
        axes.set_ylabel("right, %")
    for axes in panels.flat[max(0, len(kept) - across) : len(kept)]:
        axes.set_xlabel("confidence, %")
        axes.tick_params(labelbottom=True)
    return figure


def _folded(text: str, width: int = 26) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:2])


def _confidence(frame: pd.DataFrame, row: str, runs_dir: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the confidence of every answer, and whether it is right; one vector each, all seeds."""
    from scipy.special import softmax

    sure, right = [], []
    for run in finished(frame)[finished(frame)["row"] == row].itertuples():
        kept = predictions(runs_dir / str(run.run))
        if kept is not None:
            _, target, logits = kept
            sure.append(softmax(logits.astype(float), axis=1).max(1))
            right.append(logits.argmax(1) == target)
    return (np.concatenate(sure), np.concatenate(right)) if sure else None


def calibration(sure: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Return answers, mean confidence and accuracy in each of 15 bins (NaN when empty), and the calibration error."""
    where = np.minimum((sure * BINS).astype(int), BINS - 1)
    count = np.bincount(where, minlength=BINS)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(where, sure, BINS) / count
        accuracy = np.bincount(where, right, BINS) / count
    return count, confidence, accuracy, float(np.nansum(count * np.abs(accuracy - confidence)) / len(sure))


def _reliability_panel(axes: Any, sure: np.ndarray, right: np.ndarray) -> None:
    count, confidence, accuracy, error = calibration(sure, right)
    left = np.arange(BINS) * 100 / BINS
    axes.bar(left, 100 * accuracy, 100 / BINS, align="edge", color=STUDENT, alpha=0.35, edgecolor="white")
    axes.plot([0, 100], [0, 100], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    size = 90 * np.sqrt(count / count.max())  # the area of a dot would hide how rare low confidence is
    axes.scatter(100 * confidence, 100 * accuracy, s=size, color=STUDENT, zorder=3)
    axes.text(4, 95, f"ECE {100 * error:.1f} %", va="top", color=INK)
    axes.set(xlim=(0, 100), ylim=(0, 106), xticks=(0, 50, 100), yticks=(0, 50, 100), aspect="equal")
