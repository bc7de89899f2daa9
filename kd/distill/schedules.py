"""Schedules: what the weight of a term is multiplied by in the course of a run. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Schedule = Callable[[float, float], float]
"""``factor(epoch, epochs)``: what a term's weight is multiplied by at this (fractional) epoch of so many."""


class Linear:
    """Goes straight from ``start`` to ``end`` over the first ``epochs`` (default: the whole run), then stays.

    Warm-up is ``start=0, end=1, epochs=20`` (DKD); FitNets' lambda is ``start=4, end=1``.
    """

    def __init__(self, start: float = 0.0, end: float = 1.0, epochs: float | None = None) -> None:
        self.start, self.end, self.epochs = _factor("start", start), _factor("end", end), _length(epochs)

    def __call__(self, epoch: float, epochs: float) -> float:
        """Return the factor of the weight at a fractional epoch of so many."""
        done = min(1.0, epoch / (self.epochs or epochs))
        return self.start + (self.end - self.start) * done


class Cosine:
    """Goes from ``start`` to ``end`` along half a cosine over the first ``epochs`` (default: the whole run)."""

    def __init__(self, start: float = 1.0, end: float = 0.0, epochs: float | None = None) -> None:
        self.start, self.end, self.epochs = _factor("start", start), _factor("end", end), _length(epochs)

    def __call__(self, epoch: float, epochs: float) -> float:
        """Return the factor of the weight at a fractional epoch of so many."""
        done = min(1.0, epoch / (self.epochs or epochs))
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done)) / 2


class Step:
    """Multiplies by ``gamma`` (0 switches the term off) after each of the ``milestones``, in epochs."""

    def __init__(self, milestones: Sequence[float], gamma: float = 0.1) -> None:
        self.milestones, self.gamma = sorted(milestones), _factor("gamma", gamma)

    def __call__(self, epoch: float, epochs: float) -> float:
        """Return the factor of the weight at a fractional epoch of so many."""
        return self.gamma ** sum(epoch >= m for m in self.milestones)


def _factor(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} = {value} is not allowed: it must be a finite number, 0 or more")
    return value


def _length(epochs: float | None) -> float | None:
    if epochs is not None and not epochs > 0:
        raise ValueError(f"epochs = {epochs} is not allowed: it must be above 0, or null for the whole run")
    return epochs
