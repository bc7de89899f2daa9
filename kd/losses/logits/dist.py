"""DIST: Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, arXiv 2205.10536."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.losses.base import Batch, Output, Term, at_least_float32, check_choice, check_same_shape, check_temperature
from kd.losses.logits._divergences import check_factor

__all__ = ["correlation_loss"]

VARIANTS = ("code", "paper")
EPSILON = 1e-8  # added to the product of the norms, as in the authors' code


def correlation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    variant: str = "code",
) -> Tensor:
    """Compute T² (β (1 − mean_b ρ_b) + γ (1 − mean_c ρ_c)): relations of the predictions are matched, not values.

    ρ_b is Pearson's correlation of the student's and the teacher's softmax(z / T) in row b over the classes
    (inter-class), ρ_c that of class c over the rows (intra-class): how rows are batched matters.

    Both logits (rows, classes), any further leading dimensions count as rows; ``temperature`` > 0; ``beta``, ``gamma``
    0 or more. 0 for equal logits, but for 1e-8 that is added to the product of the norms; a row or a class without
    variance has no correlation: ρ = 0. 0 without rows.

    ``variant``: ``"code"`` as above; ``"paper"`` without T², as in the appendix of the paper.
    """
    check_choice("variant", variant, VARIANTS)
    check_same_shape("logits", student_logits, teacher_logits)
    temperature = check_temperature(temperature)
    student, teacher = (
        (at_least_float32(z) / temperature).softmax(-1).flatten(0, -2) for z in (student_logits, teacher_logits)
    )
    if not len(student):
        return student.sum()
    between, within = (1 - _correlation(student, teacher, dim) for dim in (1, 0))
    value = beta * between.mean() + gamma * within.mean()
    return value * temperature**2 if variant == "code" else value


def _correlation(one: Tensor, other: Tensor, dim: int) -> Tensor:
    """Compute Pearson's correlation along a dimension."""
    centred = [x - x.mean(dim, keepdim=True) for x in (one, other)]
    norms = []
    for x, c in zip((one, other), centred, strict=True):
        norm = torch.linalg.vector_norm(c, dim=dim)
        # what varies by rounding alone has no direction, and dividing by it makes gradients of 10⁸
        flat = norm.detach() <= 1e-6 * torch.linalg.vector_norm(x.detach(), dim=dim)
        norms.append(torch.where(flat, 1.0, norm))
    return (centred[0] * centred[1]).sum(dim) / (norms[0] * norms[1] + EPSILON)


class Correlation(Term):
    """:func:`correlation_loss` of the logits, over all rows of the batch."""

    over = "batch"  # the correlation of a class is over all rows

    def __init__(self, temperature: float = 4.0, beta: float = 1.0, gamma: float = 1.0, variant: str = "code") -> None:
        super().__init__()
        self.temperature, self.variant = check_temperature(temperature), check_choice("variant", variant, VARIANTS)
        self.beta, self.gamma = check_factor("beta", beta), check_factor("gamma", gamma)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the loss of the whole batch."""
        settings = self.temperature, self.beta, self.gamma, self.variant
        return correlation_loss(student.logits, teacher.logits, *settings)
