"""YAML that a stranger may have written: a few lines of nested aliases can stand for more values than memory holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kd.errors import KdError, yaml_problem

MOST = 100_000
"""Values that a file may hold, those behind an alias (``*name``) counted wherever it stands."""


def load(text: str, loader: Any = yaml.SafeLoader) -> Any:
    """Load a YAML text. Raises ``KdError`` for more than :data:`MOST` values, else what ``loader`` raises.

    ``loader``: PyYAML's ``SafeLoader``, ``CSafeLoader``, or a subclass.
    """
    reader = loader(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None
        if _count(node, {}) > MOST:
            raise KdError(f"cannot be read: it holds more than {MOST:,} values, its aliases (*name) written out")
        return reader.construct_document(node)
    except RecursionError:
        raise KdError("cannot be read: its values are nested too deeply") from None
    except ValueError as error:  # a date or a number that there is not: PyYAML lets them through
        raise KdError(f"cannot be read: {str(error).splitlines()[0]}") from None
    finally:
        reader.dispose()


def mapping(file: Path, loader: Any = yaml.SafeLoader) -> dict[str, Any]:
    """Read the mapping in a YAML file. ``KdError`` if it is none, naming the file and, where it is known, the line."""
    try:
        node = load(file.read_text(encoding="utf-8"), loader)
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


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values that a node holds, each alias counted as if it were written out."""
    if id(node) not in known:
        known[id(node)] = MOST + 1  # an alias inside of what it stands for has no end
        parts = [p for pair in node.value for p in pair] if isinstance(node, yaml.MappingNode) else node.value
        inside = () if isinstance(node, yaml.ScalarNode) else parts
        known[id(node)] = 1 + sum(_count(part, known) for part in inside)
    return known[id(node)]
