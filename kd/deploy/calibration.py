"""Measure calibration before and after temperature scaling. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 15  # as in the metrics of a run (Guo 2017)
LIMITS = (0.05, 20.0)  # of the temperature
LEAST = 1e-12  # probability that a logarithm is taken of


@dataclass(frozen=True)
class Scores:
    """Probabilities (examples × classes), the class answered and the class that is right, (examples,) each.

    With the confidence of an answer alone the classes are "the answer" and "another one".
    """

    probabilities: np.ndarray
    answer: np.ndarray
    target: np.ndarray

    def part(self, rows: np.ndarray) -> Scores:
        """Return some of the examples."""
        return Scores(self.probabilities[rows], self.answer[rows], self.target[rows])


@dataclass(frozen=True)
class Errors:
    """Expected calibration error of the answers, 0 to 1, and negative log-likelihood of what is right, in nats."""

    ece: float
    nll: float


@dataclass(frozen=True)
class Calibration:
    """Errors before and after the probabilities are scaled by ``temperature``, on ``n`` examples.

    The temperature was fitted on ``fitted`` other examples.
    """

    temperature: float
    before: Errors
    after: Errors
    fitted: int
    n: int


def of_confidence(confidence: np.ndarray, right: np.ndarray) -> Scores:
    """Make scores of how sure an answer is, 0 to 1, and whether it is right."""
    answer = np.zeros(len(confidence), dtype=int)
    return Scores(np.stack([confidence, 1 - confidence], axis=1), answer, (~right).astype(int))


def calibrate(validation: Scores, test: Scores) -> Calibration:
    """Fit the temperature on validation, and measure on test (Guo et al., On Calibration, ICML 2017, eq. 9)."""
    temperature = fit_temperature(validation)
    after = Scores(scaled(test.probabilities, temperature), test.answer, test.target)
    return Calibration(temperature, errors(test), errors(after), len(validation.target), len(test.target))


def fit_temperature(scores: Scores) -> float:
    """Return the temperature, 0.05 to 20, of the smallest negative log-likelihood."""
    from scipy import optimize

    def nll(log_temperature: float) -> float:
        return _nll(scaled(scores.probabilities, float(np.exp(log_temperature))), scores.target)

    found = optimize.minimize_scalar(nll, bounds=tuple(np.log(LIMITS)), method="bounded")
    return float(np.exp(found.x))


def scaled(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(log p ÷ T): the logits are the logarithms but for a constant a row, which changes nothing."""
    from scipy.special import softmax

    return softmax(np.log(np.maximum(probabilities, LEAST)) / temperature, axis=1)


def errors(scores: Scores) -> Errors:
    """Measure expected calibration error, in 15 bins of equal width, and negative log-likelihood."""
    confidence = scores.probabilities[np.arange(len(scores.answer)), scores.answer]
    return Errors(ece(confidence, scores.answer == scores.target), _nll(scores.probabilities, scores.target))


def ece(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the mean over examples of |accuracy − mean confidence| of the bin that each is in (Naeini 2015)."""
    where = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(where, right - confidence, BINS)).sum() / len(right))


def _nll(probabilities: np.ndarray, target: np.ndarray) -> float:
    return float(-np.log(np.maximum(probabilities[np.arange(len(target)), target], LEAST)).mean())
