"""NKD: Yang et al., From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023, arXiv 2303.13005."""

from __future__ import annotations

from torch import Tensor

from kd.losses.base import Batch, Output, Term, at_least_float32, check_same_shape, check_temperature
from kd.losses.logits._divergences import check_factor
from kd.losses.logits._target import labels_of, mean_over_labelled, split_at

__all__ = ["normalised_cross_entropy"]


def normalised_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float = 1.0, gamma: float = 1.5
) -> Tensor:
    """Compute the mean over labelled rows of −p_t(y) log p_s(y) − γ T² Σ_c≠y q_t log q_s: normalised KD.

    p = softmax(z), at T = 1; q is softmax(z / T) over the classes other than the label y, summing to 1, so that the
    student can reach the teacher's whatever p(y) is.

    Both logits (rows, classes), ``targets`` (rows,) int64, ``UNLABELLED`` where the label is withheld: such rows do not
    count. ``temperature`` > 0; ``gamma`` 0 or more. A cross-entropy: not 0 for equal logits. 0 without labelled rows.
    ``ValueError`` for targets that are shares of classes.

    The copy of NKD in the code of SDD leaves the label among the other classes: another loss under this name.
    """
    check_same_shape("logits", student_logits, teacher_logits)
    temperature = check_temperature(temperature)
    labels, labelled = labels_of(targets)
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits)
    of_label = [split_at(z, labels)[0][..., 0] for z in (student, teacher)]
    q_s, q_t = (split_at(z / temperature, labels)[1] for z in (student, teacher))
    per_row = -of_label[1].exp() * of_label[0] - gamma * temperature**2 * (q_t.exp() * q_s).sum(-1)
    return mean_over_labelled(per_row, labelled)


class NormalisedDistillation(Term):
    """:func:`normalised_cross_entropy` with ``batch.targets``."""

    needs_labels = True
    over = "labelled"

    def __init__(self, temperature: float = 1.0, gamma: float = 1.5) -> None:
        super().__init__()
        self.temperature = self.reads_softmax_at = check_temperature(temperature)
        self.gamma = check_factor("gamma", gamma)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the labelled rows."""
        both = student.logits, teacher.logits
        return normalised_cross_entropy(*both, batch.targets, self.temperature, self.gamma)
