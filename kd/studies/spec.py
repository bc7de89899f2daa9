"""``study.yaml`` and ``published.yaml``: the question, the runs that answer it, the claim, the published numbers.

No torch, no hydra: a study is read, checked and listed in a fraction of a second.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from kd.errors import KdError, did_you_mean
from kd.studies import graph
from kd.studies.file import check, listed, make, named, read, typed

STUDY = "study.yaml"
PUBLISHED = "published.yaml"
EPOCHS = ("last", "selected")
LEFT = re.compile(r"(?<![\w\\$^}])\{([A-Za-z]\w*)\}")  # of a label whose variables have been put in; not of mathtext
ROW_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class NoStudy(KdError):
    """There is no study of that name."""


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
    file, published = folder / STUDY, folder / PUBLISHED
    node = read(file)
    hints = {k: v for k, v in get_type_hints(Study).items() if k not in ("name", "folder", "published")}
    for key in node.keys() - hints.keys() - {"overrides"}:
        raise KdError(f"{file}: there is no option {key}{did_you_mean(key, hints)}")
    given = {"seeds": [0], **{k: v for k, v in node.items() if v is not None}}
    own = _seeds(given["seeds"] if seeds is None else list(seeds), f"{file}: seeds")
    plain = {k: typed(given.get(k, ""), str, f"{file}: {k}") for k in ("question", "paper", "cost", "claim")}
    epoch = given.get("epoch", EPOCHS[0])
    if epoch not in EPOCHS:
        raise KdError(f"{file}: epoch = {epoch} is not allowed: it must be {' or '.join(EPOCHS)}")
    study = Study(
        **{k: " ".join(text.split()) for k, text in plain.items()},
        name=folder.resolve().name,
        folder=folder,
        measure=typed(given.get("measure", "test/acc1"), str, f"{file}: measure"),
        epoch=epoch,
        rows=_rows(given, own, file),
        seeds=own,
        comparisons=named(Comparison, node.get("comparisons"), file, "comparisons"),
        supported=listed(Condition, node.get("supported"), file, "supported"),
        columns=typed(given.get("columns", []), hints["columns"], f"{file}: columns"),
        evaluations=named(Evaluation, node.get("evaluations"), file, "evaluations"),
        figures=listed(Figure, node.get("figures"), file, "figures"),
        published=make(Published, read(published), str(published)) if published.is_file() else None,
    )
    check(study, file, published)
    return study


def _folder(name_or_folder: str | Path) -> Path:
    folder = Path(name_or_folder)
    if not (folder / STUDY).is_file():
        folder = Path("experiments") / name_or_folder
    if not (folder / STUDY).is_file():
        there = names()
        known = f"; studies: {', '.join(there)}" if there else ""
        raise NoStudy(
            f"there is no study {name_or_folder}{did_you_mean(str(name_or_folder), there)}: no {folder / STUDY}{known}"
        )
    return folder


def another(there: Path, here: Path) -> bool:
    """Whether two folders hold two studies: not the same one, that was moved or checked out twice."""
    if not (there / STUDY).is_file() or there.resolve() == here.resolve():
        return False
    try:
        return read(there / STUDY) != read(here / STUDY)
    except KdError:
        return True


def names() -> list[str]:
    """The studies of ``experiments/`` in the working directory."""
    return sorted(file.parent.name for file in Path("experiments").glob(f"*/{STUDY}"))


def _seeds(value: Any, what: str) -> tuple[int, ...]:
    seeds = list(value) if isinstance(value, (list, tuple)) else [value]
    if not seeds or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in seeds):
        raise KdError(f"{what} = {value} is not allowed: it must be a list of whole numbers, 0 or more")
    if len(set(seeds)) < len(seeds):
        raise KdError(f"{what} = {value} lists one twice")
    return tuple(seeds)


def _rows(node: Mapping[str, Any], seeds: tuple[int, ...], file: Path) -> dict[str, Row]:
    """The rows by their names; each has the overrides of the study before its own, and its seeds if it has none."""
    common = typed(node.get("overrides", []), tuple[str, ...], f"{file}: overrides")
    rows: dict[str, Row] = {}
    for name, template, line in _lines(node.get("rows", {}), file):
        what = f"{file}: row {name}"
        if name in rows:
            raise KdError(f"{file}: there are two rows {name}")
        if not ROW_NAME.fullmatch(name) or name == graph.SEED:
            allowed = f"letters, digits, dots, - and _ only, not {graph.SEED}"
            raise KdError(f"{file}: {name} cannot be the name of a row: {allowed}")
        own = line.get("seeds")
        line["seeds"] = seeds if own is None else _seeds(own, f"{what}: seeds")
        row = make(Row, line, what, name=name, template=template)
        if left := LEFT.search(row.label) if template else None:
            known = (
                f"{did_you_mean(left[1], map(str, row.values))}; variables: {', '.join(map(str, row.values)) or 'none'}"
            )
            raise KdError(f"{what}: label = {row.label} is not allowed: there is no variable {left[1]}{known}")
        rows[name] = replace(row, overrides=(*common, *row.overrides))
    return rows


def _lines(rows: Any, file: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, template and keys of every row; one with a ``grid`` comes once for each combination of its variables."""
    if not typed(rows, Mapping, f"{file}: rows"):
        raise KdError(f"{file}: rows is empty")
    for name, line in rows.items():
        line = dict(typed({} if line is None else line, Mapping, f"{file}: row {name}"))
        grid = line.pop("grid", None)
        if grid is None:
            yield str(name), "", line
            continue
        fixed = line.pop("values", None)
        fixed = typed({} if fixed is None else fixed, Mapping, f"{file}: row {name}: values")
        for values in _combinations(grid, str(name), file):
            yield _filled(str(name), values), str(name), {**_filled(line, values), "values": {**fixed, **values}}


def _combinations(grid: Any, name: str, file: Path) -> Iterator[dict[str, Any]]:
    """The values of a grid, one after another; those of a list of grids likewise."""
    for part in grid if isinstance(grid, list) and grid else [grid]:
        if not isinstance(part, Mapping) or not part or [] in part.values():
            raise KdError(f"{file}: the grid of {name} must give each variable a value or a list of values")
        lists = [v if isinstance(v, list) else [v] for v in part.values()]
        for combination in itertools.product(*lists):
            yield dict(zip(map(str, part), combination, strict=True))


def _filled(node: Any, values: Mapping[str, Any]) -> Any:
    """``{width}`` replaced in every text of a row; other braces are left alone."""
    if isinstance(node, str):
        return re.sub(r"(?<!\$)\{(\w+)\}", lambda m: str(values.get(m[1], m[0])), node)
    if isinstance(node, list):
        return [_filled(part, values) for part in node]
    return {key: _filled(part, values) for key, part in node.items()} if isinstance(node, Mapping) else node
