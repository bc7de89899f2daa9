"""MiniLM: Wang et al., Deep Self-Attention Distillation, NeurIPS 2020, arXiv 2002.10957."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd.losses.base import Batch, Output
from kd.losses.hidden._layers import HeadsTerm, real_positions, relation_kl

__all__ = ["minilm_loss", "value_relation_kl"]


def minilm_loss(
    student_query: Tensor,
    student_key: Tensor,
    student_value: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    teacher_value: Tensor,
    heads: int,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute L_AT + L_VR of one layer, Eq. 5 to 7: KL of attention distributions and of value relations.

    Queries, keys, values (B, L, D), the widths of the networks may differ, ``heads`` (attention heads) divides both;
    ``mask`` (B, L), True or 1 where a position is real, None: all are. Each sample is averaged over its own length, as
    if it ran alone without padding; one without a real position counts as 0.
    """
    kept = real_positions(mask, student_query)
    attention = relation_kl((student_query, student_key), (teacher_query, teacher_key), heads, kept)
    return attention + value_relation_kl(student_value, teacher_value, heads, mask)


def value_relation_kl(student_value: Tensor, teacher_value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Compute L_VR, Eq. 7: KL(teacher ‖ student) of softmax(V Vᵀ / √d) over real keys; shapes: :func:`minilm_loss`."""
    kept = real_positions(mask, student_value)
    return relation_kl((student_value, student_value), (teacher_value, teacher_value), heads, kept)


class MiniLM(HeadsTerm):
    """:func:`minilm_loss` with ``batch.mask`` at the last layer, as published; of several pairs of layers the sum.

    Taps: queries of the layers, then keys, then values. Widths and depths are free, the attention heads must be equally
    many. ``heads``: null is what the networks' configs say. Causal attention, rotary and relative positions are
    refused.
    """

    parts = 3

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = ("-1:query", "-1:key", "-1:value"),
        teacher_taps: Sequence[str | int] | None = ("-1:query", "-1:key", "-1:value"),
        mapping: str = "uniform",
        heads: int | None = None,
    ) -> None:
        super().__init__(student_taps, teacher_taps, mapping, heads)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the pairs of layers."""
        heads, mask = self.numbers[0], batch.mask
        found = [
            minilm_loss(q, k, v, t_q, t_k, t_v, heads, mask) for q, k, v, t_q, t_k, t_v in self.layers(student, teacher)
        ]
        return torch.stack(found).sum()
