"""Attention MSE: Jiao et al., TinyBERT, Findings of EMNLP 2020, arXiv 1909.10351."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd.losses.base import Batch, Output, Setup, at_least_float32, check_choice, check_same_shape
from kd.losses.hidden._layers import HeadsTerm, masked_mean, over_pairs, real_positions

__all__ = ["attention_score_mse"]

VARIANTS = ("code", "masked")
HIDDEN = -100.0  # scores at or below are taken for those of padding


def attention_score_mse(
    student_scores: Tensor,
    teacher_scores: Tensor,
    mask: Tensor | None = None,
    variant: str = "code",
    merge_heads: bool = False,
) -> Tensor:
    """Compute the mean of squared differences of attention scores before the softmax: Eq. 7.

    Both scores (B, H, L, L), queries before keys; ``mask`` (B, L), True or 1 where a position is real, None: all are.
    ``merge_heads``: scores are summed over the heads first, so that their number may differ (TextBrewer).

    ``variant``: ``"code"``, the authors': scores at or below −100 and those of padding keys are 0, and the mean is over
    all elements, rows of padding queries among them; ``"masked"``, TextBrewer's: the mean over heads and pairs of real
    positions. 0, with zero gradient, where no position is real.
    """
    check_choice("variant", variant, VARIANTS)
    both = [at_least_float32(s) for s in (student_scores, teacher_scores)]
    if merge_heads:
        both = [s.sum(1, keepdim=True) for s in both]
    check_same_shape("attention scores", *both)
    kept = real_positions(mask, both[0][:, 0])
    if variant == "code":
        student, teacher = (s.masked_fill((s <= HIDDEN) | ~kept[:, None, None], 0) for s in both)
        return (student - teacher).square().mean()
    pairs = kept[:, None, :, None] & kept[:, None, None]
    return masked_mean((both[0] - both[1]).square(), pairs.expand_as(both[0]))


class AttentionMSE(HeadsTerm):
    """:func:`attention_score_mse` with ``batch.mask``, summed over the pairs of layers.

    The scores are made of the tapped queries and keys, so attention may stay fused. Taps: the queries of the layers,
    then their keys; ``"all:query"`` is those of all layers. ``mapping``: ``uniform`` is the paper's layer i with k·i.
    ``heads``: null is what the networks' configs say. Causal attention, rotary and relative positions are refused.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = ("all:query", "all:key"),
        teacher_taps: Sequence[str | int] | None = ("all:query", "all:key"),
        mapping: str = "uniform",
        heads: int | None = None,
        merge_heads: bool = False,
        variant: str = "code",
    ) -> None:
        super().__init__(student_taps, teacher_taps, mapping, heads)
        self.merge_heads, self.equal_heads = merge_heads, not merge_heads
        self.variant = check_choice("variant", variant, VARIANTS)

    def prepare(self, setup: Setup) -> None:
        """Pair the layers and find out the number of heads."""
        super().prepare(setup)
        self.over = over_pairs(setup.batch) if self.variant == "masked" else "samples"

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the pairs of layers."""
        found = [
            attention_score_mse(s, t, batch.mask, self.variant, self.merge_heads)
            for s, t in self.scored(student, teacher)
        ]
        return torch.stack(found).sum()
