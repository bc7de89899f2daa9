"""The source of a loss term, read without importing it: docstrings, functions, classes and constants. No torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from inspect import cleandoc
from pathlib import Path
from typing import Any

from kd.config.signature import find
from kd.errors import KdError


@dataclass(frozen=True)
class Function:
    """A pure function: how it is called, and the paragraphs of its docstring."""

    call: str
    paragraphs: list[str]


@dataclass(frozen=True)
class Module:
    """The source of a module: its docstring, functions and classes, without importing it."""

    path: Path
    tree: ast.Module

    @property
    def doc(self) -> str:
        """The docstring, without the name of the method that may begin it."""
        return plain(ast.get_docstring(self.tree) or "")

    def functions(self) -> list[Function]:
        """List the pure functions: those of ``__all__``, or without one all whose names are public."""
        nodes = {n.name: n for n in self.tree.body if isinstance(n, ast.FunctionDef)}
        named = constant(self.tree.body, "__all__")
        names = [n for n in nodes if (n in named if named is not None else not n.startswith("_"))]
        return [Function(f"{n}({ast.unparse(nodes[n].args)})", paragraphs(nodes[n])) for n in names]

    def definition(self, name: str) -> ast.ClassDef | None:
        """Find the class of this name, defined here."""
        return next((n for n in self.tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)

    def origin(self, name: str) -> str:
        """Return the module from which a name is imported; empty if it is not."""
        froms = [n for n in self.tree.body if isinstance(n, ast.ImportFrom) and not n.level]
        return next((n.module or "" for n in froms if name in [a.asname or a.name for a in n.names]), "")


@cache  # the base classes are those of all
def source(module: str) -> Module | None:
    """Read the source of a module, found without importing it."""
    spec = find(module) if module else None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        return Module(Path(spec.origin), ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    except (SyntaxError, ValueError) as error:
        raise KdError(f"{spec.origin} does not parse: {error}") from None


def lineage(module: Module | None, name: str) -> Iterator[ast.ClassDef]:
    """Yield a class and its bases, as far as they can be read: the nearest first."""
    found = None
    while module is not None and found is None:
        found = module.definition(name)
        module = module if found is not None else source(module.origin(name))
    if found is None:
        return
    yield found
    for base in found.bases:
        if isinstance(base, ast.Name):
            yield from lineage(module, base.id)


def declared(classes: Sequence[ast.ClassDef], name: str, default: Any) -> Any:
    """Return what the nearest class assigns to an attribute as a constant."""
    values = (constant(node.body, name) for node in classes)
    return next((value for value in values if value is not None), default)


def constant(body: Sequence[ast.stmt], name: str) -> Any:
    """Return the constant that a name is assigned to; None if it is not, or to something else."""
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        flat = [t for target in targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
        if name in [t.id for t in flat if isinstance(t, ast.Name)]:
            value = getattr(node, "value", None)
            with suppress(ValueError):
                return ast.literal_eval(value) if value is not None else None
    return None


def paragraphs(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """Return the docstring, by paragraphs, without the marks of reStructuredText."""
    text = cleandoc(ast.get_docstring(node) or "")
    return [plain(part) for part in text.split("\n\n") if part]


def plain(text: str) -> str:
    """Take the marks of reStructuredText away: ``:func:`~a.b``` → b."""
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`|``([^`]*)``", lambda m: m[1] or m[2], text)
