"""CTKD: Li et al., Curriculum Temperature for Knowledge Distillation, AAAI 2023, arXiv 2211.16231."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.base import Batch, Output, Setup, Term, at_least_float32, check_same_shape
from kd.losses.logits._divergences import check_factor, check_positive, kl

__all__ = ["adversarial_temperature_kl"]


def adversarial_temperature_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature_param: Tensor,
    t_start: float = 1.0,
    t_end: float = 20.0,
    grl_lambda: float = -1.0,
) -> Tensor:
    """Compute T² · mean over rows of KL(p_t ‖ p_s), p = softmax(z / T), at a learned T = t_start + t_end · sigmoid(θ).

    The gradient for θ = ``temperature_param`` (1,) is multiplied by λ = ``grl_lambda``: below 0 the temperature is
    trained against the student, towards what it finds hard; that for the student is as ever.

    Both logits (rows, classes), any further leading dimensions count as rows; ``t_start`` and ``t_end`` > 0; λ from −1
    to 0. 0 for equal logits and without rows.

    The paper reverses the gradient with a λ of 0 to 1; the authors' code multiplies by one of 0 to −1, as here.
    """
    check_same_shape("logits", student_logits, teacher_logits)
    theta = temperature_param.detach() + grl_lambda * (temperature_param - temperature_param.detach())
    temperature = t_start + t_end * torch.sigmoid(at_least_float32(theta))
    log_p_student, log_p_teacher = (
        F.log_softmax(at_least_float32(z) / temperature, dim=-1) for z in (student_logits, teacher_logits)
    )
    per_row = kl(log_p_teacher, log_p_student)
    return temperature.squeeze(0).square() * per_row.sum() / max(1, per_row.numel())


class CurriculumTemperature(Term):
    """:func:`adversarial_temperature_kl` of the logits, over all rows; θ begins at 1 and is trained with the student.

    λ goes from 0 to −1 along half a cosine over the first ``epochs``, then stays: first an easy temperature, then an
    adversary. ``epochs = None``, or a run of which the length in epochs is not known: over the whole run.
    """

    def __init__(self, t_start: float = 1.0, t_end: float = 20.0, epochs: float | None = 10.0) -> None:
        super().__init__()
        self.t_start, self.t_end = check_positive("t_start", t_start), check_factor("t_end", t_end)
        self.epochs = None if epochs is None else check_positive("epochs", epochs)
        self.rise = 1.0  # share of the run
        self.temperature_param = nn.Parameter(torch.ones(1))

    def prepare(self, setup: Setup) -> None:
        """Note which share of the run the curriculum is."""
        if self.epochs is not None and setup.epochs is not None:
            self.rise = min(1.0, self.epochs / setup.epochs)

    @property
    def grl_lambda(self) -> float:
        """λ at this point of the run, 0 to −1."""
        return -(1 - math.cos(math.pi * min(1.0, self.progress / self.rise))) / 2

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows, times T²."""
        settings = self.temperature_param, self.t_start, self.t_end, self.grl_lambda
        return adversarial_temperature_kl(student.logits, teacher.logits, *settings)
