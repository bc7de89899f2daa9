"""The objective: named terms, their weights over time, and the adapters the terms own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from kd.errors import KdError
from kd.losses.base import Batch, Output, Term
from kd.parallel.group import Shares

Schedule = Callable[[float, int], float]
"""``factor(epoch, epochs)``: what a term's weight is multiplied by at this (fractional) epoch of so many."""


class Linear:
    """Goes straight from ``start`` to ``end`` over the first ``epochs`` (default: the whole run), then stays.

    Warm-up is ``start=0, end=1, epochs=20`` (DKD); FitNets' lambda is ``start=4, end=1``.
    """

    def __init__(self, start: float = 0.0, end: float = 1.0, epochs: float | None = None) -> None:
        self.start, self.end, self.epochs = _factor("start", start), _factor("end", end), _length(epochs)

    def __call__(self, epoch: float, epochs: int) -> float:
        done = min(1.0, epoch / (self.epochs or epochs))
        return self.start + (self.end - self.start) * done


class Cosine:
    """Goes from ``start`` to ``end`` along half a cosine over the first ``epochs`` (default: the whole run)."""

    def __init__(self, start: float = 1.0, end: float = 0.0, epochs: float | None = None) -> None:
        self.start, self.end, self.epochs = _factor("start", start), _factor("end", end), _length(epochs)

    def __call__(self, epoch: float, epochs: int) -> float:
        done = min(1.0, epoch / (self.epochs or epochs))
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done)) / 2


class Step:
    """Multiplies by ``gamma`` (0 switches the term off) after each of the ``milestones``, in epochs."""

    def __init__(self, milestones: Sequence[float], gamma: float = 0.1) -> None:
        self.milestones, self.gamma = sorted(milestones), _factor("gamma", gamma)

    def __call__(self, epoch: float, epochs: int) -> float:
        return self.gamma ** sum(epoch >= m for m in self.milestones)


def _factor(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} = {value} is not allowed: it must be a finite number, 0 or more")
    return value


def _length(epochs: float | None) -> float | None:
    if epochs is not None and not epochs > 0:
        raise ValueError(f"epochs = {epochs} is not allowed: it must be above 0, or null for the whole run")
    return epochs


class Objective(nn.Module):
    """The weighted sum of named terms.

    ``terms``: name → :class:`~kd.losses.base.Term`; ``weights``: name → constant factor (0 or more);
    ``schedules``: name → schedule, for terms whose weight changes. A term with weight 0 is still computed and
    logged, so that an ablation shows what it would have been.
    """

    def __init__(
        self,
        terms: Mapping[str, Term],
        weights: Mapping[str, float] | None = None,
        schedules: Mapping[str, Schedule] | None = None,
    ) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(dict(terms))
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in terms}
        self.schedules = dict(schedules or {})
        for name, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise KdError(f"loss.{name}.weight = {weight} is not allowed: it must be a finite number, 0 or more")

    def items(self) -> list[tuple[str, Term]]:
        """Name and term, in the order of the config."""
        return [(name, cast(Term, term)) for name, term in self.terms.items()]

    @property
    def names(self) -> list[str]:
        """The terms' names, in the order of the values of :meth:`forward`."""
        return list(self.terms)

    def needs(self, what: str) -> list[str]:
        """The names of the terms that declare ``needs_<what>``: teacher, logits or labels."""
        return [name for name, term in self.items() if getattr(term, f"needs_{what}")]

    def check_teacher(self, given: bool) -> None:
        """``KdError`` when a term needs a teacher and none is given."""
        wanting = self.needs("teacher")
        if wanting and not given:
            raise KdError(
                f"loss.{wanting[0]} needs a teacher: give teacher.checkpoint=RUN or model@teacher=NAME, or leave the "
                "term out (loss=[ce])"
            )

    def weight(self, name: str, epoch: float, epochs: int) -> float:
        """The factor of a term at this (fractional) epoch."""
        schedule = self.schedules.get(name)
        return self.weights[name] * (schedule(epoch, epochs) if schedule else 1.0)

    def forward(
        self,
        student: Output,
        teacher: Output,
        batch: Batch,
        epoch: float = 0.0,
        epochs: int = 1,
        shares: Shares | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Each term's unweighted value, and their weighted sum (all scalars).

        With ``shares`` the sum is this process's part: the mean of all parts is the objective of the whole batch.
        """
        values = [term(student, teacher, batch) for _, term in self.items()]
        weights: list[Any] = [self.weight(name, epoch, epochs) for name in self.terms]
        if shares is not None:
            parts = (shares.labelled if term.needs_labels else shares.rows for _, term in self.items())
            weights = [w * part for w, part in zip(weights, parts, strict=True)]
        total = torch.stack([w * v.float() for w, v in zip(weights, values, strict=True)]).sum()
        return values, total
