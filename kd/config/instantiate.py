"""Make objects from nodes with a ``_target_``: the only calls of ``hydra.utils.instantiate``. No torch.

A configuration may lie in a run directory that somebody else has made, so nothing is made by what runs or removes
anything.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate

from kd.config.keys import targets
from kd.errors import KdError, framed

# modules of which no node of a config is made
SYSTEM = (
    *("builtins.", "os.", "posix.", "nt.", "sys.", "subprocess.", "shutil.", "importlib.", "runpy.", "pty.", "socket."),
    *("ctypes.", "pickle.", "_pickle.", "code.", "webbrowser.", "torch.hub.", "torch.serialization."),
)
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def make(node: Mapping[str, Any], path: str, **extra: Any) -> Any:
    """Instantiate a node; whatever it complains about becomes one sentence that begins with its path."""
    refuse_system(node, path)
    try:
        return instantiate(dict(node), **extra)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, KdError):
            raise cause from None
        if isinstance(cause, (NameError, LookupError, ArithmeticError)):  # no complaint, but a mistake in the code
            raise framed(path, cause) from error
        raise KdError(f"{path}: {first_line(cause or error)}") from error
    except (ValueError, TypeError) as error:
        raise KdError(f"{path}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of a complaint, and of "Error loading 'own.Term':" also what went wrong."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return text.replace(".__init__()", "()")


def refuse_system(node: Any, path: str) -> None:
    """Raise ``KdError`` when a node of a config, or one inside of it, is made by what runs or removes anything."""
    for _, part in targets(node):
        target = str(part["_target_"])
        made = found(target) if DOTTED.fullmatch(target) else None
        if any(f"{name}.".startswith(SYSTEM) for name in (target, module_of(made) if made is not None else "")):
            raise KdError(f"{path}._target_ = {target} is refused: no setting allows it, it may run or remove anything")


def found(target: str) -> Any:
    """Import the object of a dotted path; None when it cannot be imported: that is said where it is built."""
    try:
        return get_object(target)
    except Exception:  # of a module that runs while it is imported
        return None


def module_of(made: Any) -> str:
    """Name the module in which something was defined, whatever module it was reached through; "" if not known."""
    while isinstance(made, functools.partial):
        made = made.func
    module = getattr(made, "__module__", None)
    return module if isinstance(module, str) else ""
