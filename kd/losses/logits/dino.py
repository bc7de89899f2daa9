"""DINO: Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021, arXiv 2104.14294."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd.losses.base import Batch, Output, Setup, Term, at_least_float32, check_same_shape, check_temperature

__all__ = ["prototype_cross_entropy"]


def prototype_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    temperature_student: float = 0.1,
    temperature_teacher: float = 0.04,
) -> Tensor:
    """Compute the cross-entropy of the centred and sharpened teacher, mean over pairs of views and samples (Eq. 1).

    ``student_logits`` (S, B, prototypes) and ``teacher_logits`` (T, B, prototypes): of S and T views of one batch;
    ``center`` (1, prototypes). Every view of the student is compared with every one of the teacher. Without T². The
    code of DINOv2 adds up the pairs, and its trainer divides by their number.
    """
    check_same_shape("logits of a view", student_logits[0], teacher_logits[0])
    log_s = (at_least_float32(student_logits) / temperature_student).log_softmax(-1)
    p_t = ((at_least_float32(teacher_logits) - center) / temperature_teacher).softmax(-1)
    return -(p_t.mean(0) * log_s.mean(0)).sum(-1).mean()


class PrototypeCrossEntropy(Term):
    """:func:`prototype_cross_entropy` of logits over prototypes, with a frozen teacher, as DINOv2 distils a larger one.

    The networks are run on the batch and on ``views`` of it; the student's last layer has as many prototypes as the
    teacher's head. ``center_momentum``: of the running mean of the teacher's logits that is taken off.
    """

    over = "batch"
    center: Tensor

    def __init__(
        self,
        views: Sequence[str] = (),
        temperature_student: float = 0.1,
        temperature_teacher: float = 0.04,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if not 0 <= center_momentum <= 1:
            raise ValueError(f"center_momentum = {center_momentum} is not allowed: it must be from 0 to 1")
        self.needs_views = tuple(views)
        self.temperature_student = check_temperature(temperature_student)
        self.temperature_teacher = check_temperature(temperature_teacher)
        self.center_momentum = center_momentum

    def prepare(self, setup: Setup) -> None:
        """Make the centre, zero at first. ``ValueError`` where the prototypes are not equally many."""
        student, teacher = setup.student.logits, setup.teacher.logits
        check_same_shape("prototypes", student, teacher)
        self.register_buffer("center", at_least_float32(teacher).new_zeros(1, teacher.shape[-1]))

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the pairs of views; the centre moves in training."""
        own, other = (
            torch.stack([o.logits, *(o.views[v].logits for v in self.needs_views)]) for o in (student, teacher)
        )
        settings = self.temperature_student, self.temperature_teacher
        loss = prototype_cross_entropy(own, other, self.center, *settings)
        if self.training:
            mean = at_least_float32(other).detach().flatten(0, -2).mean(0, keepdim=True).to(self.center)
            self.center = self.center_momentum * self.center + (1 - self.center_momentum) * mean
        return loss
