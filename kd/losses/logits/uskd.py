"""USKD: Yang et al., From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023, arXiv 2303.13005."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.base import Batch, Output, Setup, Term, at_least_float32, check_choice, check_same_shape
from kd.losses.heads import ClassHead
from kd.losses.layouts import Tapped
from kd.losses.logits._divergences import check_factor
from kd.losses.logits._target import labels_of, mean_over_labelled, split_at

__all__ = ["customised_soft_labels"]

VARIANTS = ("code", "paper")


def customised_soft_labels(
    student_logits: Tensor,
    student_weak_logits: Tensor,
    targets: Tensor,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
    variant: str = "code",
) -> Tensor:
    """Compute α ℓ_target + β ℓ_others + μ ℓ_weak, mean over labelled rows: normalised KD with labels no teacher gives.

    With p = softmax(z) of the student, w that of a weak head on an earlier feature, and y the label:
    ℓ_target = −(p_y² + 1 − mean p_y²) log p_y, no gradient through the factor; ℓ_others is the cross-entropy of p among
    the other classes with Zipf's law, 1 / rank, renormalised, the classes ranked by p and w together; ℓ_weak the
    cross-entropy of w, labels smoothed by 0.1.

    Both logits (rows, classes), ``targets`` (rows,) int64, ``UNLABELLED`` where the label is withheld: such rows do not
    count. Factors 0 or more. 0 without labelled rows. ``ValueError`` for targets that are shares of classes.

    ``variant``: what ranks a class c. ``"paper"``, w_c / (1 − w_y) + p_c / (1 − p_y); ``"code"``, the authors', with
    log p in the place of p. Both add 1e-6 to the denominators.
    """
    check_choice("variant", variant, VARIANTS)
    check_same_shape("logits of student and weak head", student_logits, student_weak_logits)
    labels, labelled = labels_of(targets)
    student, weak = at_least_float32(student_logits), at_least_float32(student_weak_logits)
    log_p, place = F.log_softmax(student, dim=-1), labels.unsqueeze(-1)
    own = log_p.gather(-1, place).squeeze(-1)
    with torch.no_grad():
        squared = (2 * own).exp()
        certainty = squared + 1 - mean_over_labelled(squared, labelled)
        w, p = weak.softmax(-1), log_p if variant == "code" else log_p.exp()
        ranked = w / (1 - w.gather(-1, place) + 1e-6) + p / (1 - p.gather(-1, place) + 1e-6)
        ranks = ranked.argsort(-1, descending=True).argsort(-1)
        zipf = (1.0 / (1 + ranks).to(log_p)).scatter(-1, place, 0.0)
        zipf = zipf / zipf.sum(-1, keepdim=True)
    others = -(zipf * split_at(student, labels)[1]).sum(-1)
    smoothed = F.cross_entropy(weak, labels, label_smoothing=0.1, reduction="none")
    return mean_over_labelled(-alpha * certainty * own + beta * others + mu * smoothed, labelled)


class SelfDistillation(Term):
    """:func:`customised_soft_labels` of a student without a teacher, beside cross-entropy.

    The weak head, the mean over positions and a linear layer on ``student_taps`` (one tap; -2 is the stage before the
    last), belongs to the term and is gone after the training.
    """

    needs_teacher = needs_teacher_logits = False
    needs_labels = True
    every_class = True
    over = "batch"  # the mean of p_y² is over the whole batch

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-2,),
        alpha: float = 1.0,
        beta: float = 0.1,
        mu: float = 0.005,
        variant: str = "code",
    ) -> None:
        super().__init__()
        self.student_taps = student_taps
        self.alpha, self.beta, self.mu = (
            check_factor("alpha", alpha),
            check_factor("beta", beta),
            check_factor("mu", mu),
        )
        self.variant = check_choice("variant", variant, VARIANTS)
        self.head: nn.Module | None = None

    def prepare(self, setup: Setup) -> None:
        """Build the weak head, where and of the type that the student's feature is."""
        name, feature = self._feature(setup.student)
        tap = Tapped("student", name, tuple(feature.shape), setup.layout("student", name, feature))
        self.head = ClassHead("uskd", tap, setup.student.logits.shape[-1]).to(feature)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the labelled rows."""
        if self.head is None:
            raise ValueError("the weak head is missing: call prepare(setup) before the first batch")
        weak = self.head(self._feature(student)[1])
        settings = self.alpha, self.beta, self.mu, self.variant
        return customised_soft_labels(student.logits, weak, batch.targets, *settings)

    def _feature(self, student: Output) -> tuple[str, Tensor]:
        names = list(student.features) if self.student_taps is None else [str(tap) for tap in self.student_taps]
        if len(names) < 1:
            raise ValueError(f"student_taps = {names} is not allowed: the weak head needs one tap")
        return names[-1], student.features[names[-1]]
