"""Attention KL: Sun et al., MobileBERT, ACL 2020, arXiv 2004.02984."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd.losses.base import Batch, Output
from kd.losses.hidden._layers import HeadsTerm, real_positions, relation_kl

__all__ = ["attention_kl"]


def attention_kl(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    heads: int,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute KL(teacher ‖ student) of the attention distributions, mean over samples, heads and real queries: Eq. 3.

    Queries and keys (B, L, D), the widths of the networks may differ, ``heads`` divides both; ``mask`` (B, L), True or
    1 where a position is real, None: all are. Distributions run over the real keys. Each sample is averaged over its
    own length, one without a real position counts as 0. The same number as L_AT of MiniLM (arXiv 2002.10957, Eq. 5).
    """
    kept = real_positions(mask, student_query)
    return relation_kl((student_query, student_key), (teacher_query, teacher_key), heads, kept)


class AttentionKL(HeadsTerm):
    """:func:`attention_kl` with ``batch.mask``, summed over the pairs of layers.

    MobileBERT has it in every layer beside the regression of the hidden states: ``loss=[hidden_mse,attention_kl]``.
    Taps: the queries of the layers, then their keys; ``"all:query"`` is those of all layers, and attention may stay
    fused. ``heads``: null is what the networks' configs say. Causal attention, rotary and relative positions are
    refused.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = ("all:query", "all:key"),
        teacher_taps: Sequence[str | int] | None = ("all:query", "all:key"),
        mapping: str = "uniform",
        heads: int | None = None,
    ) -> None:
        super().__init__(student_taps, teacher_taps, mapping, heads)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the pairs of layers."""
        heads, mask = self.numbers[0], batch.mask
        found = [attention_kl(q, k, t_q, t_k, heads, mask) for q, k, t_q, t_k in self.layers(student, teacher)]
        return torch.stack(found).sum()
