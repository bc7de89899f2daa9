"""Make what is at the head of the decision's page: four numbers, and the line of the DistilBERT paper. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kd.deploy import decision_tables
from kd.deploy.decision import CASCADE, Decision
from kd.deploy.page.facts import Facts
from kd.records.sizes import PARAMETERS
from kd.report.page import Section
from kd.report.tables import NOTHING, Grid

MINUS = re.compile(r"(?<![\w.])-(?=\d)")
NOT_MEASURED = "not measured"
PUBLISHED = (
    "Published: Sanh, Debut, Chaumond and Wolf, DistilBERT, a distilled version of BERT (2019, arXiv 1910.01108): "
    "97 % of BERT's language understanding, 40 % smaller, 60 % faster. There: a GLUE score of 77.0 of 79.5; 66 of 110 "
    "million parameters; 410 against 668 seconds for STS-B on a CPU, one sample at a time."
)


@dataclass
class Tile:
    """A number of the head: what it is, its value, what it is made of; ``command``: what measures it, "" if known."""

    label: str
    value: str
    detail: str
    command: str = ""


def signed(text: str) -> str:
    """Write the minus of numbers as a minus, and keep a number and its sign of percent on one line."""
    return MINUS.sub("−", text).replace(" %", "\u00a0%")


def tiles(decision: Decision, facts: Facts) -> list[Tile]:
    """Return the four numbers at the head: accuracy kept, smaller by, faster by, saved a year."""
    return [_kept(decision, facts), _smaller(facts), _faster(facts), _saved(decision, facts)]


def _kept(decision: Decision, facts: Facts) -> Tile:
    quality, answers = decision.quality, decision.agreement
    if quality is None:
        detail = f"{answers.differ:,} of {answers.n:,} differ; accuracy is {NOT_MEASURED}: there are no labels"
        return Tile("answers agree", f"{100 * (1 - answers.share):.1f} %", detail, "label=COLUMN")
    if quality.retention is None or quality.retention_interval is None:
        change = signed(f"{100 * quality.difference:+.1f} points")
        return Tile("accuracy", change, "both accuracies are not known: only disagreements are labelled")
    low, high = (100 * end for end in quality.retention_interval)
    shares = f"{decision_tables.percent(quality.student)} of {decision_tables.percent(quality.teacher)} %"
    return Tile("accuracy kept", f"{100 * quality.retention:.1f} %", f"{shares}; 95 %: {low:.1f} to {high:.1f} %")


def _smaller(facts: Facts) -> Tile:
    if facts.smaller is None:
        return Tile("smaller by", NOT_MEASURED, "parameters of both", facts.bench_command)
    student, teacher = facts.sizes[PARAMETERS]
    label, share = _direction(facts.smaller, "smaller by", "larger by")
    return Tile(label, f"{share:.1f} %", f"{student:,} of {teacher:,} parameters")


def _faster(facts: Facts) -> Tile:
    if facts.faster is None or facts.bench is None:
        return Tile("faster by", NOT_MEASURED, "interleaved time of both", facts.bench_command)
    speed = facts.bench.headline
    assert speed.interval is not None
    label, share = _direction(facts.faster[0], "faster by", "slower by")
    interval = f"{speed.ratio:.3g}, 95 %: {speed.interval[0]:.3g} to {speed.interval[1]:.3g}"
    return Tile(label, f"{share:.0f} %", f"time ratio {interval}; {speed.backend}, batch of {speed.batch_size}")


def _direction(share: float, more: str, less: str) -> tuple[str, float]:
    return (more, 100 * share) if share >= 0 else (less, -100 * share)


def _saved(decision: Decision, facts: Facts) -> Tile:
    if decision.cost is None:
        return Tile("saved a year", NOT_MEASURED, "prices are not given", "cost=customer_service")
    costs = decision.cascade_cost if decision.verdict == CASCADE else decision.cost
    assert costs is not None
    rows = {row[0]: row for row in decision_tables.tables(decision)["cost"].rows}
    row = rows["student" if costs is decision.cost else "cascade"]
    day = f"; paid for itself on {costs.break_even}" if costs.break_even else ""
    return Tile("saved a year", signed(row[2]), f"{row[0]} {row[1]} a month, teacher {rows['teacher'][1]}{day}")


def line(decision: Decision, facts: Facts) -> Section:
    """Write the three numbers in the form of the DistilBERT paper, with the published ones below."""
    quality = decision.quality
    kept = NOTHING
    if quality is not None and quality.retention is not None and quality.retention_interval is not None:
        low, high = (100 * end for end in quality.retention_interval)
        kept = f"{100 * quality.retention:.1f} [{low:.1f}, {high:.1f}]"
    size = NOTHING if facts.smaller is None else f"{100 * facts.smaller:.1f}"
    speed = NOTHING
    if facts.faster is not None:
        found, low, high = (100 * number for number in facts.faster)
        speed = f"{found:.0f} [{low:.0f}, {high:.0f}]"
    rows = (("this student", kept, size, speed), ("DistilBERT, published", "97", "40", "60"))
    table = Grid(("", "quality kept, %", "smaller by, %", "faster by, %"), tuple(tuple(map(signed, r)) for r in rows))
    notes = [
        "Quality kept: the student's accuracy ÷ the teacher's, 95 % interval of the paired bootstrap. Smaller: 1 − "
        "parameters ÷ parameters. Faster: the teacher's time ÷ the student's − 1, of interleaved rounds.",
        f"{PUBLISHED} Another task, another pair: the form is the same, the numbers stand side by side.",
    ]
    if NOTHING in (kept, size, speed):
        notes.insert(1, f"{NOTHING}: {NOT_MEASURED}, see below.")
    return Section("In the form of DistilBERT", grids=[table], notes=notes)
