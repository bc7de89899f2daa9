"""What a search may choose from, in Hydra's own sweep grammar: ``interval``, ``range``, ``choice``, ``tag(log, …)``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from kd.config import explain
from kd.config.composition import key_of
from kd.errors import KdError, did_you_mean
from kd.sweeps.grid import axis, short_names


@dataclass(frozen=True)
class Space:
    """``fixed``: overrides of every trial; ``axes``: key → Optuna's distribution; ``spelling``: key → as written.

    ``applying``: of all overrides of a trial those that mean something in it (:class:`kd.sweeps.terms.Terms`).
    """

    fixed: tuple[str, ...]
    axes: Mapping[str, Any]
    spelling: Mapping[str, str]
    applying: Callable[[Sequence[str]], tuple[str, ...]] = tuple

    def overrides(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the command line of one trial, complete."""
        return self.applying([*self.fixed, *(f"{key}={text(params[key])}" for key in self.axes)])

    def label(self, params: Mapping[str, Any]) -> str:
        """Write the values of a trial for people: short names, four digits."""
        names = short_names(list(self.axes))
        values = {k: f"{v:.4g}" if isinstance(v, float) else f"{v}" for k, v in params.items()}
        chosen = {key_of(override) for override in self.overrides(params)}
        return " ".join(f"{names[key]}={values[key]}" for key in self.axes if key.lstrip("+") in chosen)

    def corners(self) -> list[dict[str, Any]]:
        """Return the first value of every axis, then each end (or each choice) of one axis after the other."""
        ends = {k: list(d.choices) if hasattr(d, "choices") else [d.low, d.high] for k, d in self.axes.items()}
        first = {key: values[0] for key, values in ends.items()}
        return [first, *({**first, key: v} for key, values in ends.items() for v in values[1:] if v != values[0])]

    def students(self, most: int) -> list[dict[str, Any]]:
        """Return every combination of the values of the student's axes, the others at their first; [] of too many."""
        first = self.corners()[0]
        values = {key: _values(axis) for key, axis in self.axes.items() if _is_student(key)}
        if math.prod(len(of_key) if of_key else most + 1 for of_key in values.values()) > most:
            return []
        return [{**first, **dict(zip(values, chosen, strict=True))} for chosen in itertools.product(*values.values())]


def _is_student(key: str) -> bool:
    return key.lstrip("+").startswith(("student.", "model@student"))


def _values(axis: Any) -> list[Any]:
    """List what an axis holds, [] of an interval."""
    if hasattr(axis, "choices"):
        return list(axis.choices)
    return list(range(axis.low, axis.high + 1, axis.step)) if isinstance(axis.low, int) else []


def text(value: Any) -> str:
    """Return a value as it is written on the command line, so that it is read back as the same number."""
    return repr(value) if isinstance(value, float) else str(value)


def space(parser: OverridesParser, arguments: Sequence[str]) -> Space:
    """Read the arguments of the sweep. ``KdError`` for an axis that holds nothing, or when there is none."""
    try:
        overrides = [o for o in parser.parse_overrides(list(arguments)) if not o.is_hydra_override()]
    except explain.KNOWN as error:
        raise KdError(explain.explain(error, arguments)) from error
    fixed: list[str] = []
    axes: dict[str, Any] = {}
    spelling: dict[str, str] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            fixed.append(override.input_line or "")
            continue
        if key in axes:
            raise KdError(f"{key} is searched twice: {spelling[key]} and {override.input_line}")
        spelling[key] = override.input_line or key
        axes[key] = _axis(override)
    if not axes:
        raise KdError(
            "a search needs something to search over, for example "
            "'recipe.optimizer.lr=tag(log,interval(1e-4,1e-1))' or 'loss.kd.temperature=2,4,8'"
        )
    return Space(tuple(fixed), axes, spelling)


def _axis(override: Override) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep, line = override.value(), override.input_line
    tags = set(getattr(sweep, "tags", ()))
    for tag in tags - {"log"}:
        raise KdError(
            f"{line}: there is no tag {tag}{did_you_mean(tag, ['log'])}: only tag(log, interval(…)) means something"
        )
    if tags and not isinstance(sweep, IntervalSweep):
        raise KdError(f"{line}: the tag log goes with an interval: tag(log, interval(LOW, HIGH))")
    if isinstance(sweep, IntervalSweep):
        low, high = sweep.start, sweep.end
        if low is None or high is None or not -math.inf < low < high < math.inf:
            raise KdError(f"{line}: the first number of an interval must be below the second, and both finite")
        if tags and not low > 0:
            raise KdError(f"{line}: a logarithmic interval must begin above 0")
        if isinstance(low, int) and isinstance(high, int):  # int(interval(1, 8))
            return IntDistribution(low, high, log=bool(tags))
        return FloatDistribution(low, high, log=bool(tags))
    if isinstance(sweep, RangeSweep):
        values = sorted(sweep.range())
        if not values:
            raise KdError(f"{line} is a sweep over nothing")
        step, low = abs(sweep.step), values[0]
        if all(isinstance(v, int) for v in values):
            return IntDistribution(int(low), int(values[-1]), step=int(step))
        high = round(low + step * (len(values) - 1), 12)  # the sum of the steps may end below the last number
        return FloatDistribution(low, high, step=step)
    return CategoricalDistribution([v or "" for v in axis(override)[1]])
