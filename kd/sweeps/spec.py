"""``study.yaml`` and ``published.yaml``: the question, the runs that answer it, the claim, the published numbers.

No torch, no hydra: a study is read, checked and listed in a fraction of a second.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EPOCHS = ("last", "selected")
PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_.]*)(?:@(\d+))?\}")
ROW_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Row:
    """One line of the study's table: the same overrides for each of its seeds.

    ``overrides`` may name the run directory of another row, ``teacher.checkpoint={teacher}``: that row's run of the
    same seed, or its only one; ``{teacher@0}`` is the run of seed 0. Such rows are trained first.
    ``teacher``, ``alone``: the rows that the gap is measured against.
    """

    name: str
    overrides: tuple[str, ...]
    label: str = ""
    seeds: tuple[int, ...] = ()
    teacher: str | None = None
    alone: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)  # of the grid that the row comes from


@dataclass(frozen=True)
class Comparison:
    """A paired difference over seeds, ``row`` minus ``than``, of one measure; a name to refer to it.

    With ``share_of`` (a row, the teacher): the share of the gap between ``than`` and that row which ``row`` closes.
    """

    name: str
    row: str
    than: str
    measure: str
    share_of: str | None = None
    than_measure: str | None = None  # null: the same measure on both sides


@dataclass(frozen=True)
class Condition:
    """When the interval of a comparison counts: all of it ``above`` or ``below`` a number, or ``inside`` two."""

    comparison: str
    above: float | None = None
    below: float | None = None
    inside: tuple[float, float] | None = None


@dataclass(frozen=True)
class Evaluation:
    """A second look at each finished run, beside its own test.

    ``eval``: keys changed, as in ``kd eval run=RUN KEY=VALUE`` (``data.test_shift=2``); or
    ``bias``: classes whose logits are moved by the one number that is best on the validation split.
    ``rows``: names of the rows that it is made for; null: all.
    """

    name: str
    eval: tuple[str, ...] = ()
    bias: tuple[int, ...] = ()
    rows: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Figure:
    """A figure of the report beside the standard ones: ``kind`` "map" or "lines" over the values of a grid.

    ``x``, ``y`` (map) or ``x``, ``group`` (lines): names of grid variables; ``measure``: what is shown.
    """

    kind: str
    measure: str
    x: str
    y: str | None = None
    group: str | None = None
    title: str = ""


@dataclass(frozen=True)
class Published:
    """``published.yaml``: row → measure → {value, std, n}; ``comparable``: data, models and recipe are the paper's."""

    source: str
    protocol: str
    numbers: Mapping[str, Mapping[str, Mapping[str, float]]]
    comparable: bool = False
    note: str = ""


@dataclass(frozen=True)
class Study:
    """A folder of ``experiments/`` with a ``study.yaml``."""

    name: str
    folder: Path
    question: str
    paper: str
    cost: str
    measure: str
    epoch: str
    rows: Mapping[str, Row]
    seeds: tuple[int, ...]
    comparisons: Mapping[str, Comparison]
    claim: str
    supported: tuple[Condition, ...]
    columns: tuple[str, ...] = ()
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    published: Published | None = None
