"""``kd decide``: can the student replace its teacher, what is lost, and what would settle it."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from kd.config.rules import Rule, number, refusals, refuse, whole
from kd.deploy.settings import Columns, Settings
from kd.errors import KdError, did_you_mean

TEXT = Rule("a text", bool)
COLUMNS = [one.name for one in fields(Columns) if one.name != "slices"]
RULES = {
    **dict.fromkeys((*COLUMNS, "image", "encoding", "cost", "validation", "run"), TEXT),
    "margin": number(above=0, below=1),
    "target": number(above=0, below=1),
    "difference": number(least=-1, most=1),
    "examples": whole(20),
    "show": whole(0),
    "seed": whole(0),
}
OTHERS = ("predictions", "slices", "out", "write", "page", "bench")
EVERY = ("margin", "target", "slices", "cost", "prices", "show", "seed", "out", "page", "bench")
PRICES = ("volume.", "student.", "teacher.", "training.", "currency", "start")  # keys of kd cost begin so
FORMS = {  # what is decided on → the keys that it takes
    "predictions": ("predictions", *COLUMNS, "image", "encoding", "validation", *EVERY),
    "run": ("run", "write", *EVERY),
    "examples": ("examples", "difference", "margin", "out"),
}

USAGE = """kd decide FILE [label=COLUMN] [teacher=COLUMN] [student=COLUMN] [KEY=VALUE ...]
kd decide RUN [KEY=VALUE ...]
kd decide examples=N [difference=D] [margin=M]

Can the student replace its teacher? One sentence, then what it rests on. FILE (csv, tsv, jsonl, parquet) has an
example a row: the answers of both, and the label. Without labels it says which examples to label: those on which the
two disagree.

  kd decide predictions.csv label=intent teacher=gpt student=bert
  kd decide predictions.csv student_confidence=p slices=[class,length,source] text=question cost=customer_service
  kd decide RUN                                a run's test split, thresholds chosen on its validation split
  kd decide RUN page=decision.html bench=bench.json cost=customer_service      all of it as one page
  kd decide examples=200 difference=-0.03      before labelling: what can so many examples show?

  label=label teacher=teacher student=student  the columns (these names by default)
  margin=0.03                                  loss of accuracy that is accepted, a share: 3 points
  slices=[class,length,COLUMN,...] text=COLUMN parts that are compared, corrected for how many they are
  student_confidence=COLUMN                    of its answer, 0 to 1: calibration, and a cascade (the teacher answers
                                               where the student is not sure); teacher_confidence=COLUMN; columns of
                                               these names are found
  student_probabilities=PREFIX                 or of all classes, in the columns PREFIX + class; teacher_probabilities
  validation=0.5|FILE|COLUMN                   where temperature and threshold are chosen: a share of the rows, another
                                               file, or a column of val and test
  target=ACCURACY                              of the cascade, instead of the teacher's less the margin
  cost=NAME|FILE.yaml                          as kd cost takes it, with its keys (volume.requests=20000): what is
                                               saved, and what the cascade costs
  page=FILE.html                               one page that opens offline, with figures, texts and images; of a FILE
                                               image=COLUMN has the paths of these, relative to FILE
  bench=FILE.json                              speed and size for the page: kd bench RUN against=teacher out=FILE.json;
                                               of a run by default its bench.json
  show=10 seed=0 encoding=utf-8                disagreements that are listed
  out=FILE.json                                all numbers; write=FILE.csv: the examples of a run as such a file"""


def main(argv: Sequence[str]) -> int:
    """Parse, decide, print the sentence and the tables."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    given = parsed(argv)
    from rich.console import Console

    from kd.cli import decide_tables  # start-up: numpy, as all of these
    from kd.cli.cost import checked_out  # start-up
    from kd.deploy import cost_file, sources  # start-up
    from kd.deploy.decision import decide  # start-up
    from kd.deploy.plan import plan  # start-up
    from kd.records import bench_file, record  # start-up

    out = checked_out(given["out"]) if "out" in given else None
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 118)
    if "examples" in given:
        planned = plan(given["examples"], given.get("difference", 0.0), given.get("margin", Settings().margin))
        decide_tables.show_plan(planned, console)
        found: Any = [asdict(one) for one in planned]
    else:
        cost = cost_file.read(given["cost"], given.get("prices", ())) if "cost" in given else None
        kept = Path(given.get("run", "")) / bench_file.KEPT
        if "page" in given and "run" in given and kept.is_file():
            given.setdefault("bench", str(kept))
        bench = bench_file.read(given["bench"]) if "bench" in given else None
        examples, validation = sources.examples(given)
        if "page" in given:
            given.setdefault("slices", sources.all_slices(examples))
        settings = Settings(**{k: given[k] for k in ("margin", "target", "slices", "show", "seed") if k in given})
        decision = decide(examples, settings, validation, cost)
        rows, command = len(examples), shlex.join(["kd", "decide", *argv])
        about = _about(given, decision, rows, bench, command) if "page" in given else None
        if "write" in given:  # files first: who reads the tables may stop before their end
            record.write_text(Path(given["write"]), sources.table(examples))
        if about is not None:
            from kd.deploy.page.write import write  # start-up: matplotlib

            write(Path(given["page"]), decision, about)
        found = asdict(decision)
    if out is not None:
        record.write_text(out, json.dumps(_finite(found), indent=2, ensure_ascii=False) + "\n")
    if "examples" not in given:
        decide_tables.show(decision, console)
        if about is not None:
            print(given["page"])
    return 0


def _about(given: dict[str, Any], decision: Any, rows: int, bench: Any, command: str) -> Any:
    """Describe what was decided on, for the page. ``KdError``: a bench of other networks, images that are not there."""
    from kd.deploy.page import facts  # start-up: matplotlib

    if "run" in given:
        from kd.deploy.samples import pictures  # start-up: torch

        found = pictures(given["run"], "test", [d.row - 1 for d in decision.disagreements if d.text is None])
        return facts.of_run(given["run"], command, bench, {index + 1: image for index, image in found.items()})
    path, shown = given["predictions"], {}
    if "image" in given:
        from kd.deploy.samples import pictures_of_table  # start-up: torch

        wrong = [d.row for d in decision.disagreements]
        shown = pictures_of_table(path, given["image"], wrong, given.get("encoding", "utf-8"))
    return facts.of_table(path, rows, command, bench, shown)


def parsed(argv: Sequence[str]) -> dict[str, Any]:
    """Read the arguments. ``KdError`` names each key that is unknown, and each value that is not allowed."""
    given: dict[str, Any] = {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or Path(argument).exists():
            if not Path(argument).exists():
                raise KdError(f"{argument}: there is no such file, and no such run")
            key, value = ("run" if Path(argument).is_dir() else "predictions"), argument
        if key.startswith(PRICES):
            given.setdefault("prices", []).append(argument)
            continue
        if key not in (*RULES, *OTHERS):
            near = did_you_mean(key, (*RULES, *OTHERS))
            raise KdError(f"{argument} is not understood: kd decide has no {key}{near}; kd decide --help lists them")
        if key in given:
            raise KdError(f"kd decide takes one {key}, given: {given[key]} and {value}")
        given[key] = (
            [v.strip() for v in value.strip("[]").split(",") if v.strip()] if key == "slices" else _read(key, value)
        )
    refuse(refusals("", given, RULES))
    _check_form(given)
    _check_files(given)
    return given


def _check_form(given: dict[str, Any]) -> None:
    """Raise ``KdError`` for keys that do not belong to what is decided on, or to one another."""
    forms = [form for form in FORMS if form in given]
    if len(forms) != 1:
        both = f"given: {' and '.join(forms)}" if forms else "none is given"
        raise KdError(f"kd decide takes a file of predictions, run=RUN, or examples=N; {both}")
    refuse([f"{key}=… has no use with {forms[0]}=…" for key in given if key not in FORMS[forms[0]]])
    if "length" in given.get("slices", ()) and forms[0] == "predictions" and "text" not in given:
        raise KdError("slices = length needs text=COLUMN, of which it is the length")
    known = ("class", "length")
    if forms[0] == "run" and (others := [name for name in given.get("slices", ()) if name not in known]):
        raise KdError(
            f"slices = {others[0]} is not known of a run: it must be class or length (others: write=FILE.csv, and add "
            "them)"
        )
    for needing, needed in (("prices", "cost"), ("bench", "page"), ("image", "page")):
        if needing in given and needed not in given:
            key = given["prices"][0].partition("=")[0] if needing == "prices" else needing
            raise KdError(f"{key}=… has no use without {needed}=…")


def _check_files(given: dict[str, Any]) -> None:
    """Raise ``KdError`` for a name of another kind, or in a folder that does not exist, before anything is measured."""
    for key, ending in (("write", ".csv"), ("page", ".html")):
        if key in given and not (given[key].endswith(ending) and Path(given[key]).resolve().parent.is_dir()):
            raise KdError(
                f"{key} = {given[key]} is not allowed: it must be a name that ends in {ending}, in a folder that exists"
            )


def _read(key: str, value: str) -> Any:
    """Read a number where the key wants one; another text stays one, which its rule then refuses."""
    if key in RULES and RULES[key] is not TEXT:
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by null: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
