"""WKD-L: Lv, Yang, Li, Wasserstein Distance Rivals Kullback-Leibler Divergence, NeurIPS 2024, arXiv 2412.08139."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.base import Batch, Output, Setup, Term, at_least_float32, check_same_shape, check_temperature
from kd.losses.feature_term import full_precision
from kd.losses.logits._divergences import check_factor, check_positive
from kd.losses.logits._target import labels_of, mean_over_labelled
from kd.losses.networks import classifier

__all__ = ["class_costs", "wasserstein_logit_loss"]

EPSILON = 1e-8  # added to the denominators, as in the authors' code; the least likely ways cost their mass by it


def class_costs(classifier_weight: Tensor) -> Tensor:
    """Compute 1 − cosine of the rows of a classifier (classes, width) → (classes, classes): what moving mass costs.

    The authors' code also has CKA of the features of the classes in the place of the cosine, and sharpens both.
    """
    unit = F.normalize(at_least_float32(classifier_weight.detach()), dim=1)
    return 1 - unit @ unit.T


def wasserstein_logit_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    cost_matrix: Tensor,
    temperature: float = 2.0,
    gamma: float = 200.0,
    sinkhorn_lambda: float = 0.05,
    sinkhorn_iter: int = 10,
) -> Tensor:
    """Compute −p_t(y) log p_s(y) + ``gamma`` · ⟨P, cost⟩, mean over labelled rows: mass moved between other classes.

    p = softmax(z) at T = 1. P is the plan of ``sinkhorn_iter`` iterations of Sinkhorn, with entropic regularisation
    λ = ``sinkhorn_lambda``, between the teacher's and the student's softmax(z / T) over the classes other than the
    label y. The gradient goes through the iterations.

    Both logits (rows, classes), ``targets`` (rows,) int64, ``UNLABELLED`` where the label is withheld: such rows do not
    count. ``cost_matrix`` (classes, classes), see :func:`class_costs`. Not 0 for equal logits: a plan with entropy
    moves mass. 0 without labelled rows. ``ValueError`` for targets that are shares of classes. Without T².
    """
    check_same_shape("logits", student_logits, teacher_logits)
    check_temperature(temperature)
    labels, labelled = labels_of(targets)
    place = labels.unsqueeze(-1)
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits)
    of_label = -teacher.softmax(-1).gather(-1, place) * student.log_softmax(-1).gather(-1, place)
    # the label has no mass on either side, so that one cost matrix serves all rows
    others = [(z / temperature).scatter(-1, place, -float("inf")).softmax(-1) for z in (teacher, student)]
    with full_precision(student):
        moved = _transport(others[0], others[1], cost_matrix.to(student.dtype), sinkhorn_lambda, sinkhorn_iter)
    return mean_over_labelled(of_label.squeeze(-1) + gamma * moved, labelled)


def _transport(source: Tensor, goal: Tensor, cost: Tensor, regularisation: float, iterations: int) -> Tensor:
    """Compute ⟨P, cost⟩ of each row (rows,): two distributions (rows, classes)."""
    kernel = (-cost / regularisation).exp()
    there = (source > 0).to(source.dtype) / max(1, source.shape[-1] - 1)
    here = there
    for _ in range(iterations):
        here = source / (there @ kernel.T + EPSILON)
        there = goal / (here @ kernel + EPSILON)
    return (here * (there @ (kernel * cost).T)).sum(-1)


class WassersteinLogits(Term):
    """:func:`wasserstein_logit_loss` with ``batch.targets``; costs are those of the teacher's classifier."""

    needs_labels = True
    over = "labelled"
    costs: Tensor

    def __init__(
        self,
        temperature: float = 2.0,
        gamma: float = 200.0,
        sinkhorn_lambda: float = 0.05,
        sinkhorn_iter: int = 10,
    ) -> None:
        super().__init__()
        self.temperature = self.reads_softmax_at = check_temperature(temperature)
        self.gamma = check_factor("gamma", gamma)
        self.sinkhorn_lambda = check_positive("sinkhorn_lambda", sinkhorn_lambda)
        if sinkhorn_iter < 1:
            raise ValueError(f"sinkhorn_iter = {sinkhorn_iter} is not allowed: it must be 1 or more")
        self.sinkhorn_iter = sinkhorn_iter

    def prepare(self, setup: Setup) -> None:
        """Compute the costs. ``ValueError`` where there is no one teacher with a linear classifier of these classes."""
        if "teacher" not in setup.networks:
            raise ValueError("wkd_logit needs the teacher's classifier: there must be one teacher network")
        name, module = classifier(setup.networks["teacher"])
        classes = setup.teacher.logits.shape[-1]
        if not isinstance(module, nn.Linear) or module.out_features != classes:
            raise ValueError(
                f"wkd_logit needs a teacher with one linear layer of {classes} classes: {name} is a "
                f"{type(module).__name__} of {getattr(module, 'out_features', 'no')} outputs"
            )
        self.register_buffer("costs", class_costs(module.weight))

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the labelled rows."""
        settings = self.temperature, self.gamma, self.sinkhorn_lambda, self.sinkhorn_iter
        return wasserstein_logit_loss(student.logits, teacher.logits, batch.targets, self.costs, *settings)
