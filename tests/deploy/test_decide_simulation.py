"""What the intervals and sample sizes of ``kd decide`` promise, by simulation: coverage, error of the test, power."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from kd.deploy import cascade, quality

DRAWS = 4000  # a share of 5 % has a standard error of 0.35 points, one of 80 % of 0.63

limits = cache(quality.interval)  # the same counts come again and again


def counts(n: int, discordant: float, difference: float, seed: int = 0) -> np.ndarray:
    """Gained, lost and the rest of many samples of ``n`` examples, (draws, 3)."""
    shares = [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant]
    return np.random.default_rng(seed).multinomial(n, shares, size=DRAWS)


@pytest.mark.parametrize(
    ("n", "discordant", "difference"), [(100, 0.1, 0.0), (200, 0.1, -0.03), (300, 0.05, -0.02), (400, 0.2, 0.05)]
)
def test_the_interval_covers_the_truth_at_its_rate(n: int, discordant: float, difference: float) -> None:
    found = [limits(g, lost, n) for g, lost, _ in counts(n, discordant, difference).tolist()]
    covered = np.mean([low <= difference <= high for low, high in found])
    assert 0.94 <= covered <= 0.97


@pytest.mark.parametrize(("n", "discordant"), [(200, 0.1), (400, 0.05), (1000, 0.2)])
def test_a_student_that_loses_the_margin_is_seldom_called_non_inferior(n: int, discordant: float) -> None:
    wrong = [limits(g, lost, n, 0.9)[0] > -0.03 for g, lost, _ in counts(n, discordant, -0.03).tolist()]
    assert 0.03 <= np.mean(wrong) <= 0.06


@pytest.mark.parametrize(
    ("discordant", "margin", "difference"),
    [(0.05, 0.03, 0.0), (0.1, 0.03, 0.0), (0.2, 0.03, 0.0), (0.1, 0.05, -0.01), (0.15, 0.03, -0.08)],
)
def test_the_examples_needed_reach_their_power(discordant: float, margin: float, difference: float) -> None:
    n = quality.examples_needed(discordant, margin, difference)
    settled = []
    for gained, lost, _ in counts(n, discordant, difference).tolist():
        lower, upper = limits(gained, lost, n, 0.9)
        settled.append(lower > -margin if difference > -margin else upper < -margin)
    assert 0.78 <= np.mean(settled) <= 0.85
    fewer = n // 2  # half as many do not
    missed = [limits(g, lost, fewer, 0.9)[0] > -margin for g, lost, _ in counts(fewer, discordant, difference).tolist()]
    assert difference < -margin or np.mean(missed) < 0.7


@pytest.mark.slow
def test_the_bootstrap_covers_the_truth_nearly_at_its_rate() -> None:
    """It is a little too narrow, as percentiles of few discordant examples are; Tango's interval decides."""
    rng, truth, covered = np.random.default_rng(0), -0.02, []
    for seed in range(600):
        gain = rng.choice([1.0, -1.0, 0.0], size=300, p=[0.05, 0.07, 0.88])
        low, high = quality.bootstrap(gain, seed, resamples=500)
        covered.append(low <= truth <= high)
    assert 0.91 <= np.mean(covered) <= 0.97


def test_answers_that_differ_more_often_than_the_margin_are_seldom_enough() -> None:
    """Without labels: the upper limit of the disagreement is below a margin that equals the truth in 5 % at most."""
    differ, often = np.unique(np.random.default_rng(0).binomial(400, 0.03, size=DRAWS), return_counts=True)
    teacher, place = np.zeros(400), np.arange(400)
    found = [quality.agreement(np.where(place < d, 1, 0), teacher).limit < 0.03 for d in differ]
    assert np.average(found, weights=often) <= 0.06


@pytest.mark.slow
def test_a_threshold_that_loses_the_margin_is_seldom_chosen() -> None:
    """Twenty thresholds are tried in a fixed order: a wrong one passes in 5 % of the cases at most."""
    rng, passed, draws = np.random.default_rng(0), 0, 400
    for _ in range(draws):
        confidence = rng.random(400)
        student = rng.random(400) > 0.0305  # wherever it answers all, it loses a little more than the margin
        found = cascade.choose(
            cascade.Answers(confidence, student, np.ones(400, dtype=bool)), cascade.thresholds(confidence), 0.03
        )
        passed += found is not None and found <= np.quantile(confidence, 0.01)
    assert passed / draws <= 0.07
