"""Write the page of a decision: one HTML file, in one step. No torch."""

from __future__ import annotations

import tempfile
from pathlib import Path

from kd.deploy.decision import CASCADE, KEEP, MORE, REPLACE, Decision, losing
from kd.deploy.page import figures, head, sections
from kd.deploy.page.facts import Facts
from kd.records import record
from kd.report import style
from kd.report.page import Picture, html

TONES = {REPLACE: "good", CASCADE: "good", KEEP: "bad", MORE: "open"}


def write(path: Path, decision: Decision, facts: Facts) -> None:
    """Write the page, which needs no other file. All texts of others are escaped."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = {}
        for name, figure in (("pareto", figures.pareto(decision, facts)), ("cascade", figures.cascade(decision))):
            if figure is not None:
                drawn[name] = Picture(style.save(figure, Path(folder) / f"{name}.png"), CAPTIONS[name])
        word, _, reason = decision.sentence.partition(": ")
        context = {
            "title": f"{word}: {facts.source}",
            "source": facts.source,
            "tone": TONES[decision.verdict],
            "word": word,
            "reason": head.signed(reason),
            "losing": [head.signed(text) for text in losing(decision)],
            "tiles": head.tiles(decision, facts),
            "line": head.line(decision, facts),
            "sections": sections.sections(decision, facts, drawn),
            "missing": sections.missing(decision, facts),
            "rules": RULES,
            "held": _held(decision),
            "points": facts.points,
            "command": facts.command,
        }
        record.write_text(path, html("decision", context, "kd.deploy.page"))


def _held(decision: Decision) -> int:
    """Return the place of the rule that decided."""
    if decision.verdict == KEEP:
        return 0 if decision.cost is not None and decision.cost.saving_month <= 0 else 3
    return {REPLACE: 1, CASCADE: 2, MORE: 4}[decision.verdict]


CAPTIONS = {
    "pareto": "Further left is cheaper, higher is better. Upright strokes: Wilson's interval of 95 % of each accuracy; "
    "level: that of the time ratio. In time, a cascade costs the student's pass for every sample and the teacher's for "
    "its share.",
    "cascade": "A point is a threshold, measured on examples that did not choose it: below it the teacher answers. On "
    "the far left the student answers alone. Ring: the lowest threshold that validation showed to be good enough.",
}
RULES = (
    "The student costs no less than the teacher, where prices are given: do not replace.",
    "The lower limit of the difference is above −margin (non-inferior): replace.",
    "A cascade meets its target on test and costs less than the teacher: replace with a cascade.",
    "The upper limit of the difference is below −margin: do not replace.",
    "Else: more examples needed.",
)
