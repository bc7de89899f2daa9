"""Whether the value of an argument is of the type that its annotation says, where that is known without importing.

A word in the place of a number must stop a run before torch is imported; ranges are the business of the code itself.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

PLAIN = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "None": "null"}
LISTS = ("Sequence", "list", "Iterable")


def complaint(value: Any, annotation: str) -> str:
    """Say what the value must be, "" where it is that or where the annotation names a type of somebody else.

    >>> complaint("abc", "float | None")
    'it must be a number or null'
    """
    try:
        parts = list(_alternatives(ast.parse(annotation, mode="eval").body))
    except SyntaxError:
        return ""
    words = [_words(part) for part in parts]
    if None in words or any(_is(value, part) for part in parts):
        return ""
    kinds = list(dict.fromkeys(word for word in words if word))
    return f"it must be {kinds[0] if len(kinds) == 1 else ', '.join(kinds[:-1]) + ' or ' + kinds[-1]}"


def _alternatives(node: ast.expr) -> Any:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _alternatives(node.left)
        yield from _alternatives(node.right)
    elif isinstance(node, ast.Subscript) and _name(node.value) in ("Optional", "Union"):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for part in inner:
            yield from _alternatives(part)
        if _name(node.value) == "Optional":
            yield ast.Constant(None)
    else:
        yield node


def _words(node: ast.expr) -> str | None:
    """Say how a type is called; None for one that is not known here."""
    if isinstance(node, ast.Constant) and node.value is None:
        return PLAIN["None"]
    if isinstance(node, ast.Name) and node.id in PLAIN:
        return PLAIN[node.id]
    if isinstance(node, ast.Subscript) and _name(node.value) in LISTS:
        inner = _words(_element(node))
        return None if inner is None else f"a list of {inner.removeprefix('a ')}{'' if inner == PLAIN['bool'] else 's'}"
    return None


def _is(value: Any, node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return value is None
    if isinstance(node, ast.Subscript):
        return isinstance(value, (list, tuple)) and all(
            any(_is(part, one) for one in _alternatives(_element(node))) for part in value
        )
    name = _name(node)
    if name == "bool":
        return isinstance(value, bool)
    if name in ("int", "float"):
        kinds = (int,) if name == "int" else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    return isinstance(value, str) and not isinstance(value, Mapping)


def _element(node: ast.Subscript) -> ast.expr:
    inner = node.slice
    return inner.elts[0] if isinstance(inner, ast.Tuple) and inner.elts else inner


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
