"""Get the examples that the arguments of ``kd decide`` name, and those on which thresholds are chosen. No torch."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from kd.deploy.examples import SIDES, Examples, read
from kd.deploy.settings import Columns
from kd.errors import KdError

SPLITS = {**dict.fromkeys(("val", "validation", "valid", "dev"), True), "test": False}  # values of a column


def examples(given: Mapping[str, Any]) -> tuple[Examples, Examples | float | None]:
    """Return the examples to decide on, and others, or the share of these, for temperature and threshold.

    ``given``: ``run``, or ``predictions`` with the names of columns (:class:`Columns`), ``encoding`` and
    ``validation``: a share, a file, or a column of val and test. ``KdError`` for what cannot be read.
    """
    if "run" in given:
        from kd.deploy.of_run import examples_of_run  # start-up: it measures with torch

        validation, test = examples_of_run(given["run"])
        if "length" in given.get("slices", ()) and test.text is None:
            raise KdError(f"slices = length is not known of run = {given['run']}: its samples are no texts")
        return test, validation
    path, where = given["predictions"], given.get("validation")
    chosen = {one.name: given[one.name] for one in fields(Columns) if one.name in given}
    encoding = given.get("encoding", "utf-8")
    if where is None:
        return read(path, Columns(**chosen), encoding), None
    if Path(where).is_file():
        if Path(where).read_bytes() == Path(path).read_bytes():
            raise KdError(
                f"validation = {where} holds the examples that are decided on: a threshold that is chosen on them says "
                "nothing of others (validation=0.5 takes half of them)"
            )
        return read(path, Columns(**chosen), encoding), read(where, Columns(**chosen), encoding)
    try:
        share = float(where)
    except ValueError:
        chosen["slices"] = [*chosen.get("slices", ()), where]
        return _by_column(read(path, Columns(**chosen), encoding), where)
    if not 0.1 <= share <= 0.9:
        raise KdError(f"validation = {where} is not allowed: it must be a share from 0.1 to 0.9, a file, or a column")
    return read(path, Columns(**chosen), encoding), share


def _by_column(found: Examples, name: str) -> tuple[Examples, Examples]:
    """Return the rows that a column calls test, and those that it calls val."""
    values = found.columns[name]
    if unknown := sorted({*values} - {*SPLITS}):
        raise KdError(f"validation = {name} holds {unknown[0]}: it must be a column of {', '.join(SPLITS)}")
    val = np.asarray([SPLITS[value] for value in values])
    if val.all() or not val.any():
        raise KdError(f"validation = {name} holds {values[0]} alone: both val and test are needed")
    return found.part(~val), found.part(val)


def all_slices(found: Examples) -> list[str]:
    """Return the slices that there are without naming a column: by class, and by length of texts."""
    return [*(["class"] if found.labelled else []), *(["length"] if found.labelled and found.text is not None else [])]


def table(found: Examples) -> str:
    """Write examples of a run as a csv that ``kd decide`` reads; ``index``: as in the run, from 0."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    sure = [who for who in SIDES if who in found.confidence]
    writer.writerow(["index", "label", *SIDES, *(f"{who}_confidence" for who in sure)])
    label = [""] * len(found) if found.label is None else found.label
    confidence = [[f"{value:.6f}" for value in found.confidence[who]] for who in sure]
    writer.writerows(zip(found.rows - 1, label, found.student, found.teacher, *confidence, strict=True))
    return text.getvalue()
