"""``study.yaml`` and ``published.yaml``: the question, the runs that answer it, the claim, the published numbers.

No torch, no hydra: a study is read, checked and listed in a fraction of a second.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from kd.errors import KdError, near
from kd.sweeps import graph

STUDY = "study.yaml"
EPOCHS = ("last", "selected")
ROW_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Row:
    """One line of the study's table: the same overrides for each of its seeds.

    ``overrides`` may name the run directory of another row, ``teacher.checkpoint={teacher}``: that row's run of the
    same seed, or its only one; ``{teacher@0}`` is the run of seed 0. Such rows are trained first. ``{seed}`` is the
    seed itself. ``teacher``, ``alone``: the rows that the gap is measured against.
    In the file a row may have a ``grid`` of variables, ``{width: [30, 300]}``: one row for each combination, with
    ``{width}`` replaced in its name and all its texts.
    """

    name: str
    overrides: tuple[str, ...] = ()
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


def load(name_or_folder: str | Path, seeds: Sequence[int] | None = None) -> Study:
    """Read a study by its folder, or the name of one in ``experiments/``. ``KdError`` for what is wrong in it.

    ``seeds`` instead of the study's own, for the rows that do not fix theirs.
    """
    folder = _folder(name_or_folder)
    node = _yaml(folder / STUDY)
    known = {f.name for f in fields(Study)} - {"name", "folder", "published"} | {"overrides"}
    for key in node.keys() - known:
        raise KdError(f"{folder / STUDY}: there is no option {key}{near(key, known)}")
    base = tuple(node.pop("overrides", ()))
    if seeds is not None:
        node["seeds"] = list(seeds)
    node["seeds"] = _seeds(node.get("seeds", [0]), folder)
    rows = {}
    for name, line in _lines(node.get("rows", {}), folder):
        if name in rows:
            raise KdError(f"{folder / STUDY}: there are two rows {name}")
        row = _make(Row, {"seeds": node["seeds"], **line, "name": name}, folder)
        rows[name] = replace(row, overrides=(*base, *row.overrides), seeds=_seeds(row.seeds, folder))
    published = folder / "published.yaml"
    study = Study(
        **{k: " ".join(str(node.get(k, "")).split()) for k in ("question", "paper", "cost", "claim")},
        name=folder.resolve().name,
        folder=folder,
        measure=node.get("measure", "test/acc1"),
        epoch=node.get("epoch", "last"),
        rows=rows,
        seeds=node["seeds"],
        comparisons=_named(Comparison, node, "comparisons", folder),
        supported=tuple(_make(Condition, c, folder) for c in node.get("supported", ())),
        columns=tuple(node.get("columns", ())),
        evaluations=_named(Evaluation, node, "evaluations", folder),
        figures=tuple(_make(Figure, f, folder) for f in node.get("figures", ())),
        published=_make(Published, _yaml(published), folder) if published.is_file() else None,
    )
    _check(study)
    return study


def _folder(name_or_folder: str | Path) -> Path:
    folder = Path(name_or_folder)
    if not (folder / STUDY).is_file():
        folder = Path("experiments") / name_or_folder
    if not (folder / STUDY).is_file():
        there = names()
        known = f"; studies: {', '.join(there)}" if there else ""
        raise KdError(
            f"there is no study {name_or_folder}{near(str(name_or_folder), there)}: no {folder / STUDY}{known}"
        )
    return folder


def names() -> list[str]:
    """The studies of ``experiments/`` in the working directory."""
    return sorted(file.parent.name for file in Path("experiments").glob(f"*/{STUDY}"))


def _seeds(value: Any, folder: Path) -> tuple[int, ...]:
    seeds = list(value) if isinstance(value, (list, tuple)) else [value]
    if not seeds or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in seeds):
        raise KdError(f"{folder}: seeds = {value} is not allowed: a list of whole numbers, 0 or more")
    if len(set(seeds)) < len(seeds):
        raise KdError(f"{folder}: seeds = {value} lists one twice")
    return tuple(seeds)


def _lines(rows: Any, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and keys of every row; one with a ``grid`` comes once for each combination of its variables."""
    if not isinstance(rows, Mapping) or not rows:
        raise KdError(f"{folder / STUDY}: rows is empty")
    for name, line in rows.items():
        line = dict(line or {})
        grid = line.pop("grid", None)
        if grid is None:
            yield str(name), line
            continue
        if not isinstance(grid, Mapping) or not grid or not all(isinstance(v, list) and v for v in grid.values()):
            raise KdError(f"{folder}: the grid of {name} must give each variable a list of values")
        for combination in itertools.product(*grid.values()):
            values = dict(zip(map(str, grid), combination, strict=True))
            yield _filled(str(name), values), {**_filled(line, values), "values": values}


def _filled(node: Any, values: Mapping[str, Any]) -> Any:
    """``{width}`` replaced in every text of a row; other braces are left alone."""
    if isinstance(node, str):
        return re.sub(r"(?<!\$)\{(\w+)\}", lambda m: str(values.get(m[1], m[0])), node)
    if isinstance(node, list):
        return [_filled(part, values) for part in node]
    return {key: _filled(part, values) for key, part in node.items()} if isinstance(node, Mapping) else node


def _named(kind: Any, node: Mapping[str, Any], key: str, folder: Path) -> dict[str, Any]:
    return {name: _make(kind, {"name": name, **(v or {})}, folder) for name, v in (node.get(key) or {}).items()}


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
    """Every name of a row or comparison must exist, and no row may wait for itself."""
    if study.epoch not in EPOCHS:
        raise KdError(f"{study.folder}: epoch = {study.epoch} is not allowed: it must be {' or '.join(EPOCHS)}")
    for name in study.rows:
        if not ROW_NAME.fullmatch(name) or name == graph.SEED:
            allowed = f"letters, digits, dots, - and _ only, not {graph.SEED}"
            raise KdError(f"{study.folder}: {name} cannot be the name of a row: {allowed}")
    used = [
        r for row in study.rows.values() for r in (row.teacher, row.alone, *(r for r, _ in graph.references(row))) if r
    ]
    used += [r for c in study.comparisons.values() for r in (c.row, c.than, c.share_of) if r]
    used += [r for e in study.evaluations.values() for r in e.rows or ()]
    for name in used:
        if name not in study.rows:
            raise KdError(f"{study.folder}: there is no row {name}{near(name, study.rows)}")
    for condition in study.supported:
        if condition.comparison not in study.comparisons:
            missing = condition.comparison
            raise KdError(f"{study.folder}: there is no comparison {missing}{near(missing, study.comparisons)}")
    for evaluation in study.evaluations.values():
        if bool(evaluation.eval) == bool(evaluation.bias):
            raise KdError(f"{study.folder}: the evaluation {evaluation.name} needs either eval or bias")
    graph.check(study)
