"""Attention cross-entropy: Yang et al., TextBrewer, ACL 2020 (demonstrations), arXiv 2002.12620."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd.losses.base import Batch, Output, Setup, at_least_float32, check_same_shape
from kd.losses.hidden._layers import HeadsTerm, hide_keys, masked_mean, over_positions, real_positions

__all__ = ["attention_cross_entropy"]


def attention_cross_entropy(
    student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None, merge_heads: bool = False
) -> Tensor:
    """Compute −Σ_k p_t log p_s over the real keys k, mean over heads and real queries, p the softmax of the scores.

    Both scores (B, H, L, L), queries before keys; ``mask`` (B, L), True or 1 where a position is real, None: all are.
    The softmax runs over all keys as in TextBrewer, whose scores of padding are near −10⁴ already. ``merge_heads``:
    scores are averaged over the heads first, so that their number may differ. Not 0 for equal scores: the teacher's
    entropy is part of it. 0, with zero gradient, where no position is real.
    """
    both = [at_least_float32(s) for s in (student_scores, teacher_scores)]
    if merge_heads:
        both = [s.mean(1, keepdim=True) for s in both]
    check_same_shape("attention scores", *both)
    kept = real_positions(mask, both[0][:, 0])
    products = both[1].softmax(-1) * both[0].log_softmax(-1)
    per_query = -torch.where(kept[:, None, None], products, 0).sum(-1)
    return masked_mean(per_query, kept[:, None].expand_as(per_query))


class AttentionCrossEntropy(HeadsTerm):
    """:func:`attention_cross_entropy` with ``batch.mask``, summed over the pairs of layers.

    The scores are made of the tapped queries and keys, those of padding are hidden before the softmax. Taps: the
    queries of the layers, then their keys; ``"all:query"`` is those of all layers. ``heads``: null is what the
    networks' configs say. Causal attention, rotary and relative positions are refused.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = ("all:query", "all:key"),
        teacher_taps: Sequence[str | int] | None = ("all:query", "all:key"),
        mapping: str = "uniform",
        heads: int | None = None,
        merge_heads: bool = False,
    ) -> None:
        super().__init__(student_taps, teacher_taps, mapping, heads)
        self.merge_heads, self.equal_heads = merge_heads, not merge_heads

    def prepare(self, setup: Setup) -> None:
        """Pair the layers and find out the number of heads."""
        super().prepare(setup)
        self.over = over_positions(setup.batch)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the pairs of layers."""
        found = []
        for own, other in self.scored(student, teacher):
            kept = real_positions(batch.mask, own[:, 0])
            if self.merge_heads:  # before padding is hidden: a mean of the most negative numbers overflows
                own, other = (s.mean(1, keepdim=True) for s in (own, other))
            found.append(attention_cross_entropy(hide_keys(own, kept), hide_keys(other, kept), batch.mask))
        return torch.stack(found).sum()
