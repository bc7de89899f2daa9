"""What the value of an option may be: a test, and the words of the sentence that refuses all others. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd.errors import KdError


@dataclass(frozen=True)
class Rule:
    """Which values are allowed: as a test, and in words that follow "it must be"."""

    words: str
    fits: Callable[[Any], bool]

    @property
    def or_null(self) -> Rule:
        """Allow null as well."""
        return Rule(f"{self.words}, or null", lambda value: value is None or self.fits(value))


FLAG = Rule("true or false", lambda value: isinstance(value, bool))


def whole(least: int, most: float = math.inf) -> Rule:
    """Allow integers; true and false are none."""
    words = f", {least} or more" if most == math.inf else f" from {least} to {most}"
    inside = number(least=least, most=most)
    return Rule(f"a whole number{words}", lambda value: isinstance(value, int) and inside.fits(value))


def number(
    *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf, most: float = math.inf
) -> Rule:
    """Allow finite numbers; true and false are none."""
    bounds = {f"{least} or more": least, f"above {above}": above, f"below {below}": below, f"at most {most}": most}
    words = " and ".join(text for text, bound in bounds.items() if math.isfinite(bound))
    kind = "a finite number" if below == most else "a number"
    gap = "" if not words else ", " if math.isfinite(least) else " "

    def fits(value: Any) -> bool:
        real = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
        return real and least <= value <= most and above < value < below

    return Rule(f"{kind}{gap}{words}", fits)


def one_of(*choices: Any) -> Rule:
    """Allow these values."""
    *others, last = map(shown, choices)
    return Rule(f"{', '.join(others)} or {last}", lambda value: value in choices)


def list_of(rule: Rule, least: int = 1) -> Rule:
    """Allow lists of at least so many values, of each of which ``rule``, one of numbers, is true."""

    def fits(value: Any) -> bool:
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        return listed and len(value) >= least and all(map(rule.fits, value))

    return Rule(f"a list of {rule.words.removeprefix('a ').replace('number', 'numbers')}", fits)


def shown(value: Any) -> str:
    """Write a value as an override does."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def refusals(prefix: str, values: Mapping[str, Any], rules: Mapping[str, Rule]) -> list[str]:
    """Return one sentence for each value that its rule does not allow.

    The keys of ``rules`` may have dots; one that ``values`` lacks is not checked. ``prefix``: of all keys.
    """
    return [
        f"{prefix}{key} = {shown(value)} is not allowed: it must be {rule.words}"
        for key, rule in rules.items()
        for value in _given(values, key)
        if not rule.fits(value)
    ]


def _given(values: Any, key: str) -> list[Any]:
    """Return the one value of a key with dots, [] where there is none."""
    first, _, rest = key.partition(".")
    if not isinstance(values, Mapping) or first not in values:
        return []
    return _given(values[first], rest) if rest else [values[first]]


def refuse(problems: Sequence[str]) -> None:
    """Raise ``KdError`` with all of them, when there are any."""
    if problems:
        raise KdError("\n".join(problems))
