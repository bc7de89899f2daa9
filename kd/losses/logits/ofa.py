"""OFA: Hao et al., One-for-All: Bridge the Gap Between Heterogeneous Architectures, NeurIPS 2023, arXiv 2310.19444."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.base import Batch, Output, Setup, Term, at_least_float32, check_same_shape, check_temperature
from kd.losses.heads import ClassHead
from kd.losses.layouts import Tapped
from kd.losses.logits._divergences import check_positive
from kd.losses.logits._target import labels_of, mean_over_labelled

__all__ = ["enhanced_target_cross_entropy"]


def enhanced_target_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float = 1.0, eps: float = 1.0
) -> Tensor:
    """Compute the mean over labelled rows of −Σ_c ((p_t + 1[c = y])^ε − 1[c = y]) log p_s, p = softmax(z / T).

    ε = 1 is the cross-entropy with the teacher's distribution; above 1 the label y counts more, and the teacher's
    other classes less, which keeps the bias of its architecture out of the student.

    Both logits (rows, classes), ``targets`` (rows,) int64, ``UNLABELLED`` where the label is withheld: such rows do not
    count. ``temperature`` and ``eps`` > 0. Not 0 for equal logits. 0 without labelled rows. No T². ``ValueError`` for
    targets that are shares of classes.

    The authors' code takes the logarithm of a softmax, infinite for logits 104 apart in float32; here it is exact.
    """
    check_same_shape("logits", student_logits, teacher_logits)
    temperature, eps = check_temperature(temperature), check_positive("eps", eps)
    labels, labelled = labels_of(targets)
    log_p_student = F.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    p_teacher = (at_least_float32(teacher_logits) / temperature).softmax(-1)
    of_label = torch.zeros_like(p_teacher).scatter(-1, labels.unsqueeze(-1), 1.0)
    goal = (p_teacher + of_label) ** eps - of_label
    return mean_over_labelled(-(goal * log_p_student).sum(-1), labelled)


class OneForAll(Term):
    """:func:`enhanced_target_cross_entropy` of the student's logits, and of those of a head on each of its stages.

    The heads (:class:`~kd.losses.heads.ClassHead`) belong to the term and are gone after the training. No feature of
    the teacher is read, so that any two architectures go together. ``student_taps = []``: the logits alone.

    The heads of the authors' code have attention for students of tokens; these have a norm and the mean of the tokens.
    """

    needs_labels = True
    over = "labelled"

    def __init__(
        self, student_taps: Sequence[str | int] | None = None, temperature: float = 1.0, eps: float = 1.0
    ) -> None:
        super().__init__()
        self.student_taps = student_taps
        self.temperature = self.reads_softmax_at = check_temperature(temperature)
        self.eps = check_positive("eps", eps)
        self.heads = nn.ModuleList()

    def prepare(self, setup: Setup) -> None:
        """Build one head a tap, where and of the type that the student's feature is."""
        taps = self._features(setup.student)
        classes = setup.teacher.logits.shape[-1]
        found = [Tapped("student", t, tuple(f.shape), setup.layout("student", t, f)) for t, f in taps.items()]
        grids = [tap.grid for tap in found if tap.layout.kind == "NCHW" and tap.grid is not None]
        smallest = min(grids, key=lambda grid: grid[0] * grid[1], default=None)
        heads = [ClassHead("ofa", tap, classes, smallest) for tap in found]
        self.heads = nn.ModuleList(head.to(f) for head, f in zip(heads, taps.values(), strict=True))
        # batch statistics are those of the whole batch
        self.over = "batch" if any(head.normalised for head in heads) else "labelled"

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the student's logits and the heads."""
        features = self._features(student).values()
        if len(features) != len(self.heads):
            raise ValueError("the heads are missing: call prepare(setup) before the first batch")
        several = [student.logits, *(head(f) for head, f in zip(self.heads, features, strict=True))]
        settings = teacher.logits, batch.targets, self.temperature, self.eps
        return torch.stack([enhanced_target_cross_entropy(z, *settings) for z in several]).sum()

    def _features(self, student: Output) -> dict[str, Tensor]:
        names = list(student.features) if self.student_taps is None else [str(tap) for tap in self.student_taps]
        return {name: student.features[name] for name in names}
