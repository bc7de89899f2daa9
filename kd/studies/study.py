"""Describe a study by dataclasses: rows, comparisons, conditions, evaluations, figures, published numbers. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STUDY = "study.yaml"
PUBLISHED = "published.yaml"
PAPER, OURS = "paper", "ours"  # who claims what a condition says


@dataclass(frozen=True)
class Row:
    """One line of the study's table: the same overrides for each of its seeds.

    ``overrides`` may name the run directory of another row, ``teacher.checkpoint={teacher}``: that row's run of the
    same seed, or its only one; ``{teacher@0}`` is the run of seed 0. Such rows are trained first. ``{seed}`` is the
    seed itself; ``seed=10{seed}`` starts from other initial weights than the rows beside it, as a student must that is
    the network of its teacher. ``teacher``, ``alone``: the rows that the gap is measured against.
    In the file a row may have a ``grid`` of variables, ``{width: [30, 300]}``: one row for each combination, with
    ``{width}`` replaced in its name and all its texts; or a list of grids, where not everything goes with everything.
    """

    name: str
    overrides: tuple[str, ...] = ()
    label: str = ""
    seeds: tuple[int, ...] = ()
    teacher: str | None = None
    alone: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)  # of the grid that the row comes from
    template: str = ""  # its name before the grid was filled in: w{width}


@dataclass(frozen=True)
class Comparison:
    """A paired difference over seeds, ``row`` minus ``than``, of one measure; a name to refer to it.

    With ``share_of`` (a row, the teacher): the share of the gap between ``than`` and that row which ``row`` closes.
    ``sesoi``: the smallest effect size of interest, more than 0; ``pilot``: the standard deviation of the paired
    difference in pilot runs, 0 or more; None: there was no pilot. Both in the measure's unit, fractions for shares.
    """

    name: str
    row: str
    than: str
    measure: str
    share_of: str | None = None
    than_measure: str | None = None  # null: the same measure on both sides
    sesoi: float | None = None
    pilot: float | None = None


@dataclass(frozen=True)
class Condition:
    """The bound that the interval of a comparison must keep: ``above`` or ``below`` a number, or ``inside`` two.

    ``claim_of``: "paper" where the paper itself claims this, "ours" for a bound of our own; None: as the study says.
    """

    comparison: str
    above: float | None = None
    below: float | None = None
    inside: tuple[float, float] | None = None
    claim_of: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """A further evaluation of each finished run, beside its own test.

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
    """A folder with a ``study.yaml``, of the working directory's ``experiments/`` or the package's.

    ``supported``: the conditions; ``claim_of``: who claims them, "paper" or "ours", where a condition does not say it;
    ``exploratory``: the study runs although its design is not known to show its smallest effects of interest.
    """

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
    claim_of: str = OURS
    exploratory: bool = False
