"""What arguments a ``_target_`` takes, read from its source without importing it.

A mistyped key below a ``_target_`` must stop a run in a fraction of a second; importing torch to ask costs ten.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.machinery import ModuleSpec
from importlib.util import resolve_name
from pathlib import Path
from pkgutil import get_importer

from kd.errors import did_you_mean


@dataclass(frozen=True)
class Arguments:
    """The argument names of a callable; ``any`` when it takes ``**kwargs`` or cannot be read from source.

    ``types``: the annotations of those that have one, as they are written.
    """

    names: tuple[str, ...] = ()
    any: bool = False
    types: Mapping[str, str] = field(default_factory=dict)


UNKNOWN = Arguments(any=True)


def arguments(target: str) -> Arguments:
    """Return the arguments of the function or class with this dotted path.

    Raises ``LookupError`` with one sentence when the module, or the name in it, does not exist.
    """
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        spec = find(".".join(parts[:cut]))
        if spec is not None and spec.loader is not None:  # a folder without an __init__.py has no names of its own
            return _in_module(spec, parts[cut:], depth=0)
    raise LookupError(f"there is no module {parts[0]!r}" if find(parts[0]) is None else f"{target!r} was not found")


def find(module: str) -> ModuleSpec | None:
    """Return the spec of a module, found by path: no parent package is imported on the way."""
    search: list[str] | None = None
    spec = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = _editable_or_path(name, search)
        if spec is None:
            return None
        search = list(spec.submodule_search_locations or [])
    return spec


def folder(package: str) -> Path | None:
    """Return the folder of a package, found without importing it; None if there is none."""
    spec = find(package) if package else None
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _editable_or_path(name: str, search: list[str] | None) -> ModuleSpec | None:
    if search is None:  # a top-level name: ask every finder, so that editable installs are found too
        for finder in sys.meta_path:
            spec = finder.find_spec(name, None, None) if hasattr(finder, "find_spec") else None
            if spec is not None:
                return spec
        return None
    folders: list[str] = []  # of a package without an __init__.py: PathFinder wants its parent to be imported
    for folder in search:
        importer = get_importer(folder)
        spec = importer.find_spec(name) if importer is not None else None
        if spec is not None and spec.loader is not None:
            return spec
        folders += (spec.submodule_search_locations or ()) if spec is not None else ()
    if not folders:
        return None
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = folders
    return spec


@lru_cache(maxsize=256)
def _tree(path: str) -> ast.Module | None:
    if not path.endswith(".py"):
        return None
    try:
        return ast.parse(Path(path).read_text(encoding="utf-8", errors="replace"), Path(path).name)
    except (SyntaxError, ValueError) as error:  # ValueError: null bytes
        raise LookupError(f"{path} does not parse: {error}") from None


def _in_module(spec: ModuleSpec, names: list[str], depth: int) -> Arguments:
    tree = _tree(spec.origin or "")
    if tree is None or depth > 8:
        return UNKNOWN
    body: list[ast.stmt] = tree.body
    for position, name in enumerate(names):
        node = _definition(body, name)
        if node is None:
            if _is_dynamic(body):
                return UNKNOWN
            known = [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
            raise LookupError(f"there is no {name!r} in {spec.name}{did_you_mean(name, known)}")
        if isinstance(node, ast.ImportFrom):
            return _follow(spec, node, name, names[position + 1 :], depth)
        if isinstance(node, ast.FunctionDef):
            return _of_function(node, skip=0)
        if not isinstance(node, ast.ClassDef):
            return UNKNOWN
        if position == len(names) - 1:
            return _of_class(spec, node, depth)
        body = node.body
    return UNKNOWN


def _definition(body: list[ast.stmt], name: str) -> ast.stmt | None:
    found: ast.stmt | None = None
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            found = node
        elif isinstance(node, (ast.ImportFrom, ast.Import)):
            if any((alias.asname or alias.name) == name for alias in node.names):
                found = node
        elif isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            found = node
    return found


def _is_dynamic(body: list[ast.stmt]) -> bool:
    """Tell whether names may come into being that the source does not spell out."""
    for node in body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            return True
        if isinstance(node, ast.FunctionDef) and node.name == "__getattr__":
            return True
        if isinstance(node, (ast.If, ast.Try)):
            return True
    return False


def _follow(spec: ModuleSpec, node: ast.ImportFrom, name: str, rest: list[str], depth: int) -> Arguments:
    package = spec.name if spec.submodule_search_locations else spec.name.rpartition(".")[0]
    module = resolve_name("." * node.level + (node.module or ""), package) if node.level else (node.module or "")
    original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
    inner = find(module)
    if inner is None:
        return UNKNOWN
    submodule = find(f"{module}.{original}")
    if submodule is not None and rest:
        return _in_module(submodule, rest, depth + 1)
    return _in_module(inner, [original, *rest], depth + 1)


def _of_function(node: ast.FunctionDef, skip: int) -> Arguments:
    positional = [a.arg for a in (*node.args.posonlyargs, *node.args.args)][skip:]
    names = (*positional, *(a.arg for a in node.args.kwonlyargs))
    every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    types = {a.arg: ast.unparse(a.annotation) for a in every if a.annotation is not None}
    return Arguments(tuple(names), node.args.kwarg is not None, types)


def _of_class(spec: ModuleSpec, node: ast.ClassDef, depth: int) -> Arguments:
    init = _definition(node.body, "__init__")
    if isinstance(init, ast.FunctionDef):
        own = _of_function(init, skip=1)
        return own if not own.any or not node.bases else _with_bases(spec, node, own, depth)
    if node.decorator_list:  # a dataclass, most likely
        fields = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        return Arguments(tuple(fields), any=bool(node.bases))
    return _with_bases(spec, node, Arguments(), depth)


def _with_bases(spec: ModuleSpec, node: ast.ClassDef, own: Arguments, depth: int) -> Arguments:
    """Join a subclass's own names and those of the first base that can be read: its ``**kwargs`` go to its base."""
    if not node.bases:
        return own
    base = node.bases[0]
    if not isinstance(base, ast.Name):
        return UNKNOWN
    try:
        inherited = _in_module(spec, [base.id], depth + 1)
    except LookupError:
        return UNKNOWN
    return Arguments((*own.names, *inherited.names), inherited.any, {**inherited.types, **own.types})
