"""Build the report of a study from the frame of its runs: verdict, tables, figures, two pages. No torch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kd.errors import KdError
from kd.report import cost, curves, figures, override_drift, sections, style, tables, teacher_weights
from kd.report.claims import Compared, compare
from kd.report.frame import FINISHED, check_protocol, finished
from kd.report.measures import Measure
from kd.report.page import Picture, Section, render
from kd.report.run_row import NOT_FINITE
from kd.report.style import Canvas
from kd.report.verdicts import Verdict, verdict
from kd.studies.study import Study


@dataclass(frozen=True)
class Report:
    """What came out. ``verdict``: the judged conditions, none where nothing is claimed.

    ``table``: a line a row, see ``tables.numbers``; ``shown``: its measured columns; ``figures``: name → PNG;
    ``paths``: "md" and "html" → file.
    """

    verdict: Verdict
    table: pd.DataFrame
    shown: list[Measure]
    compared: Mapping[str, Compared]
    figures: Mapping[str, Path]
    paths: Mapping[str, Path]
    notes: Sequence[str] = ()  # what a reader must know beside the verdict


def build(study: Study, frame: pd.DataFrame, runs_dir: Path | None, out: Path, about: Sequence[str] = ()) -> Report:
    """Write ``report.md``, ``report.html`` and ``figures/`` into ``out``, replacing those of before.

    ``frame``: see ``frame.of_study``; ``runs_dir``: what its ``run`` paths are relative to; None when only the frame is
    there: no learning curves, nothing over test images. ``about``: paragraphs above the results. ``KdError`` before
    anything is written.
    """
    if finished(frame).empty:
        states = ", ".join(f"{count} {status}" for status, count in frame["status"].value_counts().items())
        why = "".join(f"; {note}" for note in _not_finite(frame)[:1])
        found = f" ({states}{why})" if states else ""
        raise KdError(f"{study.name}: no run is finished{found}: there is nothing to report")
    check_protocol(frame)
    compared = compare(study, frame, runs_dir)
    judged = verdict(study, compared, frame)
    table, shown = tables.numbers(study, frame), tables.measures(study, frame)
    drawn = draw(study, frame, runs_dir)
    sentences = [*override_drift.notes(study, frame), *teacher_weights.notes(study, frame), *_not_finite(frame)]
    notes = [f"{figures.capital(note)}." for note in sentences]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".report-") as folder:
            temporary = Path(folder)
            pictures = {n: Picture(style.save(f, temporary / f"{n}.png"), text) for n, (f, text) in drawn.items()}
            beside = None if study.question or study.claim else runs_dir
            parts = sections.of_page(study, frame, compared, judged, table, pictures, beside)
            pages = render(_context(study, [*about, *notes], judged, frame, parts))
            return Report(judged, table, shown, compared, *_put(out, temporary, pages, list(drawn)), notes)
    except OSError as error:
        raise KdError(f"out = {out} cannot be written: {error.strerror}") from None


def _not_finite(frame: pd.DataFrame) -> list[str]:
    """Name each run that ended, and is left out because a metric of its predictions is no number."""
    bad = frame[frame["status"] == NOT_FINITE]
    return [f"run {run} is left out: {error}" for run, error in zip(bad["run"], bad["error"], strict=True)]


def _put(
    out: Path, temporary: Path, pages: Mapping[str, str], names: list[str]
) -> tuple[dict[str, Path], dict[str, Path]]:
    (out / "figures").mkdir(exist_ok=True)
    pictures = {name: out / "figures" / f"{name}.png" for name in names}
    for name, path in pictures.items():
        os.replace(temporary / f"{name}.png", path)
    paths = {kind: out / f"report.{kind}" for kind in pages}
    for kind, text in pages.items():
        (temporary / kind).write_text(text, encoding="utf-8")
        os.replace(temporary / kind, paths[kind])
    return pictures, paths


# ---------------------------------------------------------------------- figures


def draw(study: Study, frame: pd.DataFrame, runs_dir: Path | None) -> dict[str, tuple[Canvas, str]]:
    """Draw the figures that these runs can show: name → figure and caption."""
    shown = tables.measures(study, frame)
    measure, roles = shown[0], _roles(study, frame)
    drawn: dict[str, tuple[Canvas | None, str]] = {
        "bars": (figures.study_bars(study, frame, measure), BARS + roles + _diamond(study))
    }
    tested = next((m for m in shown if "/test/" in m.column), measure)
    if "/val/" in measure.column and tested != measure:  # validation chose: what it came to on test stands beside it
        drawn["bars_test"] = (figures.study_bars(study, frame, tested), BARS + roles)
    for number, wanted in enumerate(study.figures, start=1):
        figure = figures.of_grid(study, frame, wanted)
        caption = MAP if wanted.kind == "map" else LINES + (DASHED if figures.dashed(figure) else "")
        drawn[f"{wanted.kind}_{number}"] = (figure, caption)
    front = cost.pareto(study, frame, measure)
    drawn["pareto"] = (front, cost.caption(front, measure) + roles if front is not None else "")
    if runs_dir is not None:
        drawn["curves"] = (curves.learning(study, frame, runs_dir), CURVES)
        drawn["reliability"] = (curves.reliability(study, frame, runs_dir), RELIABILITY)
    return {name: (figure, caption) for name, (figure, caption) in drawn.items() if figure is not None}


BARS = "A dot is a seed, the stroke and the number on the right are the mean."
LINES = (
    "The line goes through the means, the band from the lowest to the highest seed, the ring is around the best mean."
)
DASHED = " Dashed: the student alone."
MAP = "Means over seeds; lighter is better. The frame is around the best of each line."
CURVES = (
    "Mean over seeds; the band goes from the lowest to the highest seed. The vertical axis begins at the lowest value "
    "after the first fifth of the epochs."
)
RELIABILITY = (
    "Bars: how often answers of that confidence are right, all seeds together, val-selected student. On the dashed "
    "line confidence is honest; bars below it are over-confident. A larger dot stands for more answers."
)


def _roles(study: Study, frame: pd.DataFrame) -> str:
    """Explain the colours, where rows that are drawn have different roles."""
    done, rows = set(finished(frame)["row"]), study.rows.values()
    parts = {"dark: teachers": {row.teacher for row in rows}, "grey: students alone": {row.alone for row in rows}}
    there = [text for text, names in parts.items() if names & done]
    return f" {figures.capital('; '.join([*there, 'blue: all others']))}." if there else ""


def _diamond(study: Study) -> str:
    return " Diamond: the published number." if study.published is not None and study.published.comparable else ""


# ---------------------------------------------------------------------- the page


def _context(
    study: Study, about: Sequence[str], found: Verdict, frame: pd.DataFrame, sections: list[Section]
) -> dict[str, object]:
    missing = f"Incomplete: {int((frame['status'] != FINISHED).sum())} of {len(frame)} runs are not finished"
    count = f"{len(found.conditions)} condition{'' if len(found.conditions) == 1 else 's'}"
    words = missing if found.incomplete else f"{count}: {found.headline}"
    return {
        "title": study.question or study.name,
        "name": study.name,
        "question": study.question,
        "paper": study.paper,
        "claim": study.claim,
        "about": about,
        "verdict": found,
        "verdict_words": words,
        "sections": sections,
    }
