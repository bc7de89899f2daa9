"""MLKD: Jin, Wang and Lin, Multi-Level Logit Distillation, CVPR 2023, no arXiv id."""

from __future__ import annotations

from torch import Tensor

from kd.losses.base import Batch, Output, Term, check_choice, check_temperature
from kd.losses.logits._divergences import kl, log_probabilities

__all__ = ["batch_correlation", "class_correlation", "multi_level_loss"]

VARIANTS = ("code", "paper")
FURTHER = (3.0, 5.0, 2.0, 6.0)  # temperatures beside the base one


def class_correlation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Compute Σ_ij (PᵀP of the teacher − PᵀP of the student)_ij² / classes, P = softmax(z / T) (rows, classes).

    Which classes appear together over the batch. 0 for equal logits. No T².
    """
    both = log_probabilities(student_logits, teacher_logits, temperature)
    return _relations(*both, of_classes=True).sum() / student_logits.shape[-1]


def batch_correlation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Compute Σ_ij (PPᵀ of the teacher − PPᵀ of the student)_ij² / rows, P = softmax(z / T) (rows, classes).

    How alike the rows are. 0 for equal logits and without rows. No T².
    """
    both = log_probabilities(student_logits, teacher_logits, temperature)
    return _relations(*both, of_classes=False).sum() / max(1, len(student_logits))


def multi_level_loss(
    student_logits_weak: Tensor,
    student_logits_strong: Tensor,
    teacher_logits_weak: Tensor,
    teacher_logits_strong: Tensor,
    temperature: float = 4.0,
    variant: str = "code",
) -> Tensor:
    """Add up KD on two views with :func:`class_correlation` and :func:`batch_correlation`, at T, 3, 5, 2 and 6.

    All logits (rows, classes), of the same samples: weakly and strongly augmented. On the weak view those rows count
    that the teacher is at most as sure of as of the median one, and those classes whose mass over the batch is at most
    the median. 0 for equal logits and without rows.

    ``variant``: ``"paper"``, Σ_T of T² · KL over these rows (the others are 0 in the mean), T² · KL of the strong view,
    and both correlations with only these rows of their matrices; ``"code"``, the authors': the means over everything
    are multiplied by the share of these rows or classes, about ½, and of the strong view T = 2 and 6 are taken from the
    weak one.
    """
    check_choice("variant", variant, VARIANTS)
    weak, strong = (student_logits_weak, teacher_logits_weak), (student_logits_strong, teacher_logits_strong)
    rows, classes = max(1, len(student_logits_weak)), student_logits_weak.shape[-1]
    kept_rows, kept_classes = _below_median(teacher_logits_weak)
    if variant == "code":  # the mask is multiplied into a mean
        kept_rows, kept_classes = (kept.mean().expand_as(kept) for kept in (kept_rows, kept_classes))
    total = student_logits_weak.new_zeros(())
    for t in (check_temperature(temperature), *FURTHER):
        of_weak = log_probabilities(*weak, t)
        from_weak = variant == "code" and t in FURTHER[2:] and t != temperature
        of_view = of_weak if from_weak else log_probabilities(*strong, t)
        levels = t**2 * (kept_rows * kl(*reversed(of_weak)) + kl(*reversed(of_view)))
        samples = kept_rows * _relations(*of_weak, of_classes=False).sum(1)
        of_classes = kept_classes * _relations(*of_weak, of_classes=True).sum(1)
        total = total + (levels.sum() + samples.sum()) / rows + of_classes.sum() / classes
    return total


def _relations(log_p_student: Tensor, log_p_teacher: Tensor, of_classes: bool) -> Tensor:
    """Compute squared differences of the Gram matrices of rows, or of classes."""
    grams = [p.T @ p if of_classes else p @ p.T for p in (log_p_student.exp(), log_p_teacher.exp())]
    return (grams[0] - grams[1]).square()


def _below_median(teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Put 1 for each row of which the teacher is at most as sure as of the median one, the same of classes; else 0."""
    p = log_probabilities(teacher_logits, teacher_logits, 1.0)[1].exp()
    both = p.amax(1), p.sum(0)
    return tuple((x <= x.quantile(0.5) if len(x) else x > 0).to(p) for x in both)  # type: ignore[return-value]


class MultiLevel(Term):
    """:func:`multi_level_loss` of the logits, over all rows of the batch.

    ``view``: the name of the strongly augmented view (``batch.views``); None: the batch itself is both views.
    """

    over = "batch"  # Gram matrices and medians

    def __init__(self, temperature: float = 4.0, view: str | None = None, variant: str = "code") -> None:
        super().__init__()
        self.temperature, self.variant = check_temperature(temperature), check_choice("variant", variant, VARIANTS)
        self.view = view
        self.needs_views = () if view is None else (view,)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the loss of the whole batch."""
        strong = [side if self.view is None else side.views[self.view] for side in (student, teacher)]
        logits = student.logits, strong[0].logits, teacher.logits, strong[1].logits
        return multi_level_loss(*logits, self.temperature, self.variant)
