"""Compute means, paired differences and shares of a gap with intervals; power; tests over images; ranks. No torch.

Intervals are of 95 % where nothing else is said. The one that counts is Student's t (for a ratio: Fieller's interval,
which is built on it).
The bootstrap over seeds stands beside it and is too narrow for so few, also for ten.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Numbers = Sequence[float] | np.ndarray

LEVEL = 0.95
EQUIVALENCE_LEVEL = 0.9  # two one-sided tests at 5 % hold where the interval of 90 % lies inside the margin
POWER = 0.8
RESAMPLES = 9999
SEED = 0  # of the bootstrap: the same runs give the same page


@dataclass(frozen=True)
class Interval:
    """An estimate from ``n`` seeds; its intervals by theory and by bootstrap (None: cannot be had, ``note`` says why).

    ``p``: two-sided, of the hypothesis that there is no difference; ``narrow``: the interval of 90 % by theory;
    ``spread``: the standard deviation of the paired differences (of a share: of its linear approximation).
    """

    estimate: float
    n: int
    theory: tuple[float, float] | None = None
    bootstrap: tuple[float, float] | None = None
    name: str = "Student's t"
    p: float | None = None
    note: str = ""
    narrow: tuple[float, float] | None = None
    spread: float | None = None

    @property
    def headline(self) -> tuple[float, float] | None:
        """Return the interval that counts: a verdict never disagrees with the p beside it."""
        return self.theory

    @property
    def method(self) -> str:
        """Say what the headline was made by."""
        return "" if self.headline is None else f"{self.name}, {self.n} seeds"


def paired_interval(a: np.ndarray, b: np.ndarray, level: float = LEVEL) -> tuple[float, float, float]:
    """Return the mean of ``a − b`` over pairs and its interval by Student's t. Needs two pairs or more."""
    from scipy import stats

    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if len(differences) < 2:
        raise ValueError("an interval needs two pairs or more")
    mean = float(differences.mean())
    half = float(stats.t.ppf(0.5 + level / 2, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5)
    return mean, mean - half, mean + half


def half_width(n: int) -> float:
    """Return how many standard deviations the 95 % interval of a mean over ``n`` seeds reaches to either side."""
    from scipy import stats

    return float(stats.t.ppf(0.5 + LEVEL / 2, n - 1) / n**0.5)


def detectable(n: int) -> float:
    """Return the smallest effect that ``n`` pairs show, in standard deviations of the paired difference.

    That is the effect for which the two-sided paired t-test at 5 % has a power of 80 %, by the noncentral t
    distribution; infinity for fewer than two pairs.
    """
    from scipy import optimize, stats

    if n < 2:
        return np.inf
    critical = stats.t.ppf(0.5 + LEVEL / 2, n - 1)

    def lacking(effect: float) -> float:
        shift = effect * n**0.5
        wrong_side = np.nan_to_num(stats.nct.cdf(-critical, n - 1, shift))  # of a large shift scipy gives NaN for 0
        return float(stats.nct.sf(critical, n - 1, shift) + wrong_side - POWER)

    high = (stats.norm.ppf(0.5 + LEVEL / 2) + stats.norm.ppf(POWER)) / n**0.5  # as if the spread were known
    while lacking(high) < 0:
        high *= 1.2
    return float(optimize.brentq(lacking, high / 2, high))


def mean(values: Numbers) -> Interval:
    """Return the mean over seeds, with its interval from two seeds on that differ."""
    return difference(values, np.zeros(len(values)))


def one_more(values: Numbers) -> tuple[float, float] | None:
    """Return the 95 % prediction interval of one further run: mean ± t · std · √(1 + 1/n).

    None for fewer than two runs, and where all of them gave the same.
    """
    found = np.asarray(values, dtype=float)
    if len(found) < 2 or _alike(found, np.zeros(len(found))):
        return None
    reach = half_width(len(found)) * (len(found) + 1) ** 0.5 * found.std(ddof=1)
    return float(found.mean() - reach), float(found.mean() + reach)


def difference(a: Numbers, b: Numbers) -> Interval:
    """Return the mean of ``a − b`` over paired seeds. No interval and no p where all seeds gave the same difference."""
    from scipy import stats

    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if len(x) < 2:
        return Interval(float((x - y).mean()) if len(x) else np.nan, len(x), note=_too_few(len(x)))
    estimate, low, high = paired_interval(x, y)
    if _alike(x, y):  # the t statistic is 0/0 or ∞: two seeds that agree by chance would prove anything
        return Interval(estimate, len(x), note="all seeds gave the same difference: no spread to judge by")
    p = float(stats.ttest_rel(x, y).pvalue)
    bootstrap = _bootstrap((x, y), lambda u, v: (u - v).mean(-1))
    narrow = paired_interval(x, y, EQUIVALENCE_LEVEL)[1:]
    return Interval(estimate, len(x), (low, high), bootstrap, p=p, narrow=narrow, spread=float((x - y).std(ddof=1)))


def _alike(x: np.ndarray, y: np.ndarray) -> bool:
    """Tell whether ``x − y`` is the same for all seeds but for rounding (metrics are computed in single precision)."""
    rounding = 4 * np.finfo(np.float32).eps * max(np.abs(x).max(), np.abs(y).max())
    return bool(np.ptp(x - y) <= rounding)


def share(row: Numbers, than: Numbers, top: Numbers) -> Interval:
    """Return (row − than) ÷ (top − than), means over paired seeds, the share of a gap closed; by Fieller (1954).

    ``p`` is that of row − than. There is no interval where the gap itself is not clear of 0
    or all seeds agree.
    """
    bottom = np.asarray(than, dtype=float)
    x, y = np.asarray(row, dtype=float) - bottom, np.asarray(top, dtype=float) - bottom
    n = len(x)
    if n == 0 or y.mean() == 0:
        return Interval(np.nan, n, note="there is no gap" if n else _too_few(0))
    estimate = float(x.mean() / y.mean())
    if n < 2:
        return Interval(estimate, n, note=_too_few(n))
    if _alike(x + bottom, bottom + estimate * y):
        return Interval(estimate, n, note="all seeds gave the same share: no spread to judge by")
    p = difference(row, than).p
    wide, narrow = (_fieller(x, y, level) for level in (LEVEL, EQUIVALENCE_LEVEL))
    if wide is None:
        return Interval(estimate, n, p=p, note="the gap is not clear of 0, so a share of it has no interval")
    bootstrap = _bootstrap((x, y), lambda u, v: u.mean(-1) / v.mean(-1))
    spread = float((x - estimate * y).std(ddof=1) / abs(y.mean()))
    return Interval(estimate, n, wide, bootstrap, "Fieller's interval", p, narrow=narrow, spread=spread)


def _fieller(x: np.ndarray, y: np.ndarray, level: float) -> tuple[float, float] | None:
    """Return the ratios r for which the mean of x − r·y is not clear of 0: a·r² − 2·b·r + c ≤ 0."""
    from scipy import stats

    (xx, xy), (_, yy) = stats.t.ppf(0.5 + level / 2, len(x) - 1) ** 2 * np.cov(x, y) / len(x)
    a, b, c = y.mean() ** 2 - yy, x.mean() * y.mean() - xy, x.mean() ** 2 - xx
    if a <= 0:
        return None
    root = np.sqrt(max(b * b - a * c, 0.0))
    return float((b - root) / a), float((b + root) / a)


def _too_few(n: int) -> str:
    return "one seed: no interval" if n == 1 else "no finished seed that the rows share"


def _bootstrap(data: tuple[np.ndarray, np.ndarray], statistic: Callable[..., np.ndarray]) -> tuple[float, float] | None:
    from scipy import stats

    def vectorised(u: np.ndarray, v: np.ndarray, axis: int) -> np.ndarray:
        return statistic(u, v)

    rng = np.random.default_rng(SEED)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            data, vectorised, paired=True, vectorized=True, n_resamples=RESAMPLES, method="BCa", rng=rng
        ).confidence_interval
    return (float(found.low), float(found.high)) if np.isfinite([found.low, found.high]).all() else None


def holm(ps: Sequence[float]) -> list[float]:
    """Correct p values for their number by Holm (1979)."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(ps, method="holm")[1]] if len(ps) else []


def ranks(matrix: np.ndarray, lower_is_better: bool) -> tuple[np.ndarray, float | None]:
    """Return the mean rank of each row of (rows, seeds), 1 is best, ties shared, and Friedman's p.

    None for fewer than three rows or two seeds.
    """
    from scipy import stats

    signed = matrix if lower_is_better else -matrix
    found = stats.rankdata(signed, axis=0).mean(1)
    if len(matrix) < 3 or matrix.shape[1] < 2 or np.ptp(matrix, axis=0).max() == 0:
        return found, None
    return found, float(stats.friedmanchisquare(*signed).pvalue)


# ---------------------------------------------------------------------- over test images


@dataclass(frozen=True)
class OverImages:
    """Two rows on the same test images: difference of accuracy with the bootstrap interval over images, and McNemar.

    ``only_row``, ``only_than``: images that only one of the two gets right, summed over seeds.
    ``p``: twice the median of the seeds' McNemar p values, which holds however much the seeds depend on one another
    (Meinshausen, Meier and Bühlmann 2009); with one seed its own p.
    """

    estimate: float
    low: float
    high: float
    images: int
    seeds: int
    only_row: int
    only_than: int
    p: float


def over_images(pairs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> OverImages:
    """Compare two rows on test images: ``(index, row is right, than is right)`` for each seed.

    The same image has the same index in every seed. Images are resampled with all their seeds, so that one image seen
    by five seeds does not count as five.
    """
    from scipy import stats

    index = np.concatenate([i for i, _, _ in pairs])
    gain = np.concatenate([row.astype(float) - than.astype(float) for _, row, than in pairs])
    images, where = np.unique(index, return_inverse=True)
    total, seen = np.bincount(where, gain), np.bincount(where).astype(float)

    def ratio(t: np.ndarray, s: np.ndarray, axis: int) -> np.ndarray:
        return t.mean(axis) / s.mean(axis)

    estimate = float(total.sum() / seen.sum())
    low = high = estimate
    if np.ptp(gain) > 0:
        rng = np.random.default_rng(SEED)
        found = stats.bootstrap(
            (total, seen), ratio, paired=True, n_resamples=1999, batch=50, method="percentile", rng=rng
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    ps = [mcnemar(row, than) for _, row, than in pairs]
    p = ps[0] if len(ps) == 1 else min(1.0, 2 * float(np.median(ps)))
    better, worse = int((gain > 0).sum()), int((gain < 0).sum())
    return OverImages(estimate, low, high, len(images), len(pairs), better, worse, p)


def mcnemar(row: np.ndarray, than: np.ndarray) -> float:
    """Return McNemar's p for two vectors of right and wrong on the same images; exact below 25 that they differ in."""
    from statsmodels.stats import contingency_tables

    only_row, only_than = int((row & ~than).sum()), int((than & ~row).sum())
    if only_row + only_than == 0:
        return 1.0
    cells = [[int((row & than).sum()), only_row], [only_than, int((~row & ~than).sum())]]
    return float(contingency_tables.mcnemar(cells, exact=only_row + only_than < 25).pvalue)
