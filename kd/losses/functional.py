"""The pure loss functions of all methods: tensors in, scalar out, torch only, for any training loop.

Collects what the method files name in ``__all__``; a method file is any module in a folder of ``kd.losses``.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, Any

import kd.losses

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...  # the names come into being below, where no type checker sees them


def _collect() -> dict[str, Any]:
    functions: dict[str, Any] = {}
    for found in pkgutil.walk_packages(kd.losses.__path__, "kd.losses."):
        if found.ispkg or found.name.count(".") < 3 or found.name.rpartition(".")[2].startswith("_"):
            continue  # a folder, what all methods share, what some of them share
        module = import_module(found.name)
        for name in module.__all__:
            if name in functions:
                raise ImportError(f"{functions[name].__module__} and {found.name} both define {name}: rename one")
            functions[name] = getattr(module, name)
    return functions


_functions = _collect()
globals().update(_functions)
__all__ = sorted(_functions)


def __dir__() -> list[str]:
    return __all__
