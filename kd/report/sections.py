"""Make the parts of a page: results, comparisons, published numbers, figures, protocol, provenance. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from kd.report import beside_teacher, notes, provenance, ranks, tables
from kd.report.claims import Compared
from kd.report.frame import finished
from kd.report.measures import Measure
from kd.report.page import Picture, Section
from kd.report.verdicts import Verdict
from kd.studies.study import Study


def of_page(
    study: Study,
    frame: pd.DataFrame,
    compared: Mapping[str, Compared],
    found: Verdict,
    table: pd.DataFrame,
    pictures: Mapping[str, Picture],
    runs_dir: Path | None = None,
) -> list[Section]:
    """Make every part that has content, in order; ``runs_dir``: of runs that are no study, beside their teacher."""
    shown = tables.measures(study, frame)
    results, comparisons = _results(study, frame, table, shown), _comparisons(compared)
    published = _published(study, frame)
    seeds = {
        "t": _seeds(table, "retention") + [c.interval.n for c in compared.values() if _by(c, "Student's t")],
        "fieller": _seeds(table, "gap recovered") + [c.interval.n for c in compared.values() if _by(c, "Fieller")],
        "published": [int(table["n"].get(row, 0)) for row in study.published.numbers] if study.published else [],
    }
    if wide := notes.few_seeds(n for counts in seeds.values() for n in counts):
        beside = results if _seeds(table, "retention") + _seeds(table, "gap recovered") else comparisons or published
        (beside or results).notes.append(wide)
    kinds = {
        "Student's t over seeds": bool(seeds["t"]),
        "Fieller's for ratios": bool(seeds["fieller"]),
        "beside them the bootstrap over seeds (BCa, 9999 samples)": any(
            c.interval.bootstrap for c in compared.values()
        ),
    }
    drawn = Section("Figures", pictures=list(pictures.values())) if pictures else None
    points = notes.of_protocol(study, found, table, shown, [k for k, v in kinds.items() if v])
    protocol = Section("Protocol", points=points)
    beside = None if runs_dir is None else beside_teacher.section(study, frame, runs_dir)
    by_class = None if runs_dir is None else beside_teacher.classes(study, frame)
    parts = [results, beside, comparisons, published, by_class, drawn, protocol, _provenance(study, frame)]
    return [section for section in parts if section is not None]


def _seeds(table: pd.DataFrame, name: str) -> list[int]:
    """Count the seeds that each interval of a share in the main table rests on."""
    return table[f"{name} n"][table[f"{name} low"].notna()].astype(int).tolist() if name in table else []


def _by(compared: Compared, method: str) -> bool:
    return compared.interval.theory is not None and compared.interval.name.startswith(method)


def _results(study: Study, frame: pd.DataFrame, table: pd.DataFrame, shown: list[Measure]) -> Section:
    grid = tables.main_grid(study, table, shown)
    section = Section("Results", grids=[grid], notes=notes.of_results(study, grid, table, shown[0]))
    for over in ranks.over_pairs(study, frame, shown[0]):
        section.grids.append(tables.rank_grid(over))
        section.notes.append(
            f"Mean rank over {' and '.join(over.variables)}: place among the {len(over.mean_ranks)} rows of one block, "
            f"1 is best; a block is one of {over.combinations} combinations and one seed. Friedman's test of no "
            f"difference: {notes.p_words(over.p)}; it speaks of new seeds of the same combinations, not of others."
        )
    if count := len(frame) - len(finished(frame)):
        section.notes.append(
            f"{count} {'run is' if count == 1 else 'runs are'} not finished and not counted: see the end."
        )
    return section


def _comparisons(compared: Mapping[str, Compared]) -> Section | None:
    if not compared:
        return None
    grid = tables.comparison_grid(compared)
    section = Section("Comparisons, paired over seeds", grids=[grid] if grid.rows else [])
    section.notes += notes.of_comparisons(compared, grid)
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
    if not grid.rows:  # the paper says it in words only, or nothing of it is measured yet
        return Section("Published", before=before)
    comparable = "Data and models are the paper's" + ("; what differs is said above." if given.note else ".")
    if not given.comparable:
        comparable = (
            "Not the paper's data, models or recipe: the numbers stand side by side, but one cannot confirm or refute "
            "the other."
        )
    dash = f"{tables.NOTHING}: not measured yet, or no interval (one seed, all seeds alike, or the other one applies)."
    small = [comparable, dash] if notes.dashes(grid) else [comparable]
    if tables.ONE_RUN in grid.head:
        small.append(
            "A published number of one run, or of an unknown number of runs, stands beside the prediction interval of "
            "one run (mean ± t · standard deviation · √(1 + 1/n)), which is wider than the interval of the mean."
        )
    return Section("Published beside measured", before=before, grids=[grid], notes=small)


def _provenance(study: Study, frame: pd.DataFrame) -> Section:
    done = finished(frame)
    versions = [c for c in done if str(c).startswith("version/")]
    commits = ", ".join(sorted({_short(c) for c in done["commit"].dropna()})) or "unknown"
    made = ", ".join(f"{str(c)[8:]} {' / '.join(sorted(set(done[c].dropna())))}" for c in versions)
    points = [provenance.total(frame), f"Commit: {commits}.", f"Versions: {made}."]
    grid, same = provenance.grid(study, frame)
    points += same
    points += [f"Expected cost: {study.cost}"] if study.cost else []
    mixed = [name for name, part in done.groupby("row") if part["config_hash"].nunique() > 1]
    if mixed:
        points.append(f"The seeds of {', '.join(map(str, mixed))} come from different configurations (see the table).")
    unfinished = provenance.unfinished(study, frame)
    return Section("Where it comes from", grids=[grid, *([unfinished] if unfinished else [])], points=points)


def _short(commit: str) -> str:
    head, plus, _ = commit.partition("+")
    return head[:10] + (" with changes" if plus else "")
