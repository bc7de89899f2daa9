"""DTD: Wen, Lai and Qian, Preparing Lessons, arXiv 1911.07471; Yang et al., TextBrewer, ACL 2020, arXiv 2002.12620."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.losses.base import Batch, Output, Term, at_least_float32, check_choice, check_same_shape, check_temperature
from kd.losses.logits._divergences import check_factor, check_positive, kl, mean_over_rows
from kd.losses.logits._target import labels_of

__all__ = ["cwsm_temperatures", "flsw_temperatures", "probability_shift", "row_temperature_kl"]

WEIGHTS = ("flsw", "cwsm")


def flsw_temperatures(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    """Compute T_i = T + β (mean w − w_i) with w_i = (1 − cos(z_s, z_t))^γ: focal loss style sample weights.

    Both logits (…, classes) → (…), without gradient; ``temperature`` T > 0, ``beta`` 0 or more, ``gamma`` > 0. The mean
    is over all rows, T that of the T_i: lower where the student is far from the teacher. A large β makes them negative.

    TextBrewer's code adds 1e-4 to the norms, as here.
    """
    check_same_shape("logits", student_logits, teacher_logits)
    student, teacher = (at_least_float32(z.detach()) for z in (student_logits, teacher_logits))
    student, teacher = (z / (torch.linalg.vector_norm(z, dim=-1, keepdim=True) + 1e-4) for z in (student, teacher))
    # rounding may bring a cosine above 1, of which no power is a number
    return _around(temperature, beta, (1 - (student * teacher).sum(-1)).clamp(min=0) ** check_positive("gamma", gamma))


def cwsm_temperatures(student_logits: Tensor, temperature: float, beta: float = 1.0) -> Tensor:
    """Compute T_i = T + β (mean w − w_i) with w_i = 1 / max softmax(z_s): confidence weighted by student max.

    ``student_logits`` (…, classes) → (…), without gradient; ``temperature`` T > 0, ``beta`` 0 or more. The mean is over
    all rows, T that of the T_i: lower where the student is unsure. Of many classes w_i is large, and β must be small.

    TextBrewer's code adds 1e-3 to the maximum, as here.
    """
    confidence = at_least_float32(student_logits.detach()).softmax(-1).amax(-1)
    return _around(temperature, beta, 1 / (confidence + 1e-3))


def _around(temperature: float, beta: float, weights: Tensor) -> Tensor:
    """Compute T + β (mean w − w), elementwise."""
    mean = weights.sum() / max(1, weights.numel())
    return check_temperature(temperature) + check_factor("beta", beta) * (mean - weights)


def probability_shift(teacher_logits: Tensor, targets: Tensor) -> Tensor:
    """Exchange the teacher's largest logit and that of the label: knowledge adjustment, so that the label is largest.

    ``teacher_logits`` (rows, classes), ``targets`` (rows,) int64; a row with ``UNLABELLED``, and one whose label is
    the largest already, stays as it is. A new tensor (rows, classes). ``ValueError`` for targets that are shares of
    classes.
    """
    labels, labelled = labels_of(targets)
    largest = teacher_logits.argmax(-1)
    places = torch.stack([largest, torch.where(labelled, labels, largest)], -1)
    return teacher_logits.scatter(-1, places, teacher_logits.gather(-1, places.flip(-1)))


def row_temperature_kl(student_logits: Tensor, teacher_logits: Tensor, temperatures: Tensor) -> Tensor:
    """Compute the mean over rows of T_i² KL(softmax(z_t / T_i) ‖ softmax(z_s / T_i)), a temperature for each row.

    Both logits (…, classes), ``temperatures`` (…) above 0. 0 for equal logits and without rows.

    By T_i² the gradient of a row keeps its size, as in :func:`~kd.losses.logits.kd.kl_divergence`.

    TextBrewer's code takes the cross-entropy, larger by the teacher's entropy, and leaves out T².
    """
    check_same_shape("logits", student_logits, teacher_logits)
    log_p_student, log_p_teacher = (
        (at_least_float32(z) / temperatures.unsqueeze(-1)).log_softmax(-1) for z in (student_logits, teacher_logits)
    )
    return mean_over_rows(temperatures.square() * kl(log_p_teacher, log_p_student))


class DynamicTemperature(Term):
    """:func:`row_temperature_kl` of the logits, over all rows.

    ``weights``: :func:`flsw_temperatures` or :func:`cwsm_temperatures`, here never below a tenth of ``temperature``.
    ``shift``: the teacher's logits are those after :func:`probability_shift` with ``batch.targets``.
    """

    over = "batch"  # the weights have a mean over all rows

    def __init__(
        self,
        weights: str = "flsw",
        temperature: float = 4.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        shift: bool = False,
    ) -> None:
        super().__init__()
        self.weights = check_choice("weights", weights, WEIGHTS)
        self.temperature = check_temperature(temperature)
        self.beta, self.gamma = check_factor("beta", beta), check_positive("gamma", gamma)
        self.shift = self.needs_labels = shift
        self.every_class = weights == "flsw"  # the angle between all logits

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows."""
        of_teacher = probability_shift(teacher.logits, batch.targets) if self.shift else teacher.logits
        if self.weights == "flsw":
            found = flsw_temperatures(student.logits, of_teacher, self.temperature, self.beta, self.gamma)
        else:
            found = cwsm_temperatures(student.logits, self.temperature, self.beta)
        return row_temperature_kl(student.logits, of_teacher, found.clamp(min=self.temperature / 10))
