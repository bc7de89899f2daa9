"""Compare the answers of student and teacher on the same examples: interval, tests, examples needed. No torch.

Differences are student − teacher, shares in −1 to 1. Everything about accuracy follows from the examples that only one
of the two gets right, ``gained`` (the student alone) and ``lost`` (the teacher alone), of ``n``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95  # of two-sided intervals, and of one-sided limits
POWER = 0.8
RESAMPLES = 2000
MOST = 4_000_000  # weights of the bootstrap in memory at once


@dataclass(frozen=True)
class Quality:
    """Accuracy of student and teacher on the same ``n`` examples, and what they show.

    ``student``, ``teacher``: shares right, None where only the examples that they disagree on have labels.
    ``retention``: student ÷ teacher, with its interval by the paired bootstrap; None where a share is not known, or 0.
    ``interval``: of the difference, 95 %, two-sided; ``lower``, ``upper``: one-sided limits of 95 %, all by Tango's
    score. ``bootstrap``: the paired bootstrap's interval, percentiles. ``mcnemar``: exact p that there is no
    difference. ``non_inferior``: p that the student is worse by ``margin`` or more, of the score test, so that it is
    below 5 % where ``lower`` is above −margin. ``discordant``: share of examples that one of the two alone gets right.
    ``shown_margin``: the smallest margin for which ``n`` examples have a power of 80 % when there is no difference.
    ``needed``: examples for that power at ``margin``, if there is no difference; ``needed_as_measured``: if the
    difference is as measured, None where it is the margin itself: then no number of examples settles it.
    """

    n: int
    student: float | None
    teacher: float | None
    gained: int
    lost: int
    difference: float
    interval: tuple[float, float]
    lower: float
    upper: float
    bootstrap: tuple[float, float]
    mcnemar: float
    margin: float
    non_inferior: float
    discordant: float
    shown_margin: float
    needed: int
    needed_as_measured: int | None
    retention: float | None = None
    retention_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class F1:
    """Macro-F1 of student and teacher, the difference and its 95 % interval by the paired bootstrap."""

    student: float
    teacher: float
    difference: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Agreement:
    """How many of ``n`` answers differ; ``limit``: upper limit of their share, one-sided 95 % (Clopper and Pearson).

    Accuracy cannot differ by more than the answers do, whatever the labels are.
    """

    n: int
    differ: int
    share: float
    limit: float


def compare(student: np.ndarray, teacher: np.ndarray, margin: float, labelled: bool = True, seed: int = 0) -> Quality:
    """Compare two vectors of right and wrong, bool, on the same examples.

    ``margin``: loss of accuracy that is accepted, a share; ``labelled``: whether all examples have labels, so that
    both accuracies are known and not their difference alone; ``seed``: of the bootstrap.
    """
    from scipy import stats
    from statsmodels.stats.contingency_tables import mcnemar

    n, gained, lost = len(student), int((student & ~teacher).sum()), int((teacher & ~student).sum())
    both, neither = int((student & teacher).sum()), int((~student & ~teacher).sum())
    difference, discordant = (gained - lost) / n, (gained + lost) / n
    gain = student.astype(float) - teacher.astype(float)
    # without any example that differs, 1 more could: the share that the interval of none in n reaches
    expected = discordant or stats.beta.ppf(LEVEL, 1, n)
    lower, upper = interval(gained, lost, n, 2 * LEVEL - 1)
    needed = examples_needed(expected, margin)
    assert needed is not None  # for a margin above 0
    kept = _retention(student, teacher, seed) if labelled and teacher.any() else (None, None)
    return Quality(
        n,
        float(student.mean()) if labelled else None,
        float(teacher.mean()) if labelled else None,
        gained,
        lost,
        difference,
        interval(gained, lost, n),
        lower,
        upper,
        bootstrap(gain, seed),
        float(mcnemar([[both, gained], [lost, neither]], exact=True).pvalue),
        margin,
        float(stats.norm.sf(score(gained, lost, n, -margin))),
        discordant,
        shown_margin(n, expected),
        needed,
        examples_needed(expected, margin, difference),
        *kept,
    )


def wilson(right: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's interval of a share, ``right`` of ``n``; its lower end alone is a limit of (1 + level) ÷ 2."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(right, n, alpha=1 - level, method="wilson")
    return float(low), float(high)


def _retention(student: np.ndarray, teacher: np.ndarray, seed: int) -> tuple[float, tuple[float, float]]:
    """Return the student's accuracy ÷ the teacher's, and its 95 % interval over resampled examples; percentiles."""
    found = [
        (w @ student.astype(float)) / np.maximum(w @ teacher.astype(float), 1)
        for w in _weights(len(student), seed, RESAMPLES)
    ]
    return float(student.mean() / teacher.mean()), _percentiles(np.concatenate(found))


def score(gained: int, lost: int, n: int, difference: float) -> float:
    """Return Tango's score statistic of the hypothesis that the shares differ by ``difference``.

    Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample design,
    Statistics in Medicine 1998: standard normal under the hypothesis, positive where the examples speak for a larger
    difference. The share of ``lost`` in its variance is the maximum-likelihood estimate under the hypothesis.
    """
    share = _constrained(gained / n, lost / n, difference)
    variance = max(n * (2 * share + difference * (1 - difference)), 0.0)
    shift = gained - lost - n * difference
    if variance < 1e-12 * n:
        return math.copysign(math.inf, shift) if abs(shift) > 1e-9 * n else 0.0
    return shift / math.sqrt(variance)


def _constrained(gained: float, lost: float, difference: float) -> float:
    """Return the likeliest share of ``lost`` if the shares differ by ``difference``; all are shares of the examples."""
    b = -gained - lost + (2 - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    return (math.sqrt(max(b * b - 8 * c, 0.0)) - b) / 4


def interval(gained: int, lost: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Tango's interval of the difference of two paired shares: those that the score test does not refuse."""
    from scipy import optimize, stats

    critical, estimate = float(stats.norm.ppf(0.5 + level / 2)), (gained - lost) / n

    def beyond(difference: float, sign: int) -> float:
        return max(min(sign * score(gained, lost, n, difference), 1e9), -1e9) - critical

    low = -1.0 if estimate <= -1 else optimize.brentq(beyond, -1, estimate, args=(1,))
    high = 1.0 if estimate >= 1 else optimize.brentq(beyond, estimate, 1, args=(-1,))
    return float(low), float(high)


def examples_needed(discordant: float, margin: float, difference: float = 0.0, power: float = POWER) -> int | None:
    """Return how many examples the score test at 5 %, one-sided, needs to settle which side of −margin it is on.

    Nam, Establishing equivalence of two treatments and sample size requirements in matched-pairs design, Biometrics
    1997: ((z₀.₉₅ σ₀ + z_power σ₁) ÷ (difference + margin))², σ₀ with the shares that are likeliest at −margin, σ₁ with
    the true ones. A ``difference`` above −margin: to show that the student is not inferior; below: that it is. None
    where they are equal.
    """
    from scipy import stats

    if math.isclose(difference, -margin, abs_tol=1e-12):
        return None
    discordant = max(discordant, abs(difference))
    share = _constrained((discordant + difference) / 2, (discordant - difference) / 2, -margin)
    under = math.sqrt(max(2 * share - margin * (1 + margin), 0.0))
    true = math.sqrt(max(discordant - difference**2, 0.0))
    z, z_power = float(stats.norm.ppf(LEVEL)), float(stats.norm.ppf(power))
    return math.ceil(((z * under + z_power * true) / (difference + margin)) ** 2)


def first_estimate(discordant: float, margin: float, power: float = POWER) -> float:
    """Return (z₀.₉₅ + z_power)² · discordant ÷ margin², the textbook's estimate of :func:`examples_needed`.

    It takes the same variance under both hypotheses; the score test needs more where few answers differ.
    """
    from scipy import stats

    return float((stats.norm.ppf(LEVEL) + stats.norm.ppf(power)) ** 2 * discordant / margin**2)


def shown_margin(n: int, discordant: float, power: float = POWER) -> float:
    """Return the smallest margin that ``n`` examples settle with that power if there is no difference, at most 1."""
    from scipy import optimize

    def too_many(margin: float) -> float:
        return math.log((examples_needed(discordant, margin, power=power) or math.inf) / n)

    if too_many(1.0) > 0:
        return 1.0
    return float(optimize.brentq(too_many, 1e-6, 1.0, xtol=1e-5))


def bootstrap(gain: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the 95 % interval of the mean of ``gain``, (examples,), over resampled examples; percentiles."""
    return _percentiles(np.concatenate([w @ gain / len(gain) for w in _weights(len(gain), seed, resamples)]))


def macro_f1(label: np.ndarray, student: np.ndarray, teacher: np.ndarray, seed: int = 0) -> F1:
    """Compute the mean over the classes of ``label`` of F1 = 2 · hits ÷ (answers + labels), and its difference.

    Examples are resampled with all three values, in 95 % percentiles.
    """
    classes = np.unique(label)
    is_label = label[:, None] == classes
    ones = np.ones((1, len(label)))

    def f1(weights: np.ndarray, answers: np.ndarray) -> np.ndarray:
        is_answer = answers[:, None] == classes
        hits = weights @ (is_answer & is_label).astype(float)
        total = weights @ (is_answer.astype(float) + is_label)
        return (2 * hits / np.maximum(total, 1)).mean(1)

    found = [f1(w, student) - f1(w, teacher) for w in _weights(len(label), seed, RESAMPLES)]
    one, other = float(f1(ones, student)[0]), float(f1(ones, teacher)[0])
    return F1(one, other, one - other, _percentiles(np.concatenate(found)))


def _weights(n: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Yield how often each example is drawn, (some resamples, n) at a time."""
    rng = np.random.default_rng(seed)
    at_once = max(1, MOST // n)
    for start in range(0, resamples, at_once):
        draws = rng.integers(n, size=(min(at_once, resamples - start), n))
        offset = np.arange(len(draws))[:, None] * n
        yield np.bincount((draws + offset).ravel(), minlength=draws.size).reshape(draws.shape).astype(float)


def _percentiles(found: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(found, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)


def agreement(student: np.ndarray, teacher: np.ndarray) -> Agreement:
    """Count the answers that differ."""
    from scipy import stats

    n, differ = len(student), int((student != teacher).sum())
    limit = stats.binomtest(differ, n).proportion_ci(2 * LEVEL - 1, method="exact").high
    return Agreement(n, differ, differ / n, float(limit))
