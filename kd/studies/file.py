"""The YAML of a study: read without a key lost, each value of the type its dataclass says, each name one there is.

``KdError`` names the file, the key, the value and what is allowed. No torch, no hydra.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import yaml

from kd.errors import KdError, did_you_mean, yaml_problem
from kd.records import yaml_text
from kd.studies import graph

if TYPE_CHECKING:
    from kd.studies.spec import Condition, Figure, Published, Study

PUBLISHED_KEYS = ("value", "std", "n")


# ---------------------------------------------------------------------- YAML


class _NoKeyTwice(yaml.SafeLoader):
    """YAML's own loader keeps the last of two equal keys: a row would be gone without a word."""

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
    """The mapping in a YAML file. ``KdError`` if it is none, or lists a key twice."""
    try:
        node = yaml_text.load(file.read_text(encoding="utf-8"), _NoKeyTwice)
    except KdError as error:
        raise KdError(f"{file} {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise KdError(f"{file} cannot be read{line}: {yaml_problem(error.problem)}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        raise KdError(f"{file} cannot be read: it is not valid YAML") from None
    if not isinstance(node, dict):
        raise KdError(f"{file} is not a mapping of keys to values")
    return {str(key): value for key, value in node.items()}


# ---------------------------------------------------------------------- types


def number(value: Any) -> bool:
    """Whether a value of YAML is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(test, value))


def _rising(value: Any) -> bool:
    return _list_of(number)(value) and len(value) == 2 and value[0] < value[1]


def _text(value: Any) -> bool:
    return isinstance(value, str)


ALLOWED: dict[Any, tuple[Callable[[Any], bool], str]] = {
    str: (_text, "a text"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    float: (number, "a number"),
    tuple[str, ...]: (_list_of(_text), "a list of texts"),
    tuple[int, ...]: (_list_of(_whole), "a list of whole numbers, 0 or more"),
    tuple[float, float]: (_rising, "a list of two numbers, the smaller first"),
    Mapping: (lambda value: isinstance(value, Mapping), "a mapping of keys to values"),
}


def typed(value: Any, hint: Any, what: str) -> Any:
    """The value of a key (``what``: file and key), a list as a tuple. ``KdError`` if it is not of type ``hint``."""
    if isinstance(hint, types.UnionType):  # "or None": a key that is null is left out before
        (hint,) = (part for part in get_args(hint) if part is not types.NoneType)
    test, allowed = ALLOWED[Mapping if get_origin(hint) is Mapping else hint]
    if not test(value):
        raise KdError(f"{what} = {value} is not allowed: it must be {allowed}")
    return tuple(value) if isinstance(value, list) else value


def refuse_unknown(node: Iterable[str], known: Iterable[str], what: str) -> None:
    """``KdError`` for a key that is none of ``known``, with those that look like it."""
    known = set(known)
    for key in node:
        if key not in known:
            raise KdError(f"{what} has no option {key}{did_you_mean(str(key), known)}")


def make(kind: Any, node: Any, what: str, **given: Any) -> Any:
    """The dataclass ``kind`` from a mapping (null: an empty one) and what is ``given``; a null key has its default."""
    node = typed({} if node is None else node, Mapping, what)
    allowed = {f.name: f for f in fields(kind) if f.name not in given}
    refuse_unknown(node, allowed, what)
    hints = get_type_hints(kind)
    values = {key: typed(v, hints[key], f"{what}: {key}") for key, v in node.items() if v is not None}
    for key, field in allowed.items():
        if key not in values and field.default is MISSING and field.default_factory is MISSING:
            raise KdError(f"{what} has no {key}, which it needs: {ALLOWED.get(hints[key], ALLOWED[Mapping])[1]}")
    return kind(**values, **given)


def named(kind: Any, node: Any, file: Path, key: str) -> dict[str, Any]:
    """A dataclass for each name of a mapping, such as ``comparisons``; null is none."""
    node = typed({} if node is None else node, Mapping, f"{file}: {key}")
    return {str(name): make(kind, part, f"{file}: {key}: {name}", name=str(name)) for name, part in node.items()}


def listed(kind: Any, node: Any, file: Path, key: str) -> tuple[Any, ...]:
    """A dataclass for each mapping of a list, such as ``figures``; null is none."""
    if not isinstance(node, (list, types.NoneType)):
        raise KdError(f"{file}: {key} = {node} is not allowed: it must be a list of mappings, one a line with a dash")
    return tuple(make(kind, part, f"{file}: {key}: number {i}") for i, part in enumerate(node or (), start=1))


# ---------------------------------------------------------------------- names, and what goes with what


def check(study: Study, file: Path, published: Path) -> None:
    """Every name of a row, comparison or grid variable must exist, and no row may wait for itself."""
    for row in study.rows.values():
        for name in (row.teacher, row.alone, *(r for r, _ in graph.references(row))):
            if name is not None:
                _there(name, study.rows, "row", f"{file}: rows: {row.name}")
        for override in row.overrides:
            _check_override(override, f"{file}: rows: {row.name}")
    for comparison in study.comparisons.values():
        for name in (comparison.row, comparison.than, comparison.share_of):
            if name is not None:
                _there(name, study.rows, "row", f"{file}: comparisons: {comparison.name}")
    for evaluation in study.evaluations.values():
        for name in evaluation.rows or ():
            _there(name, study.rows, "row", f"{file}: evaluations: {evaluation.name}")
    for i, condition in enumerate(study.supported, start=1):
        _check_condition(study, condition, f"{file}: supported: number {i}")
    for evaluation in study.evaluations.values():
        if bool(evaluation.eval) == bool(evaluation.bias):
            raise KdError(f"{file}: the evaluation {evaluation.name} needs either eval or bias")
    for i, figure in enumerate(study.figures, start=1):
        _check_figure(study, figure, f"{file}: figures: number {i}")
    if study.published is not None:
        _check_published(study, study.published, f"{published}: numbers")
    graph.check(study)


def _check_override(override: str, what: str) -> None:
    """The study's seeds count, and its directory: a row may only shift its seed, as in ``seed=100{seed}``."""
    key, _, value = override.lstrip("+").partition("=")
    if (key == "seed" and "{seed}" not in value) or key == "name" or key.startswith("hydra."):
        hint = " (or shift it: seed=100{seed})" if key == "seed" else ""
        raise KdError(f"{what}: {override} is not allowed: the study sets {key.partition('.')[0]}{hint}")


def _there(name: str, known: Iterable[str], kind: str, what: str) -> None:
    if name not in known:
        raise KdError(f"{what}: there is no {kind} {name}{did_you_mean(name, known)}")


def _check_condition(study: Study, condition: Condition, what: str) -> None:
    _there(condition.comparison, study.comparisons, "comparison", what)
    bounds = {key: getattr(condition, key) for key in ("above", "below", "inside")}
    given = [f"{key} = {value}" for key, value in bounds.items() if value is not None]
    if len(given) != 1:
        has = " and ".join(given) or "none"
        raise KdError(f"{what} ({condition.comparison}) needs one of above, below and inside, given: {has}")


def _check_figure(study: Study, figure: Figure, what: str) -> None:
    if figure.kind not in ("map", "lines"):
        raise KdError(f"{what}: kind = {figure.kind} is not allowed: it must be map or lines")
    if figure.kind == "map" and figure.y is None:
        raise KdError(f"{what} has no y, which a map needs: the name of a grid variable")
    other = "group" if figure.kind == "map" else "y"
    if getattr(figure, other) is not None:
        allowed = "x and y" if figure.kind == "map" else "x and group"
        raise KdError(f"{what}: {other} = {getattr(figure, other)} is not allowed: kind = {figure.kind} has {allowed}")
    variables = dict.fromkeys(str(name) for row in study.rows.values() for name in row.values)
    for key in ("x", "y", "group"):
        name = getattr(figure, key)
        if name is not None and name not in variables:
            known = ", ".join(variables) or "no row has any"
            raise KdError(f"{what}: {key} = {name} is not allowed: it must be a variable of a row's grid: {known}")


def _check_published(study: Study, published: Published, what: str) -> None:
    for row, measures in published.numbers.items():
        _there(str(row), study.rows, "row", what)
        for measure, entry in typed(measures, Mapping, f"{what}: {row}").items():
            here = f"{what}: {row}: {measure}"
            refuse_unknown(typed(entry, Mapping, here), PUBLISHED_KEYS, here)
            if "value" not in entry:
                raise KdError(f"{here} = {entry} has no value, which it needs: a number")
            for key, value in entry.items():
                typed(value, float, f"{here}: {key}")
