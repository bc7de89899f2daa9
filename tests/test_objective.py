"""Weights, schedules and the weighted sum."""

from __future__ import annotations

import math

import pytest
import torch

from kd.distill.objective import Objective
from kd.distill.schedules import Cosine, Linear, Step
from kd.errors import KdError
from kd.losses.base import Batch, Output, Term


class Fixed(Term):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, student: Output, teacher: Output, batch: Batch) -> torch.Tensor:
        return self.value


BATCH = Batch(torch.zeros(1), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))


def test_weighted_sum_and_raw_values() -> None:
    objective = Objective({"a": Fixed(2.0), "b": Fixed(3.0)}, {"a": 0.5, "b": 10.0})
    values, total = objective(Output(), Output(), BATCH)
    assert [v.item() for v in values] == [2.0, 3.0]
    assert total.item() == 31.0


def test_gradients_carry_the_weights() -> None:
    objective = Objective({"a": Fixed(2.0), "b": Fixed(3.0)}, {"a": 0.5, "b": 0.0})
    objective(Output(), Output(), BATCH)[1].backward()
    assert [float(t.value.grad) for t in objective.terms.values()] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (Linear(start=0, end=1, epochs=20), {0: 0, 5: 0.25, 20: 1, 100: 1}),
        (Linear(start=4, end=1), {0: 4, 50: 2.5, 100: 1}),  # FitNets' lambda over the whole run
        (Cosine(), {0: 1, 25: (1 + math.cos(math.pi / 4)) / 2, 50: 0.5, 100: 0}),
        (Cosine(start=0, end=2, epochs=10), {0: 0, 5: 1, 10: 2, 99: 2}),
        (Step([30, 60], gamma=0.1), {0: 1, 29.9: 1, 30: 0.1, 60: 0.01}),
        (Step([10], gamma=0), {9: 1, 10: 0}),
    ],
)
def test_schedules(schedule, points) -> None:
    for epoch, factor in points.items():
        assert schedule(epoch, 100) == pytest.approx(factor, abs=1e-12)
        objective = Objective({"a": Fixed(1.0)}, {"a": 3.0}, {"a": schedule})
        assert objective.weight("a", epoch, 100) == pytest.approx(3 * factor, abs=1e-12)


@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan])
def test_negative_weights_are_refused(weight: float) -> None:
    with pytest.raises(KdError, match=r"loss\.a\.weight = .* is not allowed"):
        Objective({"a": Fixed(1.0)}, {"a": weight})


@pytest.mark.parametrize(
    "make",
    [lambda: Linear(start=-1), lambda: Cosine(epochs=0), lambda: Step([1], gamma=-1), lambda: Linear(end=math.nan)],
)
def test_schedules_refuse_bad_numbers(make) -> None:
    with pytest.raises(ValueError, match="is not allowed"):
        make()
