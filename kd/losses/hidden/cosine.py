"""Hidden-state cosine: Sanh et al., DistilBERT, NeurIPS EMC² Workshop 2019, arXiv 1910.01108."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch, Output, Setup, check_same_shape
from kd.losses.hidden._layers import ProjectedTerm, check_hidden, masked_mean, over_positions, real_positions

__all__ = ["hidden_cosine"]


def hidden_cosine(student_hidden: Tensor, teacher_hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the mean over the real positions of 1 − cos(h_s, h_t), from 0 to 2: L_cos of section 3.

    Both hidden states (B, L, D) of one width; ``mask`` (B, L), True or 1 where a position is real, None: all are. A
    zero vector has cosine 0. 0, with zero gradient, where no position is real.
    """
    student_hidden = check_hidden("student_hidden", student_hidden)
    teacher_hidden = check_hidden("teacher_hidden", teacher_hidden)
    check_same_shape("hidden states", student_hidden, teacher_hidden)
    distances = 1 - F.cosine_similarity(student_hidden, teacher_hidden, dim=-1)
    return masked_mean(distances, real_positions(mask, student_hidden))


class HiddenCosine(ProjectedTerm):
    """:func:`hidden_cosine` with ``batch.mask``, summed over the pairs of layers.

    DistilBERT compares the last layers (tap -1), which have one width; its objective is ``loss=[kd,ce,cosine]`` with
    weights 5, 2, 1 and T = 2. ``adapter``: ``auto`` is a linear layer where the widths differ. ``mapping``: which of
    the taps are compared, where the teacher has more (:func:`~kd.losses.hidden._layers.layer_pairs`).
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-1,),
        teacher_taps: Sequence[str | int] | None = (-1,),
        mapping: str = "uniform",
        adapter: str = "auto",
    ) -> None:
        super().__init__(student_taps, teacher_taps, mapping, adapter)

    def prepare(self, setup: Setup) -> None:
        """Pair the layers and build the projections."""
        super().prepare(setup)
        self.over = over_positions(setup.batch)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the pairs of layers."""
        return torch.stack([hidden_cosine(s, t, batch.mask) for s, t in self.projected(student, teacher)]).sum()
