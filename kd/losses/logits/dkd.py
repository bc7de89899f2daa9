"""DKD: Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, arXiv 2203.08679."""

from __future__ import annotations

from torch import Tensor

from kd.losses.base import Batch, Output, Term, at_least_float32, check_same_shape, check_temperature
from kd.losses.logits._divergences import check_factor, kl
from kd.losses.logits._target import labels_of, mean_over_labelled, split_at

__all__ = ["decoupled_kl_divergence"]


def decoupled_kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Compute T² · mean over labelled rows of α KL(b_t ‖ b_s) + β KL(q_t ‖ q_s): target and non-target class KD, Eq. 7.

    b = (p_y, 1 − p_y) with p = softmax(z / T), and q is p over the classes other than the label y, summing to 1.
    α = 1 and β = 1 − p_t(y) row by row is :func:`~kd.losses.logits.kd.kl_divergence` (Eq. 5).

    Both logits (rows, classes), ``targets`` (rows,) int64, ``UNLABELLED`` where the label is withheld: such rows do not
    count. ``temperature`` > 0; ``alpha``, ``beta`` 0 or more. 0 for equal logits and without labelled rows.
    ``ValueError`` for targets that are shares of classes.

    The authors' code takes the label out with −1000 and the logarithm of a softmax, infinite in float32 for logits
    104 · T apart; here both are exact. MMRazor's shipped configuration is a sum over the rows.
    """
    check_same_shape("logits", student_logits, teacher_logits)
    temperature = check_temperature(temperature)
    labels, labelled = labels_of(targets)
    (b_s, q_s), (b_t, q_t) = (
        split_at(at_least_float32(z) / temperature, labels) for z in (student_logits, teacher_logits)
    )
    per_row = alpha * kl(b_t, b_s) + beta * kl(q_t, q_s)
    return temperature**2 * mean_over_labelled(per_row, labelled)


class DecoupledDistillation(Term):
    """:func:`decoupled_kl_divergence` with ``batch.targets``."""

    needs_labels = True
    over = "labelled"

    def __init__(self, temperature: float = 4.0, alpha: float = 1.0, beta: float = 8.0) -> None:
        super().__init__()
        self.temperature = self.reads_softmax_at = check_temperature(temperature)
        self.alpha, self.beta = check_factor("alpha", alpha), check_factor("beta", beta)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the labelled rows, times T²."""
        settings = self.temperature, self.alpha, self.beta
        return decoupled_kl_divergence(student.logits, teacher.logits, batch.targets, *settings)
