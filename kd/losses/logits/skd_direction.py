"""SKD's direction: SKDDirectionLoss of torchdistill, CVPR 2026, no arXiv id known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd.losses.base import Batch, Output, Term, at_least_float32, check_same_shape
from kd.losses.feature_term import full_precision
from kd.losses.logits._divergences import check_positive

__all__ = ["gram_direction"]


def gram_direction(student_logits: Tensor, teacher_logits: Tensor, tikhonov: float = 0.1) -> Tensor:
    """Compute Mahalanobis norms √(D_i (cov D + λ I)⁻¹ D_iᵀ), mean over rows, of D = G_s − G_t, G = Z Zᵀ, |z_i| = 1.

    How the rows of a batch lie to one another, whatever the size of their logits. cov D is the unbiased covariance of
    the columns of D; λ = ``tikhonov`` > 0. The gradient goes through it.

    Both logits (rows, classes), the classes may differ. 0 for equal logits, without a gradient there, and for one row.
    """
    check_positive("tikhonov", tikhonov)
    if len(student_logits) != len(teacher_logits):
        check_same_shape("rows", student_logits[:, 0], teacher_logits[:, 0])
    units = [_unit(at_least_float32(z)) for z in (student_logits, teacher_logits)]
    if len(student_logits) < 2:
        return 0 * units[0].sum()
    with full_precision(units[0]):
        difference = units[0] @ units[0].T - units[1] @ units[1].T
        covariance = torch.cov(difference)  # D is symmetric: rows are columns
        regular = covariance + tikhonov * torch.eye(len(difference), dtype=difference.dtype, device=difference.device)
        squares = (difference * torch.linalg.solve(regular, difference)).sum(0)
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt().mean()


def _unit(logits: Tensor) -> Tensor:
    """Bring rows to length 1; a row of zeros stays so, without a gradient that grows beyond all bounds."""
    norms = torch.linalg.vector_norm(logits, dim=-1, keepdim=True)
    return logits / norms.masked_fill(norms == 0, math.inf)


class GramDirection(Term):
    """:func:`gram_direction` of the logits, over all rows of the batch."""

    over = "batch"
    every_class = True  # the length of a row

    def __init__(self, tikhonov: float = 0.1) -> None:
        super().__init__()
        self.tikhonov = check_positive("tikhonov", tikhonov)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the loss of the whole batch."""
        return gram_direction(student.logits, teacher.logits, self.tikhonov)
