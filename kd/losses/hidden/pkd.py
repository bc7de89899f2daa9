"""PKD: Sun, Cheng, Gan and Liu, Patient Knowledge Distillation for BERT, EMNLP 2019, arXiv 1908.09355."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch, Output, check_choice, check_same_shape
from kd.losses.hidden._layers import ProjectedTerm, check_hidden

__all__ = ["patience_loss"]

VARIANTS = ("code", "paper")


def patience_loss(
    student_hidden: Tensor, teacher_hidden: Tensor, normalise: bool = True, variant: str = "code"
) -> Tensor:
    """Compute the squared distance of several layers' [CLS] states, each divided by its norm if ``normalise``: Eq. 7.

    Both states (B, layers, D) of one width, those of the first position.

    ``variant``: ``"code"``, the mean over samples, layers and width (the authors'); ``"paper"``, the sum over layers
    and width, mean over the samples (TextBrewer's for one layer): larger by layers × width.
    """
    check_choice("variant", variant, VARIANTS)
    student_hidden = check_hidden("student_hidden", student_hidden)
    teacher_hidden = check_hidden("teacher_hidden", teacher_hidden)
    check_same_shape("hidden states", student_hidden, teacher_hidden)
    if normalise:
        student_hidden, teacher_hidden = (F.normalize(h, dim=-1) for h in (student_hidden, teacher_hidden))
    squares = (student_hidden - teacher_hidden).square()
    return squares.mean() if variant == "code" else squares.sum((1, 2)).mean()


class PatientDistillation(ProjectedTerm):
    """:func:`patience_loss` of the first positions of intermediate layers.

    ``mapping``: ``uniform`` is PKD-Skip (of 12 layers 2, 4, 6, 8, 10 for a student of 6), ``last`` PKD-Last (7 to 11);
    both leave out the embeddings and the last layer, which the logits see to. ``listed``: the taps as they are listed.
    The paper's student has the teacher's width; otherwise ``adapter`` is a linear layer.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = None,
        teacher_taps: Sequence[str | int] | None = None,
        mapping: str = "uniform",
        normalise: bool = True,
        adapter: str = "auto",
        variant: str = "code",
    ) -> None:
        super().__init__(student_taps, teacher_taps, mapping, adapter)
        self.normalise = normalise
        self.variant = check_choice("variant", variant, VARIANTS)

    def choose(self, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Leave out the first and the last pair, unless they are listed. ``ValueError`` where none is left."""
        if self.mapping == "listed":
            return pairs
        if len(pairs) < 3:
            raise ValueError(
                f"mapping = {self.mapping} is not allowed with {len(pairs)} pairs of taps: between the embeddings and "
                "the last layer there must be one or more, otherwise list the taps and take mapping=listed"
            )
        return pairs[1:-1]

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the loss of all pairs of layers."""
        first = [(s[:, 0], t[:, 0]) for s, t in self.projected(student, teacher)]
        own, other = (torch.stack([pair[side] for pair in first], dim=1) for side in (0, 1))
        return patience_loss(own, other, self.normalise, self.variant)
