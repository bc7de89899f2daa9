"""Hidden MMD: Yang et al., TextBrewer, ACL 2020, arXiv 2002.12620; after Huang and Wang, NST, arXiv 1707.01219."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd.losses.base import Batch, Output, Setup
from kd.losses.hidden._layers import (
    LayerTerm,
    check_hidden,
    check_one_length,
    masked_mean,
    over_pairs,
    product,
    real_positions,
)

__all__ = ["hidden_mmd"]


def hidden_mmd(
    student_hidden: Tensor,
    student_other: Tensor,
    teacher_hidden: Tensor,
    teacher_other: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute (K_s − K_t)², mean over pairs of real positions, K = h oᵀ / D the products of two layers of a network.

    All (B, L, D), D may differ between the networks; ``other`` may be ``hidden`` itself (NST with a linear kernel over
    positions). ``mask`` (B, L), True or 1 where a position is real, None: all are. 0 where no position is real.
    """
    student, teacher = _products(student_hidden, student_other), _products(teacher_hidden, teacher_other)
    check_one_length(student_hidden, teacher_hidden)
    kept = real_positions(mask, student)
    return masked_mean((student - teacher).square(), kept[:, :, None] & kept[:, None])


def _products(hidden: Tensor, other: Tensor) -> Tensor:
    hidden, other = check_hidden("a layer", hidden), check_hidden("a layer", other)
    return product(hidden, other.transpose(1, 2)) / hidden.shape[2]


class HiddenMMD(LayerTerm):
    """:func:`hidden_mmd` of each layer with itself, with ``batch.mask``, summed over the pairs of layers."""

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = None,
        teacher_taps: Sequence[str | int] | None = None,
        mapping: str = "uniform",
    ) -> None:
        super().__init__(student_taps, teacher_taps, mapping)

    def prepare(self, setup: Setup) -> None:
        """Pair the layers."""
        self.pair_layers(setup)
        self.over = over_pairs(setup.batch)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the pairs of layers."""
        return torch.stack([hidden_mmd(s, s, t, t, batch.mask) for s, t in self.pairs(student, teacher)]).sum()
