"""Read ``study.yaml`` and ``published.yaml`` into a :class:`~kd.studies.study.Study`.

No torch, no hydra: a study is read, checked and listed in a fraction of a second.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from kd.errors import KdError, did_you_mean
from kd.records import yaml_text
from kd.studies import checks, references
from kd.studies.checks import listed, make, named, typed
from kd.studies.study import (
    OURS,
    PAPER,
    PUBLISHED,
    STUDY,
    Comparison,
    Condition,
    Evaluation,
    Figure,
    Published,
    Row,
    Study,
)
from kd.tasks.metrics import CLASSIFICATION

_PACKAGE = Path(__file__).resolve().parents[1]
HERE = Path("experiments")
SHIPPED = (_PACKAGE if (_PACKAGE / HERE).is_dir() else _PACKAGE.parent) / HERE
"""Where the package's studies are: inside the installed one, or beside it in a checkout."""
EPOCHS = ("last", "selected")
LEFT_OVER = re.compile(r"(?<![\w\\$^}])\{([A-Za-z]\w*)\}")  # in a label, its variables put in; not mathtext
ROW_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class NoStudy(KdError):
    """Raised when there is no study of that name."""


def load_study(name_or_folder: str | Path, seeds: Sequence[int] | None = None) -> Study:
    """Read a study by its folder, or the name of one in :func:`places`. ``KdError`` for what is wrong in it.

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
    texts = {k: typed(given.get(k, ""), str, f"{file}: {k}") for k in ("question", "paper", "cost", "claim")}
    epoch = _one_of(given.get("epoch", EPOCHS[0]), EPOCHS, f"{file}: epoch")
    study = Study(
        **{k: " ".join(text.split()) for k, text in texts.items()},
        name=folder.resolve().name,
        folder=folder,
        measure=typed(given.get("measure", f"test/{CLASSIFICATION[0].name}"), str, f"{file}: measure"),
        epoch=epoch,
        claim_of=_one_of(given.get("claim_of", OURS), (PAPER, OURS), f"{file}: claim_of"),
        exploratory=typed(given.get("exploratory", False), bool, f"{file}: exploratory"),
        rows=_rows(given, own, file),
        seeds=own,
        comparisons=named(Comparison, node.get("comparisons"), file, "comparisons"),
        supported=listed(Condition, node.get("supported"), file, "supported"),
        columns=typed(given.get("columns", []), hints["columns"], f"{file}: columns"),
        evaluations=named(Evaluation, node.get("evaluations"), file, "evaluations"),
        figures=listed(Figure, node.get("figures"), file, "figures"),
        published=make(Published, read(published), str(published)) if published.is_file() else None,
    )
    checks.check(study, file, published)
    return study


def _one_of(value: Any, allowed: Sequence[str], what: str) -> str:
    if value not in allowed:
        raise KdError(f"{what} = {value} is not allowed: it must be {' or '.join(allowed)}")
    return str(value)


def places() -> tuple[Path, Path]:
    """List the folders of studies: the one of the working directory comes before those that ship with the package."""
    return HERE, SHIPPED


def _folder(name_or_folder: str | Path) -> Path:
    for place in (Path(), *places()):
        if (place / name_or_folder / STUDY).is_file():
            return place / name_or_folder
    there = study_names()
    known = f"; studies: {', '.join(there)}" if there else ""
    near = did_you_mean(str(name_or_folder), there)
    raise NoStudy(f"there is no study {name_or_folder}{near}: no {HERE / name_or_folder / STUDY}{known}")


def is_only_shipped(folder: Path) -> bool:
    """Tell whether a study is the package's, seen from a working directory elsewhere: nothing is written into it."""
    return folder.resolve().parent == SHIPPED and HERE.resolve() != SHIPPED


def is_other_study(there: Path, here: Path) -> bool:
    """Tell whether two folders hold two studies: not the same one, that was moved or checked out twice."""
    if not (there / STUDY).is_file() or there.resolve() == here.resolve():
        return False
    try:
        return read(there / STUDY) != read(here / STUDY)
    except KdError:
        return True


def study_names() -> list[str]:
    """List the studies of the working directory, and those that ship with the package."""
    return sorted({file.parent.name for place in places() for file in place.glob(f"*/{STUDY}")})


def _seeds(value: Any, what: str) -> tuple[int, ...]:
    seeds = list(value) if isinstance(value, (list, tuple)) else [value]
    if not seeds or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in seeds):
        raise KdError(f"{what} = {value} is not allowed: it must be a list of whole numbers, 0 or more")
    if len(set(seeds)) < len(seeds):
        raise KdError(f"{what} = {value} lists one twice")
    return tuple(seeds)


def _rows(node: Mapping[str, Any], seeds: tuple[int, ...], file: Path) -> dict[str, Row]:
    """Make the rows, by their names; each has the study's overrides before its own, and its seeds if it has none."""
    common = typed(node.get("overrides", []), tuple[str, ...], f"{file}: overrides")
    rows: dict[str, Row] = {}
    for name, template, line in _lines(node.get("rows", {}), file):
        what = f"{file}: row {name}"
        if name in rows:
            raise KdError(f"{file}: there are two rows {name}")
        if not ROW_NAME.fullmatch(name) or name == references.SEED:
            allowed = f"letters, digits, dots, - and _ only, not {references.SEED}"
            raise KdError(f"{file}: {name} cannot be the name of a row: {allowed}")
        own = line.get("seeds")
        line["seeds"] = seeds if own is None else _seeds(own, f"{what}: seeds")
        row = make(Row, line, what, name=name, template=template)
        if left := LEFT_OVER.search(row.label) if template else None:
            variables = list(map(str, row.values))
            known = f"{did_you_mean(left[1], variables)}; variables: {', '.join(variables) or 'none'}"
            raise KdError(f"{what}: label = {row.label} is not allowed: there is no variable {left[1]}{known}")
        rows[name] = replace(row, overrides=(*common, *row.overrides))
    return rows


def _lines(rows: Any, file: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield name, template and keys of every row; one with a ``grid`` once for each combination of its variables."""
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
    """Yield the combinations of a grid's values, one after another; those of a list of grids likewise."""
    for part in grid if isinstance(grid, list) and grid else [grid]:
        if not isinstance(part, Mapping) or not part or [] in part.values():
            raise KdError(f"{file}: the grid of {name} must give each variable a value or a list of values")
        lists = [v if isinstance(v, list) else [v] for v in part.values()]
        for combination in itertools.product(*lists):
            yield dict(zip(map(str, part), combination, strict=True))


def _filled(node: Any, values: Mapping[str, Any]) -> Any:
    """Replace ``{width}`` in every text of a row; other braces are left alone."""
    if isinstance(node, str):
        return re.sub(r"(?<!\$)\{(\w+)\}", lambda m: str(values.get(m[1], m[0])), node)
    if isinstance(node, list):
        return [_filled(part, values) for part in node]
    return {key: _filled(part, values) for key, part in node.items()} if isinstance(node, Mapping) else node


# ---------------------------------------------------------------------- YAML


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuse a key listed twice: YAML's own loader keeps the last one, and a row would be gone without a word."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise KdError(f"(line {key.start_mark.line + 1}): the key {key.value} is listed twice")
                seen.add(key.value)
        return node


def read(file: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file. ``KdError`` if it is none, or lists a key twice."""
    return yaml_text.mapping(file, _UniqueKeyLoader)
