"""MiniLMv2: Wang et al., Multi-Head Self-Attention Relation Distillation, Findings of ACL 2021, arXiv 2012.15828."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd.losses.base import Batch, Output, Setup
from kd.losses.hidden._layers import HeadsTerm, real_positions, relation_kl

__all__ = ["self_attention_relations"]


def self_attention_relations(
    student_query: Tensor,
    student_key: Tensor,
    student_value: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    teacher_value: Tensor,
    relation_heads: int,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the mean KL of three relations, queries, keys and values each with itself: Eq. 5 to 8, weights 1/3.

    R = softmax(x xᵀ / √d) with the heads joined and split anew into ``relation_heads`` parts of width d, so that the
    attention heads of the networks may differ. Tensors (B, L, D); ``relation_heads`` divides every width; ``mask``
    (B, L), True or 1 where a position is real, None: all are. Each sample is averaged over its own length, as if it ran
    alone without padding; one without a real position counts as 0.
    """
    kept = real_positions(mask, student_query)
    students = (student_query, student_key, student_value)
    teachers = (teacher_query, teacher_key, teacher_value)
    found = [relation_kl((s, s), (t, t), relation_heads, kept) for s, t in zip(students, teachers, strict=True)]
    return torch.stack(found).mean()


class MiniLMv2(HeadsTerm):
    """:func:`self_attention_relations` with ``batch.mask`` at one layer; of several pairs of layers the sum.

    ``relation_heads``: 48 with teachers of base size, 64 of large size. The paper takes the last layer of a base
    teacher, an upper middle one of a large teacher: of 24 layers ``teacher_taps=["21:query","21:key","21:value"]`` for
    BERT, 19 for RoBERTa. Taps: queries of the layers, then keys, then values.
    """

    parts = 3
    of_scores = False

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = ("-1:query", "-1:key", "-1:value"),
        teacher_taps: Sequence[str | int] | None = ("-1:query", "-1:key", "-1:value"),
        mapping: str = "uniform",
        relation_heads: int = 48,
    ) -> None:
        if relation_heads < 1:
            raise ValueError(f"relation_heads = {relation_heads} is not allowed: it must be 1 or more")
        super().__init__(student_taps, teacher_taps, mapping, relation_heads)
        self.relation_heads = relation_heads

    def prepare(self, setup: Setup) -> None:
        """Pair the layers. ``ValueError`` where the relation heads do not divide a width."""
        super().prepare(setup)
        for pair in self.tapped(setup):
            for tap in pair:
                if tap.shape[-1] % self.relation_heads:
                    raise ValueError(
                        f"relation_heads = {self.relation_heads} is not allowed: it must divide the width "
                        f"{tap.shape[-1]} of {tap.side} tap {tap.name}"
                    )

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the pairs of layers."""
        heads, mask = self.relation_heads, batch.mask
        found = [
            self_attention_relations(q, k, v, t_q, t_k, t_v, heads, mask)
            for q, k, v, t_q, t_k, t_v in self.layers(student, teacher)
        ]
        return torch.stack(found).sum()
