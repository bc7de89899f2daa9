"""Print a decision: the sentence first, then what it rests on."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from kd.cli.printed import printed
from kd.deploy import decision_tables
from kd.deploy.decision import Decision, losing
from kd.deploy.plan import Plan, sentence


def show(decision: Decision, console: Console) -> None:
    """Print the sentence, one for what it hides, and the tables."""
    print(decision.sentence)
    for text in losing(decision):
        print(text)
    for table in decision_tables.tables(decision).values():
        console.print(printed(table))
    for note in decision.notes:
        print(note)


def show_plan(plans: Sequence[Plan], console: Console) -> None:
    """Print what a number of examples can show."""
    print(sentence(list(plans)))
    console.print(printed(decision_tables.of_plan(plans)))
