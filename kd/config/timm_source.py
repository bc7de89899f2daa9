"""What timm offers, read from its source without importing it: that would import torch, and take seconds."""

from __future__ import annotations

import re
from functools import lru_cache

from kd.config.signature import folder

TARGETS = ("kd.models.timm_model.timm_model", "kd.models.timm_unet.timm_unet", "timm.create_model")
"""The targets whose further arguments go to a network of timm."""


@lru_cache(maxsize=1)
def _texts() -> tuple[str, ...]:
    """Return all source files of timm, 0.04 s; none where it is not installed."""
    there = folder("timm")
    files = sorted(there.rglob("*.py")) if there is not None else []
    return tuple(file.read_text(encoding="utf-8", errors="replace") for file in files)


@lru_cache(maxsize=1)
def networks() -> frozenset[str]:
    """Return the names of all networks, 0.03 s."""
    return frozenset(n for text in _texts() for n in re.findall(r"^@register_model\s+def (\w+)\(", text, re.MULTILINE))


@lru_cache(maxsize=1)
def arguments() -> frozenset[str]:
    """Return the arguments with a default that any function of timm lists on a line of its own, 0.1 s."""
    line = re.compile(r"^\s+(\w+)(?:\s*:[^=\n]+)?\s*=[^=\n]*,\s*$", re.MULTILINE)
    return frozenset(name for text in _texts() for name in line.findall(text))


def may_take(name: str) -> bool:
    """Tell whether some network may take this argument: timm's source has the word; 0.1 s if it has not."""
    word = re.compile(rf"\b{re.escape(name)}\b")
    return not _texts() or any(word.search(text) for text in _texts())
