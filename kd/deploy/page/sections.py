"""Make the parts of the decision's page: what is at its head, and its sections. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kd.deploy import decision_tables
from kd.deploy.cost import of_sensitivity, sentence
from kd.deploy.decision import CASCADE, Decision, Disagreement
from kd.deploy.page.facts import PARAMETERS, Facts
from kd.deploy.text_table import Table
from kd.report.figures import capital
from kd.report.page import Picture, Section
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


@dataclass
class Card:
    """An example that both answer differently, its text or image, and (what, answer, whether right) of each."""

    title: str
    answers: Sequence[tuple[str, str, bool]]
    text: str = ""
    picture: str = ""


@dataclass
class Part(Section):
    """A section with cards, and with tables that are folded: title → table."""

    cards: Sequence[Card] = ()
    folded: Mapping[str, Grid] = field(default_factory=dict)


def signed(text: str) -> str:
    """Write the minus of numbers as a minus, and keep a number and its sign of percent on one line."""
    return MINUS.sub("−", text).replace(" %", "\u00a0%")


def grid(table: Table) -> Grid:
    """Make the grid of a table; its numbers get a minus."""
    rows = tuple(
        tuple(cell if place < table.text else signed(cell or NOTHING) for place, cell in enumerate(row))
        for row in table.rows
    )
    strong = tuple(place for place, row in enumerate(rows) if row[-1] == "chosen")
    return Grid(tuple(table.head), rows, strong, table.text)


def _part(table: Table, title: str, notes: Sequence[str] = ()) -> Part:
    caption = [f"{capital(signed(table.caption))}."] if table.caption else []
    return Part(title, [signed(f"{table.title}.")], [grid(table)], [*caption, *notes])


# ---------------------------------------------------------------------- the head


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


# ---------------------------------------------------------------------- the sections


def sections(decision: Decision, facts: Facts, drawn: Mapping[str, Picture]) -> list[Part]:
    """Make every part that has content, in order."""
    tables = decision_tables.tables(decision)
    parts = [
        _quality(decision, tables),
        _plan(decision, tables["plan"]),
        _size(facts, drawn.get("pareto")),
        _cost(decision, tables),
        _cascade(tables, drawn.get("cascade")),
        _part(tables["slices"], "What loses most", SLICES) if "slices" in tables else None,
        _cards(decision, facts, tables),
        _part(tables["calibration"], "Calibration", CALIBRATION) if "calibration" in tables else None,
    ]
    return [part for part in parts if part is not None]


SLICES = (
    "A slice has ten examples or more. Its interval holds for all slices together (Bonferroni); p is McNemar's exact "
    "test, corrected by Holm.",
)
CALIBRATION = (
    "ECE: how far confidence is from accuracy, on average over 15 bins. NLL: negative log-likelihood. Scaled: after "
    "temperature scaling (Guo et al. 2017), which changes no answer.",
)
QUALITY = (
    "In brackets, of one accuracy: Wilson's interval of 95 %. Of the difference: Tango's score interval for paired "
    "shares (1998), which never disagrees with the test of non-inferiority; McNemar's test is exact.",
)


def _quality(decision: Decision, tables: Mapping[str, Table]) -> Part:
    margin = f"The margin of {100 * decision.settings.margin:g} points is the loss of accuracy that is accepted."
    if decision.quality is None:
        answers = decision.agreement
        text = (
            f"There are no labels: what is known is that {answers.differ:,} of {answers.n:,} answers differ, "
            f"{100 * answers.share:.1f} %, at most {100 * answers.limit:.1f} % (95 %, Clopper and Pearson). Accuracy "
            "cannot differ by more."
        )
        return Part("Quality", [text, margin])
    found = _part(tables["quality"], "Quality", QUALITY)
    quality = decision.quality
    shown = "above" if quality.lower > -quality.margin else "not above"
    limit = signed(f"{100 * quality.lower:+.1f}")
    text = f"{margin} The student's lower limit (one-sided, 95 %) is {limit} points, {shown} −{100 * quality.margin:g}."
    found.before.insert(0, signed(text))
    return found


def _plan(decision: Decision, table: Table) -> Part:
    found = _part(table, "How many examples would settle it")
    quality = decision.quality
    if quality is not None:
        text = (
            f"{quality.n:,} examples were decided on. With {100 * quality.discordant:.1f} % that one of the two alone "
        )
        text += f"gets right, {quality.needed:,} settle the margin if there is no difference"
        if quality.needed_as_measured is not None:
            text += f", {quality.needed_as_measured:,} if it is as measured"
        found.before.insert(0, signed(f"{text} (power 80 %)."))
    found.notes.append(
        "Discordant: examples that one of the two alone gets right. Score test: Nam (1997); the textbook's (1.645 + "
        "0.842)² · discordant ÷ margin² is too few where they are rare."
    )
    return found


def _size(facts: Facts, picture: Picture | None) -> Part | None:
    rows = [
        (title.replace(", bytes", ", MB"), *(_number(title, value) for value in pair), _ratio(pair))
        for title, pair in facts.sizes.items()
        if any(pair)
    ]
    found = Part("Size and speed")
    if rows:
        found.grids.append(Grid(("", "student", "teacher", "ratio"), tuple(rows)))
    if facts.bench is not None:
        found.grids.append(_speeds(facts))
        left = [f"{name} is left out: {reason}." for name, reason in facts.bench.left_out.items()]
        found.notes += [
            "Time ratio: the student's time of a pass ÷ the teacher's, the median of rounds that measure both in turns "
            "with its 95 % interval. Milliseconds hold for that machine at that time.",
            *left,
        ]
    found.pictures = [] if picture is None else [picture]
    return found if rows or facts.bench is not None or picture is not None else None


def _speeds(facts: Facts) -> Grid:
    assert facts.bench is not None
    other = next(name for name in facts.bench.sizes if name != "student")
    rows = []
    for speed in facts.bench.speeds:
        ratio = NOTHING
        if speed.ratio is not None and speed.interval is not None:
            ratio = f"{speed.ratio:.3g} [{speed.interval[0]:.3g}, {speed.interval[1]:.3g}]"
        milliseconds = [f"{speed.milliseconds[name]['p50']:.3g}" for name in ("student", other)]
        samples = [f"{speed.throughput[name]:,.0f}" for name in ("student", other)]
        rows.append((speed.backend, str(speed.batch_size), ratio, *milliseconds, *samples))
    head = ("backend", "batch", "time ratio", "student, ms", "teacher, ms", "student, samples/s", "teacher, samples/s")
    return Grid(head, tuple(rows))


def _number(title: str, value: int | None) -> str:
    if value is None:
        return NOTHING
    return f"{value / 1e6:,.3g}" if title.endswith("bytes") else f"{value:,}"


def _ratio(pair: tuple[int | None, int | None]) -> str:
    student, teacher = pair
    return f"{student / teacher:.3g}" if student and teacher else NOTHING


def _cost(decision: Decision, tables: Mapping[str, Table]) -> Part | None:
    if decision.cost is None:
        return None
    found = _part(tables["cost"], "Cost")
    found.before.insert(0, sentence(decision.cost))
    found.notes.append("In a cascade the student is paid for every request, the teacher for its share.")
    if decision.cost.sensitivity:
        table = of_sensitivity(decision.cost)
        found.folded = {table.title: grid(table)}
    return found


def _cascade(tables: Mapping[str, Table], picture: Picture | None) -> Part | None:
    if "cascade" not in tables:
        return None
    found = _part(tables["cascade"], "Student first, teacher where it is not sure")
    found.folded, found.grids = {"Thresholds": found.grids[0]}, []
    found.pictures = [] if picture is None else [picture]
    return found


def _cards(decision: Decision, facts: Facts, tables: Mapping[str, Table]) -> Part | None:
    if "disagreements" not in tables:
        return None
    first = ", what the student loses first" if decision.quality is not None else ""
    before = [f"{tables['disagreements'].title}{first}."]
    return Part("Where they disagree", before, cards=[_card(d, facts) for d in decision.disagreements])


def _card(found: Disagreement, facts: Facts) -> Card:
    sure = "" if found.confidence is None else f" ({100 * found.confidence:.0f} % sure)"
    answers = [
        ("student", f"{found.student}{sure}", found.right == "student"),
        ("teacher", found.teacher, found.right == "teacher"),
    ]
    if found.label is not None:
        answers.insert(0, ("right answer", found.label, False))
    return Card(f"row {found.row}", answers, found.text or "", facts.pictures.get(found.row, ""))


def missing(decision: Decision, facts: Facts) -> list[tuple[str, str]]:
    """List what was not measured, each with the command that measures it."""
    found = []
    for note in decision.notes:
        key = "label" if decision.quality is None else "student_confidence" if "student_confidence" in note else ""
        found.append((f"{capital(note)}.", f"{facts.command} {key}=COLUMN" if key else ""))
    if facts.bench is None:
        text = "Speed" if facts.smaller is not None else "Speed and size"
        found.append((f"{text}, of both networks in turns:", facts.bench_command))
        found.append(("and then on this page:", f"{facts.command} bench=bench.json"))
    if decision.cost is None:
        found.append(("Cost a month, saving, break-even: by prices of yours.", f"{facts.command} cost=FILE.yaml"))
    return found
