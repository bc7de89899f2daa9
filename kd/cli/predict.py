"""``kd predict``: a run's network on new images or texts."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import track

from kd.config.rules import refusals, refuse
from kd.data.text.options import DELIMITER
from kd.errors import KdError, did_you_mean
from kd.records.durable import replacing

OWN: dict[str, Any] = {"run": None, "data": None, "who": "student", "weights": "selected", "out": None, "top": "1"}
OWN |= {"probabilities": "false", "batch_size": "32", "skip_unreadable": "false"}
OWN |= {"column": None, "delimiter": None, "encoding": "utf-8"}

USAGE = """kd predict RUN INPUT ... [KEY=VALUE ...]        (or run=RUN data=INPUT)

Answers new, unlabelled images or texts with the student of a run, in their order: csv on the terminal.

  kd predict RUN photo.jpg holiday/ 'more/**/*.png'   images: files, folders, patterns
  kd predict RUN questions.csv out=answers.csv        texts: a column of .csv, .tsv, .jsonl, .parquet, or lines of .txt
  cat questions.txt | kd predict RUN -                texts of standard input, a line each

  out=FILE                  .csv or .jsonl, complete or not there; default: csv on standard output
                            a column id of the inputs comes along; .json of answers to questions: {id: answer}, which
                            SQuAD's evaluation script reads
  top=K                     the K likeliest classes and their probabilities
  probabilities=true        the probability of each class
  column=NAME               of the texts (two of a pair: column=question,answer); default: as in the run
                            (of task=question_answering question and context: the answer is a part of the context)
  who=teacher               the run's teacher
  weights=last              of the last epoch, not those that validation selected
  delimiter=";"             of .csv and .tsv, one character, or tab; default: by the ending
  batch_size=32 encoding=utf-8
  skip_unreadable=true      go on when an image cannot be read: its row says why, and the exit code is 1"""


def main(argv: Sequence[str]) -> int:
    """Parse, predict with a bar, write the rows in their order; 1 when an image could not be read."""
    if not argv or any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0 if argv else 1
    own, given = parsed(argv)
    out = None if own["out"] is None else Path(own["out"])
    if out is not None and (out.suffix not in (".csv", ".jsonl", ".json") or not out.resolve().parent.is_dir()):
        raise KdError(f"out = {out} is not allowed: it must be a .csv, .jsonl or .json in a folder that is there")
    if out is not None and out.exists():  # it may be one of the inputs
        raise KdError(f"out = {out} is there already: give another file, or delete it")

    from kd.deploy import inputs  # start-up: kd predict --help needs none of them
    from kd.deploy.predict import load  # start-up: torch

    predictor = load(own["run"], own["who"], own["weights"])
    if (predictor.spans or predictor.regression) and (own["top"] > 1 or own["probabilities"]):
        raise KdError("top and probabilities are of classes, and the run answers none: leave them out")
    ids: list[str] | None = None
    if predictor.reads_texts:
        columns = predictor.columns if own["column"] is None else tuple(own["column"].split(","))
        if len(columns) != 1 + predictor.pairs:
            raise KdError(f"column = {own['column']} is not allowed: the run reads {1 + predictor.pairs} of them")
        read = inputs.texts(given, columns, own["encoding"], own["delimiter"])
        texts = [read.columns[column] for column in columns]
        items: list[Any] = list(zip(*texts, strict=True)) if predictor.pairs else texts[0]
        ids = read.columns.get(inputs.ID)
        predictor.row = read.row
    else:
        items = list(inputs.image_files(given))
    if out is not None and out.suffix == ".json":
        _check_ids(out, predictor.spans, ids)
    found = predictor.stream(items, own["batch_size"], own["skip_unreadable"])
    console = Console(file=sys.stderr)
    if out is not None and console.is_terminal:
        found = iter(track(found, "", total=len(items), console=console, transient=True))
    shown = Rows(predictor, own["top"], own["probabilities"], own["skip_unreadable"], ids)
    if out is None:
        return 1 if shown.write(sys.stdout, found, ".csv") else 0
    with replacing(out) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        failed = shown.write(file, found, out.suffix)
    print(f"{out}: {len(items) - failed:,} of {len(items):,} inputs")
    return 1 if failed else 0


@dataclass(frozen=True)
class Rows:
    """What is written of each prediction.

    ``top``: so many classes; ``whole``: the probability of each; ``errors``: whether there is a column for them;
    ``ids``: what the inputs' table calls each, None where it does not.
    """

    predictor: Any
    top: int
    whole: bool
    errors: bool
    ids: Sequence[str] | None = None

    def write(self, file: IO[str], found: Iterable[Any], kind: str) -> int:
        """Write all predictions as ``kind``, an ending, nothing before the first; return how many are errors."""
        writer, names, failed = csv.writer(file), self.names(), 0
        found = iter(found)
        first = next(found, None)  # of the first batch, which may end in an error
        answers: dict[str, str] = {}
        if kind == ".csv":
            writer.writerow(names)
        for number, one in enumerate(chain([first], found)):
            failed += bool(one.error)
            own = {} if self.ids is None else {"id": self.ids[number]}
            if kind == ".json":
                answers |= {} if one.error else {own["id"]: one.label}
            elif kind == ".jsonl":
                file.write(json.dumps({**own, **self.mapping(one)}, ensure_ascii=False) + "\n")
            else:
                cells = [*own.values(), one.input, *([] if one.error else self.cells(one))]
                cells += [""] * (len(names) - self.errors - len(cells))
                writer.writerow([*cells, *([one.error] if self.errors else [])])
        if kind == ".json":
            json.dump(answers, file, ensure_ascii=False)
        return failed

    def names(self) -> list[str]:
        """Return the columns of the csv."""
        first = ["input"] if self.ids is None else ["id", "input"]
        last = ["error"] if self.errors else []
        if self.predictor.regression:
            return [*first, "value", *last]
        if self.predictor.spans:
            return [*first, "answer", "probability", *last]
        more = [f"{kind}_{place}" for place in range(2, self.top + 1) for kind in ("label", "probability")]
        each = [f"p({name})" for name in self.predictor.class_names] if self.whole else []
        return [*first, "label", "probability", *more, *each, *last]

    def cells(self, one: Any) -> list[str]:
        """Return a prediction's cells, after the input's; empty where there are fewer classes than ``top``."""
        if self.predictor.regression:
            return [f"{one.probability:.6g}"]
        if self.predictor.spans:
            return [one.label, f"{one.probability:.6g}"]
        best = [text for name, probability in one.top(self.top) for text in (name, f"{probability:.6g}")]
        each = [f"{probability:.6g}" for probability in one.probabilities.values()] if self.whole else []
        return best + [""] * (2 * self.top - len(best)) + each

    def mapping(self, one: Any) -> dict[str, Any]:
        """Return what a line of the jsonl says."""
        if one.error:
            return {"input": one.input, "error": one.error}
        if self.predictor.regression:
            return {"input": one.input, "value": one.probability}
        if self.predictor.spans:
            return {"input": one.input, "answer": one.label, "probability": one.probability}
        found = {"input": one.input, "label": one.label, "probability": one.probability}
        if self.top > 1:
            found["top"] = [{"label": name, "probability": probability} for name, probability in one.top(self.top)]
        return {**found, "probabilities": dict(one.probabilities)} if self.whole else found


def _check_ids(out: Path, answers: bool, ids: Sequence[str] | None) -> None:
    """Refuse {id: answer} where the run answers no questions, or an id is missing or there twice."""
    if not answers:
        raise KdError(f"out = {out} is not allowed: .json is {{id: answer}} of questions, set .csv or .jsonl")
    if ids is None or "" in ids:
        raise KdError(f"out = {out} needs an id for each question, in a column id: set .csv or .jsonl without")
    if twice := next((name for name, count in Counter(ids).items() if count > 1), None):
        raise KdError(f"out = {out} needs ids that differ, and {twice} is there twice: set .csv or .jsonl")


def parsed(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the options and the inputs. ``KdError`` for a key that there is not, and a value that is not allowed."""
    own = dict(OWN)
    given: list[str] = []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if equals and key in OWN and not Path(argument).exists():
            if key == "data":
                given.append(value)
            else:
                own[key] = value
        elif equals and key.isidentifier() and not Path(argument).exists():
            raise KdError(f"{argument} is not understood: kd predict has no {key}{did_you_mean(key, OWN)}")
        elif own["run"] is None:
            own["run"] = argument
        else:
            given.append(argument)
    if own["run"] is None or not given:
        raise KdError("kd predict needs a run and inputs: kd predict RUN photo.jpg, or kd predict RUN questions.csv")
    return _read(own), given


def _read(own: dict[str, Any]) -> dict[str, Any]:
    """Return the options by their types. ``KdError`` for a value that is not allowed."""
    for key in ("top", "batch_size"):
        if not str(own[key]).isdecimal() or int(own[key]) < 1:
            raise KdError(f"{key} = {own[key]} is not allowed: it must be a whole number, 1 or more")
        own[key] = int(own[key])
    for key in ("probabilities", "skip_unreadable"):
        if own[key] not in ("true", "false"):
            raise KdError(f"{key} = {own[key]} is not allowed: it must be true or false")
        own[key] = own[key] == "true"
    if own["delimiter"] is not None:
        if len(own["delimiter"]) == 3 and own["delimiter"][::2] in ('""', "''"):  # written as for kd train
            own["delimiter"] = own["delimiter"][1]
        refuse(refusals("", own, {"delimiter": DELIMITER}))
    return own
