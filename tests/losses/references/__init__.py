"""Reference files that bear the name of another implementation: how each is computed by our functions.

Every module of this folder, but those that begin with ``_``, has

- ``CASES``: pattern of file names → a function of the file's :class:`Case` that returns our value;
- ``LEFT_OUT``: pattern → why these files are not checked;
- and may have ``EQUAL`` and ``DIFFERENT``: what other implementations return for a method, or for a pattern of none
  (``test_golden.py``), and ``SINGLE``: patterns of files whose references ran in single precision, in parts at least,
  which the files do not say.

A pattern is one of ``fnmatch``; one without wildcards is the name of a file, perhaps with a number or a letter behind
it. Of several that match, the one with the most letters counts: ``trl_gkd_jsd_nolabels`` before ``trl_gkd_jsd_*``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from tests.golden_option import is_case
from tests.losses.references._case import Case


@cache
def modules() -> tuple[ModuleType, ...]:
    files = sorted(f.stem for f in Path(__file__).parent.glob("[!_]*.py"))
    return tuple(import_module(f"{__name__}.{stem}") for stem in files)


def merged(name: str) -> dict[Any, Any]:
    """The mappings of this name of all modules in one; ``ValueError`` where two modules have one key."""
    whole: dict[Any, Any] = {}
    for module in modules():
        part = getattr(module, name, {})
        if twice := sorted(map(str, whole.keys() & part.keys())):
            raise ValueError(f"{', '.join(twice)}: in {name} of two modules of {__name__}")
        whole |= part
    return whole


def functions() -> dict[str, Callable[[Case], Tensor]]:
    return merged("CASES")


def left_out() -> dict[str, str]:
    return merged("LEFT_OUT")


def single() -> set[str]:
    return {pattern for module in modules() for pattern in getattr(module, "SINGLE", ())}


def closest(stem: str, patterns: Iterable[str] | None = None) -> str | None:
    """The pattern that a file belongs to, by default among all those of the modules; None if there is none."""
    known = [*functions(), *left_out()] if patterns is None else list(patterns)
    found = [pattern for pattern in known if fnmatchcase(stem, pattern) or is_case(stem, pattern)]
    return max(found, key=lambda pattern: (pattern == stem, letters(pattern), pattern), default=None)


def letters(pattern: str) -> int:
    return len(re.sub(r"\[[^]]*\]|[*?]", "", pattern))
