"""The user's own code behind a ``_target_``: which source a run runs, and whether that is other source now. No torch.

Own is what lies neither in this package, nor in the standard library, nor in a folder of installed packages; a project
that is installed to be edited is own code. It is read and never imported.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import sysconfig
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from kd.config.signature import find
from kd.records.record import changes_results

INSTALLED = {"site-packages", "dist-packages"}  # folders of this name hold what was installed
STANDARD = {Path(os.path.realpath(sysconfig.get_path(name))) for name in ("stdlib", "platstdlib")}

Code = dict[str, str | None]
"""Module → twelve hex digits of its source; None for a file that cannot be read."""


def read_by(config: Mapping[str, Any], networks: Sequence[Any] = ()) -> dict[str, Code | None]:
    """Return which own code a run of this config runs: ``_target_`` → modules, None where there is no such module.

    ``networks``: further ones, that the config does not name. Left out are targets without own code, and those of
    sections that change no result, as loggers.
    """
    from kd.config.keys import targets  # start-up: omegaconf comes with it, a report only compares

    nodes = [node for path, node in targets(config) if changes_results(path)]
    with suppress(RecursionError):  # a stranger's file may be nested as deep as it likes
        nodes += [node for _, node in targets(list(networks))]
    named = {str(node["_target_"]) for node in nodes}
    found = {target: code_of(target) for target in sorted(named)}
    return {target: code for target, code in found.items() if code != {}}


def changed(record: Mapping[str, Any]) -> str:
    """Return a sentence when own code that a run of this record ran is other code now; "" when not, or not known."""
    for target, before in _known(record).items():
        now = code_of(target)
        if not now or not isinstance(before, Mapping):
            continue
        lost = {module for code in (before, now) for module, digest in code.items() if digest is None}
        other = [m for m in sorted({*before, *now} - lost) if before.get(m) != now.get(m)]
        if other:
            files = ", ".join(_file(module) for module in other)
            return f"_target_ = {target} is other code than when the run began (changed: {files})"
    return ""


def _known(record: Mapping[str, Any]) -> Mapping[str, Any]:
    there = record.get("code_read")
    return there if isinstance(there, Mapping) else {}


def fingerprint(record: Mapping[str, Any], targets: Collection[str]) -> str:
    """Hash to twelve hex digits the code with which a run of this record ran these targets.

    "" for none, or not known.
    """
    there = {target: code for target, code in _known(record).items() if target in targets}
    return hashlib.sha256(json.dumps(there, sort_keys=True).encode()).hexdigest()[:12] if there else ""


def mixed(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the targets that runs of these records ran with different code."""
    seen: dict[str, set[str]] = {}
    for record in records:
        for target, code in _known(record).items():
            seen.setdefault(target, set()).add(json.dumps(code, sort_keys=True))
    return [target for target, codes in seen.items() if len(codes) > 1]


def code_of(target: str) -> Code | None:
    """Return the own modules that a dotted target runs: its own, what that imports, and the packages they are in.

    Imports are followed wherever they stand in a file, those inside of functions too, by their names alone.
    None when there is no such module; empty when it is no own code.
    """
    found_now = functools.cache(find)  # of this moment: files come and go while a sweep runs
    if found_now(target.partition(".")[0]) is None:
        return None
    found: Code = {}
    waiting = [target]
    while waiting:
        name = waiting.pop()
        parts = name.split(".")
        if _installed(parts[0]):
            continue
        for count in range(1, len(parts) + 1):
            module = ".".join(parts[:count])
            spec = found_now(module)
            if spec is None:
                break
            package = spec.submodule_search_locations is not None
            if module not in found and spec.has_location and spec.origin and not _below_installed(spec.origin):
                found[module], imports = _read(spec.origin)
                base = module if package else module.rpartition(".")[0]
                waiting += [n for level, imported in imports if (n := _absolute(level, imported, base))]
            if not package:  # what follows are names in it
                break
    return dict(sorted(found.items()))


def _absolute(level: int, name: str, package: str) -> str:
    try:
        return resolve_name("." * level + name, package) if level else name
    except ImportError:  # beyond the outermost package: Python finds nothing there either
        return ""


@functools.lru_cache(maxsize=1024)
def _installed(package: str) -> bool:
    """Tell whether an outermost package is no own code; False as well for one that does not exist or has no file."""
    spec = find(package)
    if package == "kd" or spec is None or spec.origin is None:
        return package == "kd"
    return not spec.has_location or _below_installed(spec.origin)


@functools.lru_cache(maxsize=1024)
def _below_installed(file: str) -> bool:
    # the folder is resolved, not the file: installers link single files to their cache, and people whole projects
    folder = Path(os.path.realpath(os.path.dirname(file)))
    return not INSTALLED.isdisjoint(folder.parts) or not STANDARD.isdisjoint({folder, *folder.parents})


def _file(module: str) -> str:
    """Tell where a module lies, as seen from the working directory; its name when it is nowhere."""
    spec = find(module)
    if spec is None or spec.origin is None:
        return module
    file, here = Path(os.path.abspath(spec.origin)), Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


# ---------------------------------------------------------------------- one file


Imports = tuple[tuple[int, str], ...]  # leading dots, dotted name


def _read(file: str) -> tuple[str | None, Imports]:
    """Return twelve hex digits of a file's code, and what it imports; None and nothing when it cannot be read."""
    try:
        about = os.stat(file)
        return _parsed(file, about.st_mtime_ns, about.st_size)
    except OSError:  # inside of a zip archive, for example
        return None, ()


@functools.lru_cache(maxsize=4096)
def _parsed(file: str, changed: int, size: int) -> tuple[str, Imports]:
    """Read again only when the file has changed. What is no Python, or does not parse, counts by its bytes."""
    content = Path(file).read_bytes()
    imports: Imports = ()
    if file.endswith(".py"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python says it when the module is imported
                tree = ast.parse(content)
            content, imports = _spelled(tree).encode(), tuple(_imports(tree))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass
    return hashlib.sha256(content).hexdigest()[:12], imports


def _spelled(tree: ast.AST) -> str:
    """Return a syntax tree as text, without comments, docstrings and layout.

    Python 3.10 to 3.13 spell it alike; ``ast.dump`` and ``ast.unparse`` differ between them: a new Python alone would
    make runs outdated.
    """
    words: list[str] = []
    waiting: list[Any] = [tree]  # no recursion: whether it fits would depend on who calls
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.AST):
            fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
            words.append(f"{type(node).__name__}({len(fields)}")
            waiting += reversed(fields)
        elif isinstance(node, tuple):
            words.append(node[0])
            waiting.append(node[1])
        elif isinstance(node, list):
            kept = [n for n in node if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            words.append(f"[{len(kept)}")
            waiting += reversed(kept)
        else:
            words.append(ascii(node))
    return " ".join(words)


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield every name that is imported, those of ``from`` as well: each may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, ".".join(filter(None, (node.module, alias.name)))) for alias in node.names)
