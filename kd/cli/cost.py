"""``kd cost``: what student and teacher cost a month, what is saved, and when the training has paid for itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kd.cli.printed import printed
from kd.deploy.cost import Costs, compare, money, of_sensitivity, sentence
from kd.deploy.cost_file import names, read
from kd.errors import KdError
from kd.records import record

USAGE = """kd cost NAME|FILE.yaml [KEY=VALUE ...] [out=FILE.json]

Money a month of student and teacher, what is saved a year, what the training costs, the day on which it has paid for
itself, and how all of this changes with each input. NAME is a file of conf/cost: {names}.

  kd cost customer_service                                 8,000 conversations a month, by the token
  kd cost customer_service volume.requests=20000 training.labelling=400
  kd cost my_prices.yaml out=cost.json                     a copy of such a file, with prices of your own

  currency=EUR|€|…                    a code of ISO 4217 or a sign
  volume.requests tokens_in tokens_out unit                a month, and the tokens of each
  student.price_in price_out                               of a million tokens; teacher.… as well
  student.price_per_hour requests_per_second machines      or by the hour of a machine; machines=null: as long as needed
  student.fixed                                            a month, beside it
  training.NAME                                            amounts that are paid once
  start=YYYY-MM-DD                                         when the student begins to answer; null: today"""


def main(argv: Sequence[str]) -> int:
    """Read the inputs, compute, print the tables."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE.format(names=", ".join(names())))
        return 0
    sources = [a for a in argv if "=" not in a or Path(a).is_file()]
    if len(sources) != 1 or sources[0].startswith("-"):
        raise KdError(f"kd cost takes one name of conf/cost ({', '.join(names())}) or one YAML file, and KEY=VALUE")
    outs = [a.partition("=")[2] for a in argv if a.startswith("out=")]
    out = checked_out(outs[-1]) if outs else None
    overrides = [a for a in argv if a != sources[0] and not a.startswith("out=")]
    costs = compare(read(sources[0], overrides))
    show(costs, Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110))
    if out is not None:
        record.write_text(out, json.dumps(asdict(costs), indent=2, ensure_ascii=False) + "\n")
    return 0


def checked_out(given: str) -> Path:
    """Return the path of ``out=``. ``KdError`` for one that cannot be a JSON file."""
    path = Path(given)
    if path.suffix != ".json":
        raise KdError(f"out = {given} is not allowed: its name must end in .json")
    if not path.resolve().parent.is_dir():
        raise KdError(f"out = {given} cannot be written: its folder does not exist")
    return path


def show(costs: Costs, console: Console) -> None:
    """Print one sentence, the money a month, and the sensitivity table."""
    print(sentence(costs))
    table = Table(title=f"{costs.requests:,.0f} {costs.unit} a month")
    table.add_column("")
    for name in ("a month", f"of {'1,000 ' + costs.unit}", "a year"):
        table.add_column(name, justify="right")
    rows = {"student": costs.student_month, "teacher": costs.teacher_month, "saved": costs.saving_month}
    for name, amount in rows.items():
        amounts = (amount, amount / costs.requests * 1000, 12 * amount)
        table.add_row(name, *(money(each, costs.currency) for each in amounts))
    console.print(table)
    if costs.sensitivity:
        console.print(printed(of_sensitivity(costs)))
