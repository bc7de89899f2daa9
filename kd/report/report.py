"""A study and the frame of its runs → verdict, tables, figures, two pages: built first, then put in place. No torch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kd.errors import KdError
from kd.report import cost, curves, figures, ranks, style, tables, told
from kd.report.claims import INCOMPLETE, OPEN, Compared, compare, verdict
from kd.report.frame import FINISHED, check_protocol, finished
from kd.report.measures import Measure
from kd.report.page import Picture, Section, render
from kd.report.style import Canvas
from kd.studies.spec import Study


@dataclass(frozen=True)
class Report:
    """What came out. ``verdict``: supported, contradicted, not shown, incomplete, or "" where nothing is claimed.

    ``table``: a line a row, see ``tables.numbers``; ``shown``: its measured columns; ``figures``: name → PNG;
    ``paths``: "md" and "html" → file.
    """

    verdict: str
    reasons: list[str]
    table: pd.DataFrame
    shown: list[Measure]
    compared: Mapping[str, Compared]
    figures: Mapping[str, Path]
    paths: Mapping[str, Path]


def build(study: Study, frame: pd.DataFrame, runs_dir: Path | None, out: Path) -> Report:
    """Write ``report.md``, ``report.html`` and ``figures/`` into ``out``, replacing those of before.

    ``frame``: see ``frame.of_study``; ``runs_dir``: what its ``run`` paths are relative to; None when only the frame is
    there: no learning curves, nothing over test images. ``KdError`` before anything is written.
    """
    if finished(frame).empty:
        states = ", ".join(f"{count} {status}" for status, count in frame["status"].value_counts().items())
        raise KdError(f"{study.name}: no run is finished{f' ({states})' if states else ''}: there is nothing to report")
    check_protocol(frame)
    compared = compare(study, frame, runs_dir)
    state, reasons = verdict(study, compared, frame)
    table, shown = tables.numbers(study, frame), tables.measures(study, frame)
    drawn = draw(study, frame, runs_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".report-") as folder:
            temporary = Path(folder)
            pictures = {n: Picture(style.save(f, temporary / f"{n}.png"), text) for n, (f, text) in drawn.items()}
            pages = render(_context(study, frame, compared, state, reasons, table, pictures))
            return Report(state, reasons, table, shown, compared, *_put(out, temporary, pages, list(drawn)))
    except OSError as error:
        raise KdError(f"out = {out} cannot be written: {error.strerror}") from None


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
    """Name → figure and caption, of those that these runs can show."""
    measure = tables.measures(study, frame)[0]
    roles = ROLES if any(row.teacher or row.alone for row in study.rows.values()) else ""
    drawn: dict[str, tuple[Canvas | None, str]] = {
        "bars": (figures.study_bars(study, frame, measure), BARS + roles + _diamond(study))
    }
    for number, wanted in enumerate(study.figures, start=1):
        caption = MAP if wanted.kind == "map" else LINES
        drawn[f"{wanted.kind}_{number}"] = (figures.of_grid(study, frame, wanted), caption)
    drawn["pareto"] = (cost.pareto(study, frame, measure), PARETO + roles)
    if runs_dir is not None:
        drawn["curves"] = (curves.learning(study, frame, runs_dir), CURVES)
        drawn["reliability"] = (curves.reliability(study, frame, runs_dir), RELIABILITY)
    return {name: (figure, caption) for name, (figure, caption) in drawn.items() if figure is not None}


BARS = "A dot is a seed, the stroke and the number on the right are the mean."
ROLES = " Dark: teachers; grey: students alone; blue: all others."
LINES = (
    "The line goes through the means, the band from the lowest to the highest seed, the ring is around the best mean. "
    "Dashed: the student alone."
)
MAP = "Means over seeds; lighter is better. The frame is around the best of each line."
PARETO = (
    "Means over seeds. No other row is both better and cheaper than those on the orange line. Latency: one image on "
    "the machine that trained, the median over all runs of the same network; noisy. Latency, multiply-accumulates and "
    "parameters have a panel each only where they put the networks in another order."
)
CURVES = (
    "Mean over seeds; the band goes from the lowest to the highest seed. The vertical axis begins at the lowest value "
    "after the first fifth of the epochs."
)
RELIABILITY = (
    "Bars: how often answers of that confidence are right, all seeds together, val-selected student. On the dashed "
    "line confidence is honest; bars below it are over-confident. A larger dot stands for more answers."
)


def _diamond(study: Study) -> str:
    return " Diamond: the published number." if study.published is not None and study.published.comparable else ""


# ---------------------------------------------------------------------- the page


def _context(
    study: Study,
    frame: pd.DataFrame,
    compared: Mapping[str, Compared],
    state: str,
    reasons: list[str],
    table: pd.DataFrame,
    pictures: Mapping[str, Picture],
) -> dict[str, object]:
    sections = [
        _results(study, frame, table),
        _comparisons(compared),
        _published(study, frame),
        Section("Figures", pictures=list(pictures.values())) if pictures else None,
        _protocol(study),
        _provenance(study, frame),
    ]
    missing = f"Incomplete: {int((frame['status'] != FINISHED).sum())} of {len(frame)} runs are not finished"
    words = {"": "", OPEN: "The claim was not shown", INCOMPLETE: missing}.get(state, f"The claim is {state}")
    return {
        "title": study.question or study.name,
        "name": study.name,
        "question": study.question,
        "paper": study.paper,
        "claim": study.claim,
        "verdict": state,
        "verdict_words": words,
        "reasons": reasons,
        "sections": [s for s in sections if s is not None],
    }


def _results(study: Study, frame: pd.DataFrame, table: pd.DataFrame) -> Section:
    measures = tables.measures(study, frame)
    grid = tables.main_grid(study, table, measures)
    teachers = any(row.teacher for row in study.rows.values())
    bold = "Bold: the best row that is no teacher." if teachers else "Bold: the best row."
    notes = [f"Mean ± standard deviation over n seeds; in brackets the 95 % interval. {bold}"]
    if table["n"].max() == 1:
        notes.append("There is one seed a row: no spread and no interval can be given.")
    if "mean rank" in table:
        p = _p(table.attrs["friedman_p"])
        notes.append(
            f"Mean rank: place among the students over seeds, 1 is best; Friedman's test of no difference: {p}."
        )
    grids = [grid]
    for over in ranks.over_pairs(study, frame, measures[0]):
        grids.append(tables.rank_grid(over))
        notes.append(
            f"Mean rank over {' and '.join(over.variables)}: place among the {len(over.mean_ranks)} rows of one block, "
            f"1 is best; a block is one of {over.combinations} combinations and one seed. Friedman's test of no "
            f"difference: {_p(over.p)}; it speaks of new seeds of the same combinations, not of others."
        )
    if count := len(frame) - len(finished(frame)):
        notes.append(f"{count} {'run is' if count == 1 else 'runs are'} not finished and not counted: see the end.")
    return Section("Results", grids=grids, notes=notes)


def _p(p: float | None) -> str:
    text = tables.p_value(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def _comparisons(compared: Mapping[str, Compared]) -> Section | None:
    if not compared:
        return None
    section = Section("Comparisons, paired over seeds", grids=[tables.comparison_grid(compared)])
    section.notes.append(
        "The first interval counts; a bootstrap of few seeds, also of ten, is too narrow. Holm: corrected for the "
        "number of comparisons. p of a share is that of the difference itself, so it is neither counted nor corrected "
        "again."
    )
    images = tables.image_grid(compared)
    if images is not None:
        section.grids.append(images)
        section.notes.append(
            "Second table: the same students, val-selected, on the same test images. Its interval is over images (each "
            "with all its seeds) and says how another test set would have come out, not another training. McNemar's p "
            "is twice the median over seeds, which holds however the seeds depend on one another; it is not corrected "
            "for several comparisons."
        )
    return section


def _published(study: Study, frame: pd.DataFrame) -> Section | None:
    grid = tables.published_grid(study, frame)
    if grid is None or study.published is None:
        return None
    given = study.published
    before = [f"Source: {given.source}", f"Their protocol: {given.protocol}"]
    before += [given.note] if given.note else []
    if not grid.rows:  # the paper says it in words only
        return Section("Published", before=before)
    comparable = "Data and models are the paper's" + ("; what differs is said above." if given.note else ".")
    if not given.comparable:
        comparable = (
            "Not the paper's data, models or recipe: the numbers stand side by side, but one cannot confirm or refute "
            "the other."
        )
    return Section("Published beside measured", before=before, grids=[grid], notes=[comparable])


def _protocol(study: Study) -> Section:
    picked = {
        "last": "Reported is the student after the last epoch.",
        "selected": "Reported is the student of the epoch that validation picked.",
    }[study.epoch]
    points = [
        f"{picked} The test split chooses nothing; it is used once for each student that is reported.",
        "Gap recovered: (distilled − alone) ÷ (teacher − alone) of the first measure. Retention: student ÷ teacher, "
        "test top-1. Agreement: student and teacher choose the same class.",
        "Intervals of 95 %: Student's t over seeds, Fieller's for ratios; beside them the bootstrap over seeds (BCa, "
        "9999 samples). They speak of new seeds: of initialisation, order and whatever else the seed draws.",
    ]
    if study.supported:
        points.append(
            "Supported: all conditions hold with the whole of their intervals, which needs no correction. "
            "Contradicted: one fails with the whole of its interval; with many conditions that may be chance."
        )
    return Section("Protocol", points=points)


def _provenance(study: Study, frame: pd.DataFrame) -> Section:
    done = finished(frame)
    versions = [c for c in done if str(c).startswith("version/")]
    commits = ", ".join(sorted({_short(c) for c in done["commit"].dropna()})) or "unknown"
    made = ", ".join(f"{str(c)[8:]} {' / '.join(sorted(set(done[c].dropna())))}" for c in versions)
    hours = done["wall_clock_s"].sum() / 3600
    points = [
        f"{len(done)} finished runs, {hours:.2f} hours of training in all.",
        f"Commit: {commits}.",
        f"Versions: {made}.",
    ]
    grid, same = tables.provenance(study, frame)
    points += same
    points += [f"{note[:1].upper()}{note[1:]}." for note in told.notes(study, frame)]
    points += [f"Expected cost: {study.cost}"] if study.cost else []
    mixed = [name for name, part in done.groupby("row") if part["config_hash"].nunique() > 1]
    if mixed:
        points.append(f"The seeds of {', '.join(map(str, mixed))} come from different configurations (see the table).")
    grids = [grid]
    unfinished = tables.unfinished_grid(study, frame)
    grids += [unfinished] if unfinished is not None else []
    return Section("Where it comes from", grids=grids, points=points)


def _short(commit: str) -> str:
    head, plus, _ = commit.partition("+")
    return head[:10] + (" with changes" if plus else "")
