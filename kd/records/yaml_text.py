"""YAML that a stranger may have written: a few lines of nested aliases can stand for more values than memory holds."""

from __future__ import annotations

from typing import Any

import yaml

from kd.errors import KdError

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


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values that a node holds, each alias counted as if it were written out."""
    if id(node) not in known:
        known[id(node)] = MOST + 1  # an alias inside of what it stands for has no end
        parts = [p for pair in node.value for p in pair] if isinstance(node, yaml.MappingNode) else node.value
        inside = () if isinstance(node, yaml.ScalarNode) else parts
        known[id(node)] = 1 + sum(_count(part, known) for part in inside)
    return known[id(node)]
