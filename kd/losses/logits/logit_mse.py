"""Logit regression: Ba and Caruana, Do Deep Nets Really Need to be Deep?, NIPS 2014, arXiv 1312.6184."""

from __future__ import annotations

from torch import Tensor

from kd.losses.base import Batch, Output, Term, at_least_float32, check_same_shape

__all__ = ["mean_squared_logits"]


def mean_squared_logits(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean over rows and classes of (z_s − z_t)²: Eq. 1 without its ½.

    Both logits (rows, classes), any further leading dimensions count as rows. 0 for equal logits and without rows.
    """
    check_same_shape("logits", student_logits, teacher_logits)
    squares = (at_least_float32(student_logits) - at_least_float32(teacher_logits)).square()
    return squares.sum() / max(1, squares.numel())


class LogitRegression(Term):
    """:func:`mean_squared_logits`, over all rows."""

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """The mean over the rows."""
        return mean_squared_logits(student.logits, teacher.logits)
