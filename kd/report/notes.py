"""Write the notes beside the tables: only what is on this page is explained. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from kd.report.claims import Compared, label_of
from kd.report.measures import Measure
from kd.report.stats import half_width
from kd.report.tables import NOTHING, Grid, p_value
from kd.report.verdicts import CONTRADICTED, EQUIVALENT, REJECTED, SUPPORTED, UNDECIDED, Verdict
from kd.studies.study import Study

SHARES = ("gap recovered", "retention")
FEW = 3  # seeds: up to so many, an interval is so wide that it needs a word


def of_results(study: Study, grid: Grid, table: pd.DataFrame, measure: Measure) -> list[str]:
    """Explain the numbers of the main table, what is bold, and why an interval or a number is not there."""
    spread = table["n"].max() > 1
    shares = [name for name in SHARES if name in table]
    brackets = any(table[f"{name} low"].notna().any() for name in shares)
    notes = ["There is one seed a row: no spread and no interval can be given."]
    if spread:
        notes = [f"Mean ± standard deviation over n seeds{'; in brackets the 95 % interval' if brackets else ''}."]
    notes = [" ".join([*notes, *_bold(study, grid, measure)])]
    if "mean rank" in table:
        friedman = p_words(table.attrs["friedman_p"])
        notes.append(
            f"Mean rank by {measure.title}: place among the students over seeds, 1 is best; Friedman's test of no "
            f"difference: {friedman}."
        )
    reasons = [reason for name in shares if spread for reason in _reasons(table, name)]
    if reasons:
        notes.append(f"No brackets, or no share at all: {'; '.join(dict.fromkeys(reasons))}.")
    return notes + ([f"{NOTHING}: not measured, or of no meaning for that row."] if dashes(grid) else [])


def _bold(study: Study, grid: Grid, measure: Measure) -> list[str]:
    if not grid.strong:
        return []
    rows = "row" if len(grid.strong) == 1 else "rows"
    epoch = f" ({measure.epoch})" if measure.epoch else ""
    named = ", the measure of the study" if study.question or study.claim else ""
    teachers = list(dict.fromkeys(f"“{label_of(study, row.teacher)}”" for row in study.rows.values() if row.teacher))
    left = (
        " and ".join(teachers) if len(teachers) < 4 else f"the {len(teachers)} rows that others have as their teacher"
    )
    left = f"; left out: {left}" if left else ""
    return [f"Bold: the {rows} with the best {measure.title}{epoch}{named}{left}."]


def _reasons(table: pd.DataFrame, name: str) -> list[str]:
    """Say why rows have no interval of a share, each reason with its rows."""
    lacking = table[table[f"{name} low"].isna() & table[f"{name} note"].fillna("").astype(bool) & (table["n"] > 0)]
    found = lacking.groupby(f"{name} note", sort=False)["label"].apply(", ".join)
    return [f"{name} of {labels} ({note})" for note, labels in found.items()]


def of_comparisons(compared: Mapping[str, Compared], grid: Grid) -> list[str]:
    """Explain which interval counts, what the p values are, and which comparisons are not in the table."""
    intervals = [found.interval for found in compared.values() if found.interval.n]
    notes = []
    if any(interval.bootstrap for interval in intervals):
        notes.append("The first interval counts; a bootstrap of few seeds, also of ten, is too narrow.")
    if any(found.corrected is not None for found in compared.values()):
        notes.append("Holm: p corrected for the number of comparisons.")
    if any(found.comparison.share_of and found.interval.p is not None for found in compared.values()):
        notes.append("p of a share is that of the difference itself, so it is neither counted nor corrected again.")
    notes = [" ".join(notes)] if notes else []
    if any(interval.theory is None for interval in intervals):
        notes.append(f"{NOTHING}: there is no interval, for the reason in brackets.")
    elif dashes(grid) and any(interval.bootstrap is None for interval in intervals):
        notes.append(f"{NOTHING}: the bootstrap has no interval here.")
    left = [f"{name} ({found.interval.note})" for name, found in compared.items() if not found.interval.n]
    return notes + ([f"Not in the table: {'; '.join(left)}."] if left else [])


def few_seeds(counts: Iterable[int]) -> str:
    """Warn of intervals of two or three seeds, by the numbers of seeds that a page's intervals rest on; or ""."""
    few = sorted({n for n in counts if 1 < n <= FEW})
    if not few:
        return ""
    widths = ", ".join(f"{half_width(n):.1f} with {n}" for n in (2, 3, 5, 10))
    return (
        f"An interval of {' or '.join(map(str, few))} seeds is very wide, and may reach values that cannot be, below 0 "
        f"or above 100 %: by Student's t it is the mean ± so many standard deviations: {widths} seeds. Read it as “so "
        "few seeds cannot tell”; more seeds narrow it."
    )


def dashes(grid: Grid) -> bool:
    """Tell whether a number is missing in a table."""
    return any(NOTHING in row for row in grid.rows)


def p_words(p: float | None) -> str:
    """Write ``p = 0.012``, ``p < 0.001``."""
    text = p_value(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def of_protocol(
    study: Study, verdict: Verdict, table: pd.DataFrame, shown: Sequence[Measure], intervals: Sequence[str]
) -> list[str]:
    """Explain the words of this page. ``intervals``: the kinds of intervals that it has."""
    picked = {
        "last": "Reported is the student after the last epoch.",
        "selected": "Reported is the student of the epoch that validation picked.",
    }[study.epoch]
    points = [f"{picked} The test split chooses nothing; it is used once for each student that is reported."]
    words = {
        "Gap recovered: (distilled − alone) ÷ (teacher − alone) of the first measure, of the rows of this page.": (
            "gap recovered" in table
        ),
        "Retention: test top-1, student ÷ teacher with the weights that it learned from, mostly those that validation "
        "picked; its own row may be of the last epoch.": "retention" in table,
        "Agreement: student and teacher choose the same class.": any(m.name == "agreement" for m in shown),
    }
    points += [" ".join(found)] if (found := [text for text, there in words.items() if there]) else []
    if intervals:
        how = "; ".join(intervals)
        speak = "They speak of new seeds: of initialisation, order and whatever else the seed draws."
        points.append(f"Intervals of 95 %: {how}. {speak}")
    return points + of_verdict(verdict)


def of_verdict(verdict: Verdict) -> list[str]:
    """Explain the words of the verdict that the page has."""
    meanings = {
        SUPPORTED: "Supported: the whole 95 % interval fulfils the condition; that all do needs no correction.",
        EQUIVALENT: "Equivalent: the 90 % interval lies within ± the smallest effect of interest (two one-sided tests "
        "at 5 %).",
        UNDECIDED: "Undecided: the interval fulfils the condition in part; beside it is the smallest effect that a "
        "two-sided paired t-test at 5 % shows with a power of 80 %, given the observed spread of the differences.",
        REJECTED: "Rejected: none of the interval fulfils a condition of our own, and says nothing against the paper.",
        CONTRADICTED: "Contradicted: none of the interval fulfils a condition that the paper itself claims.",
    }
    words = {judged.word for judged in verdict.conditions}
    points = [text for word, text in meanings.items() if word in words]
    if len(verdict.conditions) > 1 and words & {REJECTED, CONTRADICTED}:
        points.append("With many conditions one that fails may be chance.")
    if any(judged.one_teacher for judged in verdict.conditions):
        points.append(
            "Given this teacher: the compared students learn from one run of it, whose own spread is in no interval."
        )
    if verdict.exploratory:
        points.append("Exploratory: before the runs the design was not known to show its smallest effects of interest.")
    return [" ".join(points)] if points else []
