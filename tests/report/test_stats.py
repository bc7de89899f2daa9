"""Intervals and tests against scipy, against their own definition, and against known truths."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.power import TTestPower

from kd.report import stats

RNG = np.random.default_rng(0)
ALONE, DISTILLED, TEACHER = RNG.normal(0.90, 0.01, 5), RNG.normal(0.95, 0.01, 5), RNG.normal(0.97, 0.005, 5)


def test_the_paired_difference_is_scipys() -> None:
    found = stats.difference(DISTILLED, ALONE)
    reference = scipy_stats.ttest_rel(DISTILLED, ALONE)
    interval = reference.confidence_interval(0.95)
    assert found.estimate == pytest.approx((DISTILLED - ALONE).mean())
    assert found.theory == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(reference.pvalue)
    assert found.headline == found.theory
    assert found.method == "Student's t, 5 seeds"


def test_the_bootstrap_stands_beside_students_t_and_repeats_itself() -> None:
    a, b = RNG.normal(1, 1, 12), RNG.normal(0, 1, 12)
    found = stats.difference(a, b)
    assert found.bootstrap == stats.difference(a, b).bootstrap
    assert found.headline == found.theory
    assert found.method == "Student's t, 12 seeds"
    assert found.bootstrap == pytest.approx(found.theory, abs=0.25)
    assert found.bootstrap[0] < found.estimate < found.bootstrap[1]


def test_a_bootstrap_of_few_seeds_is_narrower_than_students_t() -> None:
    found = stats.difference(DISTILLED[:3], ALONE[:3])
    assert np.ptp(found.bootstrap) < np.ptp(found.theory)


def test_one_seed_has_no_interval_and_says_so() -> None:
    for found in (stats.difference([0.9], [0.8]), stats.share([0.9], [0.8], [1.0]), stats.mean([0.5])):
        assert found.headline is None
        assert found.p is None
        assert found.note == "one seed: no interval"
    assert stats.share([0.9], [0.8], [1.0]).estimate == pytest.approx(0.5)
    assert np.isnan(stats.difference([], []).estimate)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([10, 12], [7, 9]),
        ([0.5] * 12, [0.5] * 12),  # no difference at all
        ([0.91, 0.92, 0.95], [0.90, 0.91, 0.94]),  # equal but for rounding, in double …
        (np.float32([269 / 270, 265 / 270]), np.float32([261 / 270, 257 / 270])),  # … and in single precision
    ],
)
def test_seeds_that_all_agree_have_no_spread_to_judge_by(a, b) -> None:
    found = stats.difference(a, b)
    assert found.estimate == pytest.approx(np.mean(np.asarray(a, float) - b), abs=1e-12)
    assert found.headline is found.bootstrap is found.p is None
    assert found.note == "all seeds gave the same difference: no spread to judge by"


def test_one_image_of_many_is_a_spread() -> None:
    found = stats.difference([0.90, 0.90, 0.90 + 1 / 50_000], [0.80] * 3)  # one of ImageNet's 50,000
    assert 0 < found.p < 0.001
    assert found.theory[0] < found.theory[1]


def test_hard_labels_at_zero_leave_the_spread_of_the_other_row() -> None:
    """A class that hard labels never learn: 0.0 in all seeds, which is no equal difference."""
    found = stats.difference([0.61, 0.74, 0.70], [0.0] * 3)
    assert found.theory[0] > 0
    assert found.p == pytest.approx(scipy_stats.ttest_1samp([0.61, 0.74, 0.70], 0).pvalue)


@pytest.mark.parametrize(
    ("row", "than", "top", "closed"),
    [
        ([0.85, 0.85], [0.8, 0.8], [0.9, 0.9], 0.5),
        ([0.9, 1.0], [0.8, 0.8], [0.9, 1.0], 1.0),
        (np.float32([0.91, 0.93]), np.float32([0.90, 0.92]), np.float32([0.93, 0.95]), 1 / 3),  # but for rounding
    ],
)
def test_a_share_that_all_seeds_agree_on_has_no_interval(row, than, top, closed) -> None:
    found = stats.share(row, than, top)
    assert found.estimate == pytest.approx(closed, abs=1e-5)
    assert found.headline is found.bootstrap is found.p is None
    assert found.note == "all seeds gave the same share: no spread to judge by"


@pytest.mark.parametrize("top", [TEACHER, np.full(5, 0.97)], ids=["five teachers", "one teacher"])
def test_fiellers_bounds_are_where_the_paired_test_is_exactly_at_five_percent(top: np.ndarray) -> None:
    found = stats.share(DISTILLED, ALONE, top)
    assert found.estimate == pytest.approx((DISTILLED - ALONE).mean() / (top - ALONE).mean())
    for bound in found.theory:
        left = (DISTILLED - ALONE) - bound * (top - ALONE)
        assert scipy_stats.ttest_1samp(left, 0).pvalue == pytest.approx(0.05, abs=1e-6)
    assert found.theory[0] < found.estimate < found.theory[1]


def test_a_gap_that_is_not_clear_of_zero_has_no_share() -> None:
    found = stats.share([0.1, 0.2, 0.3], [0.1, 0.2, 0.25], [0.11, 0.18, 0.28])
    assert found.headline is None
    assert "not clear of 0" in found.note


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([]) == []


def test_ranks_and_friedman() -> None:
    errors = np.array([[5, 6, 5, 4], [7, 8, 9, 6], [5, 9, 7, 5]])
    found, p = stats.ranks(errors, lower_is_better=True)
    assert found == pytest.approx([(1.5 + 1 + 1 + 1) / 4, (3 + 2 + 3 + 3) / 4, (1.5 + 3 + 2 + 2) / 4])
    assert p == pytest.approx(scipy_stats.friedmanchisquare(*errors).pvalue)
    assert stats.ranks(errors, lower_is_better=False)[0] == pytest.approx(4 - found)
    assert stats.ranks(errors[:2], True)[1] is None
    assert stats.ranks(np.ones((3, 4)), True)[1] is None


def images(only_row: int, only_than: int, both: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    row = np.repeat([True, False, True, False], [only_row, only_than, both, neither])
    than = np.repeat([False, True, True, False], [only_row, only_than, both, neither])
    return row, than


def test_mcnemar_exact_and_by_chi_square() -> None:
    assert stats.mcnemar(*images(8, 2, 50, 5)) == pytest.approx(scipy_stats.binomtest(2, 10).pvalue)
    chi = (abs(40 - 15) - 1) ** 2 / 55
    assert stats.mcnemar(*images(40, 15, 500, 5)) == pytest.approx(scipy_stats.chi2.sf(chi, 1))
    assert stats.mcnemar(*images(0, 0, 5, 5)) == 1.0


def test_over_images_the_seeds_of_one_image_are_one_observation() -> None:
    index = np.arange(400)
    row, than = images(40, 15, 300, 45)
    once = stats.over_images([(index, row, than)])
    five = stats.over_images([(index, row, than)] * 5)
    assert once.estimate == five.estimate == pytest.approx(25 / 400)
    assert (once.low, once.high) == pytest.approx((five.low, five.high))  # five identical seeds add no certainty
    spread = np.std(row.astype(float) - than) / 20
    assert (once.low, once.high) == pytest.approx((25 / 400 - 1.96 * spread, 25 / 400 + 1.96 * spread), abs=0.004)
    assert (five.only_row, five.only_than, five.images, five.seeds) == (200, 75, 400, 5)
    assert five.p == pytest.approx(min(1, 2 * once.p))
    assert once.p == stats.mcnemar(row, than)


def test_over_images_of_different_test_sets() -> None:
    row, than = images(4, 1, 4, 1)
    found = stats.over_images([(np.arange(10), row, than), (np.arange(5, 15), row, than)])
    assert found.images == 15
    assert found.estimate == pytest.approx(6 / 20)
    same = stats.over_images([(np.arange(10), row, row)])
    assert (same.estimate, same.low, same.high, same.p) == (0, 0, 0, 1)


# ---------------------------------------------------------------------- what a design can show, and one run


@pytest.mark.parametrize("n", [2, 3, 5, 10, 40])
def test_the_detectable_effect_has_a_power_of_80_percent(n) -> None:
    """By statsmodels, another implementation; infinity for one pair."""
    assert stats.detectable(n) == pytest.approx(TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8), rel=1e-3)
    assert stats.detectable(1) == np.inf


def test_the_detectable_effect_is_found_in_four_of_five_simulated_studies() -> None:
    rng = np.random.default_rng(1)
    differences = rng.normal(3 * stats.detectable(5), 3, (20_000, 5))
    found = scipy_stats.ttest_1samp(differences, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_nineteen_of_twenty_further_runs_lie_in_the_prediction_interval() -> None:
    rng = np.random.default_rng(2)
    runs = rng.normal(100, 7, (4000, 6))
    bounds = np.array([stats.one_more(line[:5]) for line in runs])
    inside = (bounds[:, 0] < runs[:, 5]) & (runs[:, 5] < bounds[:, 1])
    assert inside.mean() == pytest.approx(0.95, abs=0.012)
    low, high = stats.one_more([1.0, 2.0, 6.0])
    reach = scipy_stats.t.ppf(0.975, 2) * np.std([1, 2, 6], ddof=1) * (1 + 1 / 3) ** 0.5
    assert (low, high) == pytest.approx((3 - reach, 3 + reach))
    assert stats.one_more([1.0]) is stats.one_more([2.0, 2.0]) is stats.one_more([]) is None


def test_the_narrow_interval_is_of_90_percent() -> None:
    found = stats.difference(DISTILLED, ALONE)
    interval = scipy_stats.ttest_rel(DISTILLED, ALONE).confidence_interval(0.9)
    assert found.narrow == pytest.approx((interval.low, interval.high))
    assert found.spread == pytest.approx((DISTILLED - ALONE).std(ddof=1))
    share = stats.share(DISTILLED, ALONE, TEACHER)
    for bound in share.narrow:
        left = (DISTILLED - ALONE) - bound * (TEACHER - ALONE)
        assert scipy_stats.ttest_1samp(left, 0).pvalue == pytest.approx(0.1, abs=1e-6)
    reach = scipy_stats.t.ppf(0.975, 4) * share.spread / 5**0.5
    assert np.ptp(share.theory) / 2 == pytest.approx(reach, rel=0.05), "the linear approximation, of a clear gap"
