"""Check a study: each value of the type and in the range that its dataclass says, each name one there is.

``KdError`` names the file, the key, the value and what is allowed. No torch, no hydra.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from kd.errors import KdError, did_you_mean
from kd.studies import references
from kd.studies.study import OURS, PAPER, Comparison, Condition, Figure, Published, Study

PUBLISHED_KEYS = ("value", "std", "n")


# ---------------------------------------------------------------------- types


def is_number(value: Any) -> bool:
    """Tell whether a value of YAML is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(test, value))


def _is_interval(value: Any) -> bool:
    return _list_of(is_number)(value) and len(value) == 2 and value[0] < value[1]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


ALLOWED: dict[Any, tuple[Callable[[Any], bool], str]] = {
    str: (_is_text, "a text"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    float: (is_number, "a number"),
    tuple[str, ...]: (_list_of(_is_text), "a list of texts"),
    tuple[int, ...]: (_list_of(_is_index), "a list of whole numbers, 0 or more"),
    tuple[float, float]: (_is_interval, "a list of two numbers, the smaller first"),
    Mapping: (lambda value: isinstance(value, Mapping), "a mapping of keys to values"),
}


def typed(value: Any, hint: Any, what: str) -> Any:
    """Return the value of a key (``what``: file and key), a list as a tuple. ``KdError`` for another type."""
    if isinstance(hint, types.UnionType):  # "or None": a key that is null is left out before
        (hint,) = (part for part in get_args(hint) if part is not types.NoneType)
    test, allowed = ALLOWED[Mapping if get_origin(hint) is Mapping else hint]
    if not test(value):
        raise KdError(f"{what} = {value} is not allowed: it must be {allowed}")
    return tuple(value) if isinstance(value, list) else value


def refuse_unknown(node: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise ``KdError`` for a key that is none of ``known``, with those that look like it."""
    known = set(known)
    for key in node:
        if key not in known:
            raise KdError(f"{what} has no option {key}{did_you_mean(str(key), known)}")


def make(kind: Any, node: Any, what: str, **given: Any) -> Any:
    """Make the dataclass ``kind`` of a mapping (null: an empty one) and what is ``given``; a null key: its default."""
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
    """Make a dataclass for each name of a mapping, such as ``comparisons``; null is none."""
    node = typed({} if node is None else node, Mapping, f"{file}: {key}")
    return {str(name): make(kind, part, f"{file}: {key}: {name}", name=str(name)) for name, part in node.items()}


def listed(kind: Any, node: Any, file: Path, key: str) -> tuple[Any, ...]:
    """Make a dataclass for each mapping of a list, such as ``figures``; null is none."""
    if not isinstance(node, (list, types.NoneType)):
        raise KdError(f"{file}: {key} = {node} is not allowed: it must be a list of mappings, one a line with a dash")
    return tuple(make(kind, part, f"{file}: {key}: number {i}") for i, part in enumerate(node or (), start=1))


# ---------------------------------------------------------------------- names, and what goes with what


def check(study: Study, file: Path, published: Path) -> None:
    """Raise ``KdError`` for a name that does not exist, a value out of range, and a row that waits for itself."""
    for row in study.rows.values():
        for name in (row.teacher, row.alone, *(r for r, _ in references.rows_read(row))):
            if name is not None:
                _must_exist(name, study.rows, "row", f"{file}: rows: {row.name}")
        for override in row.overrides:
            _check_override(override, f"{file}: rows: {row.name}")
    for comparison in study.comparisons.values():
        for name in (comparison.row, comparison.than, comparison.share_of):
            if name is not None:
                _must_exist(name, study.rows, "row", f"{file}: comparisons: {comparison.name}")
        _check_effects(comparison, f"{file}: comparisons: {comparison.name}")
    for evaluation in study.evaluations.values():
        for name in evaluation.rows or ():
            _must_exist(name, study.rows, "row", f"{file}: evaluations: {evaluation.name}")
    for i, condition in enumerate(study.supported, start=1):
        _check_condition(study, condition, f"{file}: supported: number {i}")
    for evaluation in study.evaluations.values():
        if bool(evaluation.eval) == bool(evaluation.bias):
            raise KdError(f"{file}: the evaluation {evaluation.name} needs either eval or bias")
    for i, figure in enumerate(study.figures, start=1):
        _check_figure(study, figure, f"{file}: figures: number {i}")
    if study.published is not None:
        _check_published(study, study.published, f"{published}: numbers")
    references.check(study)


def _check_override(override: str, what: str) -> None:
    """Refuse what the study sets, seed, name and directory; a row may only shift its seed, as in ``seed=100{seed}``."""
    key, _, value = override.lstrip("+").partition("=")
    if (key == "seed" and "{seed}" not in value) or key == "name" or key.startswith("hydra."):
        hint = " (or shift it: seed=100{seed})" if key == "seed" else ""
        raise KdError(f"{what}: {override} is not allowed: the study sets {key.partition('.')[0]}{hint}")


def _must_exist(name: str, known: Iterable[str], kind: str, what: str) -> None:
    if name not in known:
        raise KdError(f"{what}: there is no {kind} {name}{did_you_mean(name, known)}")


def _check_effects(comparison: Comparison, what: str) -> None:
    if comparison.sesoi is not None and comparison.sesoi <= 0:
        raise KdError(f"{what}: sesoi = {comparison.sesoi} is not allowed: it must be more than 0")
    if comparison.pilot is not None and comparison.pilot < 0:
        raise KdError(f"{what}: pilot = {comparison.pilot} is not allowed: it must be 0 or more, a standard deviation")


def _check_condition(study: Study, condition: Condition, what: str) -> None:
    _must_exist(condition.comparison, study.comparisons, "comparison", what)
    if condition.claim_of not in (None, PAPER, OURS):
        raise KdError(f"{what}: claim_of = {condition.claim_of} is not allowed: it must be {PAPER} or {OURS}")
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
        _must_exist(str(row), study.rows, "row", what)
        for measure, entry in typed(measures, Mapping, f"{what}: {row}").items():
            here = f"{what}: {row}: {measure}"
            refuse_unknown(typed(entry, Mapping, here), PUBLISHED_KEYS, here)
            if "value" not in entry:
                raise KdError(f"{here} = {entry} has no value, which it needs: a number")
            for key, value in entry.items():
                typed(value, float, f"{here}: {key}")
