"""Hidden FSP: Yang et al., TextBrewer, ACL 2020, arXiv 2002.12620; after Yim et al., FSP, CVPR 2017."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kd.losses.base import Batch, Output, check_same_shape
from kd.losses.hidden._layers import ProjectedTerm, check_hidden, product, real_positions

__all__ = ["hidden_fsp"]


def hidden_fsp(
    student_hidden: Tensor,
    student_other: Tensor,
    teacher_hidden: Tensor,
    teacher_other: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the mean over samples and entries of (G_s − G_t)², G = hᵀ o / length (D × D) the flow between two layers.

    All (B, L, D) of one width; ``mask`` (B, L), True or 1 where a position is real, None: all are. G sums over the real
    positions of a sample; that of one without any is 0.
    """
    student = _flow(student_hidden, student_other, mask)
    teacher = _flow(teacher_hidden, teacher_other, mask)
    check_same_shape("flows between layers", student, teacher)
    return (student - teacher).square().mean()


def _flow(hidden: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
    hidden, other = check_hidden("a layer", hidden), check_hidden("a layer", other)
    kept = real_positions(mask, hidden)
    lengths = kept.sum(1).clamp(min=1)[:, None, None]
    return product(torch.where(kept[:, :, None], hidden, 0).transpose(1, 2), other) / lengths


class HiddenFSP(ProjectedTerm):
    """:func:`hidden_fsp` of each paired layer and the next one, with ``batch.mask``, summed over these.

    Two taps or more on each side. ``adapter``: ``auto`` is a linear layer where the widths differ.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = None,
        teacher_taps: Sequence[str | int] | None = None,
        mapping: str = "uniform",
        adapter: str = "auto",
    ) -> None:
        super().__init__(student_taps, teacher_taps, mapping, adapter)

    def choose(self, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return all pairs. ``ValueError`` where there is one alone, which has no next."""
        if len(pairs) < 2:
            raise ValueError("hidden_fsp compares a layer with the next one: both sides must have two taps or more")
        return pairs

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the layers but the last."""
        pairs = self.projected(student, teacher)
        steps = pairwise(pairs)
        return torch.stack(
            [hidden_fsp(s, after_s, t, after_t, batch.mask) for (s, t), (after_s, after_t) in steps]
        ).sum()
