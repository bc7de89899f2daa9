"""Route by confidence: the student answers where it is sure, the teacher where it is not. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kd.deploy.quality import LEVEL, Quality, compare, interval, wilson

STEPS = 20  # thresholds that are tried: at these quantiles of the student's confidence on validation


@dataclass(frozen=True)
class Point:
    """A threshold, the share of examples that go to the teacher, the accuracy of the cascade.

    The student answers where its confidence is ``threshold`` or more.
    """

    threshold: float
    to_teacher: float
    accuracy: float


@dataclass(frozen=True)
class Cascade:
    """A threshold that was chosen on ``fitted`` examples of validation, and what it gives on ``n`` of test.

    ``target``: the accuracy wanted, None: not inferior to the teacher by the margin. ``threshold``: None where none
    was shown to meet it; then ``chosen`` and ``quality`` (cascade against teacher, on test) are None as well.
    ``curve``: accuracy against the share that goes to the teacher, on test, from the student alone on. ``meets``:
    whether the target is met on test as well, at its one-sided limit of 95 %. ``student``, ``teacher``: accuracy of
    each alone on test.
    """

    fitted: int
    n: int
    target: float | None
    curve: list[Point]
    threshold: float | None
    chosen: Point | None
    quality: Quality | None
    meets: bool
    student: float
    teacher: float


@dataclass(frozen=True)
class Answers:
    """The student's confidence, 0 to 1, whether it is right and whether the teacher is, (examples,) each."""

    confidence: np.ndarray
    student: np.ndarray
    teacher: np.ndarray

    def part(self, rows: np.ndarray) -> Answers:
        """Return some of the examples."""
        return Answers(self.confidence[rows], self.student[rows], self.teacher[rows])

    def routed(self, threshold: float) -> np.ndarray:
        """Tell for each example whether the cascade is right."""
        return np.where(self.confidence >= threshold, self.student, self.teacher)

    def point(self, threshold: float) -> Point:
        """Measure the cascade at a threshold."""
        to_teacher = float((self.confidence < threshold).mean())
        return Point(float(threshold), to_teacher, float(self.routed(threshold).mean()))


def cascade(validation: Answers, test: Answers, margin: float, target: float | None = None, seed: int = 0) -> Cascade:
    """Choose the threshold on validation, and measure it on test, which chose nothing.

    ``target``: accuracy that the cascade shall reach, None: not inferior to the teacher by ``margin``.
    """
    tried = thresholds(validation.confidence)
    chosen = choose(validation, tried, margin, target)
    quality = None if chosen is None else compare(test.routed(chosen), test.teacher, margin, seed=seed)
    return Cascade(
        len(validation.student),
        len(test.student),
        target,
        [test.point(threshold) for threshold in tried],
        chosen,
        None if chosen is None else test.point(chosen),
        quality,
        chosen is not None and meets(test, chosen, margin, target),
        float(test.student.mean()),
        float(test.teacher.mean()),
    )


def thresholds(confidence: np.ndarray) -> list[float]:
    """Return thresholds, the lowest first, at which the student answers all, 95 %, 90 % … 5 % of the examples."""
    return np.unique(np.quantile(confidence, np.arange(STEPS) / STEPS, method="higher")).tolist()


def choose(validation: Answers, tried: list[float], margin: float, target: float | None = None) -> float | None:
    """Return the lowest threshold that validation shows to meet the target; None when it shows it of none.

    Thresholds are tested from the highest, which changes least, down to the first that fails. In that fixed order each
    may be tested at 5 %: the chance that any wrong one passes stays 5 % (Angelopoulos et al., Learn then Test, 2021,
    fixed sequence testing).
    """
    found = None
    for threshold in sorted(tried, reverse=True):
        if not meets(validation, threshold, margin, target):
            break
        found = threshold
    return found


def meets(answers: Answers, threshold: float, margin: float, target: float | None) -> bool:
    """Tell whether the cascade meets the target at its one-sided limit of 95 %: Tango's, of an accuracy Wilson's."""
    right, n = answers.routed(threshold), len(answers.student)
    if target is not None:
        return wilson(int(right.sum()), n, 2 * LEVEL - 1)[0] >= target
    gained, lost = int((right & ~answers.teacher).sum()), int((answers.teacher & ~right).sum())
    return interval(gained, lost, n, 2 * LEVEL - 1)[0] > -margin
