"""Make the sections of the decision's page. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kd.deploy import decision_tables
from kd.deploy.cost import of_sensitivity, sentence
from kd.deploy.decision import Decision, Disagreement
from kd.deploy.page.facts import Facts
from kd.deploy.page.head import signed
from kd.deploy.text_table import Table
from kd.report.figures import capital
from kd.report.page import Picture, Section
from kd.report.tables import NOTHING, Grid


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
        found.append(("and then on this page:", f"{facts.command}{facts.bench_key}"))
    if decision.cost is None:
        found.append(("Cost a month, saving, break-even: by prices of yours.", f"{facts.command} cost=FILE.yaml"))
    return found
