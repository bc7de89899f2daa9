"""What the divergences of two distributions share: log-probabilities of both sides, mixtures, the mean over rows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import at_least_float32, check_same_shape, check_temperature


def log_probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log softmax(z / T) of the student and of the teacher, in float32 or better.

    ``ValueError`` when the shapes differ, or ``temperature`` is not above 0.
    """
    check_same_shape("logits", student_logits, teacher_logits)
    temperature = check_temperature(temperature)
    student, teacher = (
        F.log_softmax(at_least_float32(z) / temperature, dim=-1) for z in (student_logits, teacher_logits)
    )
    return student, teacher


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute KL(p ‖ q) of each row: Σ_c p (log p − log q); the last dimension is summed over."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """Return log(share · p + (1 − share) · q), elementwise; ``share`` from 0 (q alone) to 1 (p alone)."""
    if share in (0, 1):
        return log_p if share == 1 else log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def js(log_p_student: Tensor, log_p_teacher: Tensor, beta: float) -> Tensor:
    """Compute β KL(p_t ‖ m) + (1 − β) KL(p_s ‖ m) of each row, m = β p_t + (1 − β) p_s.

    Forward KL at β = 0, reverse at 1.
    """
    if beta in (0, 1):
        return kl(log_p_student, log_p_teacher) if beta == 1 else kl(log_p_teacher, log_p_student)
    mixture = log_mixture(log_p_teacher, log_p_student, beta)
    return beta * kl(log_p_teacher, mixture) + (1 - beta) * kl(log_p_student, mixture)


def mean_over_rows(per_row: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute T² · mean over the rows; 0 without rows."""
    return temperature**2 * per_row.sum() / max(1, per_row.numel())


def check_share(name: str, value: float, *, one: bool = True) -> float:
    """Return the value. ``ValueError`` when it is not from 0 to 1 (``one``: whether 1 itself is allowed)."""
    if not (0 <= value < 1 or (one and value == 1)):
        raise ValueError(f"{name} = {value} is not allowed: it must be from 0 to {'1' if one else 'below 1'}")
    return float(value)


def check_factor(name: str, value: float) -> float:
    """Return the value. ``ValueError`` when it is not a finite number of 0 or more."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} = {value} is not allowed: it must be a finite number, 0 or more")
    return float(value)


def check_positive(name: str, value: float) -> float:
    """Return the value. ``ValueError`` when it is not a finite number above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} = {value} is not allowed: it must be a finite number above 0")
    return float(value)


def spread(logits: Tensor, flat: Tensor | float = 1.0) -> Tensor:
    """Compute the unbiased standard deviation of each row over its classes, (…, 1), with gradient.

    ``flat``: what stands, without gradient, for that of a row whose entries differ by rounding alone (a classifier that
    begins with zeros): to divide by what is left there would make gradients of 10⁷ out of noise.
    """
    norm = torch.linalg.vector_norm(logits - logits.mean(-1, keepdim=True), dim=-1, keepdim=True)
    found = norm / math.sqrt(max(1, logits.shape[-1] - 1))
    rounding = found.detach() <= 1e-6 * logits.detach().abs().amax(-1, keepdim=True)
    return torch.where(rounding, flat, found)
