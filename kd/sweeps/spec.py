"""``study.yaml`` and ``published.yaml``: the question, the runs that answer it, the claim, the published numbers.

No torch, no hydra: a study is read, checked and listed in a fraction of a second.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from kd.errors import KdError, near

STUDY = "study.yaml"
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


def load(name_or_folder: str | Path) -> Study:
    """Read a study by its folder, or the name of one in ``experiments/``. ``KdError`` for what is wrong in it."""
    folder = Path(name_or_folder)
    if not (folder / STUDY).is_file():
        folder = Path("experiments") / name_or_folder
    if not (folder / STUDY).is_file():
        there = sorted(file.parent.name for file in Path("experiments").glob(f"*/{STUDY}"))
        raise KdError(f"there is no study {name_or_folder}{near(str(name_or_folder), there)}: no {folder / STUDY}")
    node = _yaml(folder / STUDY)
    known = {f.name for f in fields(Study)} - {"name", "folder", "published"} | {"overrides"}
    for key in node.keys() - known:
        raise KdError(f"{folder / STUDY}: there is no option {key}{near(key, known)}")
    base = tuple(node.pop("overrides", ()))
    seeds = tuple(node.get("seeds", (0,)))
    rows = {n: _make(Row, {"name": n, "seeds": seeds, **v}, folder) for n, v in node.get("rows", {}).items()}
    rows = {n: replace(r, overrides=(*base, *r.overrides), seeds=tuple(r.seeds)) for n, r in rows.items()}
    if not rows:
        raise KdError(f"{folder / STUDY}: rows is empty")
    compared = {n: _make(Comparison, {"name": n, **v}, folder) for n, v in node.get("comparisons", {}).items()}
    published = folder / "published.yaml"
    texts = {k: str(node.get(k, "")) for k in ("question", "paper", "cost", "claim")}
    study = Study(
        **texts,
        name=folder.resolve().name,
        folder=folder,
        measure=node.get("measure", "test/acc1"),
        epoch=node.get("epoch", "last"),
        rows=rows,
        seeds=seeds,
        comparisons=compared,
        supported=tuple(_make(Condition, c, folder) for c in node.get("supported", ())),
        columns=tuple(node.get("columns", ())),
        evaluations={n: _make(Evaluation, {"name": n, **v}, folder) for n, v in node.get("evaluations", {}).items()},
        figures=tuple(_make(Figure, f, folder) for f in node.get("figures", ())),
        published=_make(Published, _yaml(published), folder) if published.is_file() else None,
    )
    _check(study)
    return study


def _yaml(file: Path) -> dict[str, Any]:
    try:
        node = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        raise KdError(f"{file} cannot be read: it is not valid YAML") from None
    if not isinstance(node, dict):
        raise KdError(f"{file} is not a mapping of keys to values")
    return node


def _make(kind: Any, node: Mapping[str, Any], folder: Path) -> Any:
    known = {f.name for f in fields(kind)}
    for key in node.keys() - known:
        raise KdError(f"{folder}: {kind.__name__.lower()} has no option {key}{near(key, known)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in node.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise KdError(f"{folder}: {kind.__name__.lower()}: {str(error).replace('.__init__()', '()')}") from None


def _check(study: Study) -> None:
    """Every name of a row or comparison must exist."""
    if study.epoch not in EPOCHS:
        raise KdError(f"{study.folder}: epoch = {study.epoch} is not allowed: it must be {' or '.join(EPOCHS)}")
    used = [r for row in study.rows.values() for r in (row.teacher, row.alone, *references(row)) if r]
    used += [r for c in study.comparisons.values() for r in (c.row, c.than, c.share_of) if r]
    for name in used:
        if name not in study.rows:
            raise KdError(f"{study.folder}: there is no row {name}{near(name, study.rows)}")
    for condition in study.supported:
        if condition.comparison not in study.comparisons:
            raise KdError(f"{study.folder}: there is no comparison {condition.comparison}")


def references(row: Row) -> list[str]:
    """The rows whose run directories a row's overrides name."""
    return [found[1] for override in row.overrides for found in PLACEHOLDER.finditer(override)]
