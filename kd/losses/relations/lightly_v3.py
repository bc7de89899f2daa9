"""Lightly v3: Lightly AG, LightlyTrain, distillation v3, software 2025, no paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import Convert, Pool, check_maps, width_of
from kd.losses.base import Batch, Output, at_least_float32, check_same_shape, check_temperature
from kd.losses.feature_term import full_precision
from kd.losses.layouts import Layout, Tapped
from kd.losses.relations._queue import QueueTerm
from kd.losses.relations.lightly_v1 import queue_similarity

__all__ = ["token_similarity"]

TOKENS = Layout("tokens")


def token_similarity(student_tokens: Tensor, teacher_tokens: Tensor, temperature: float = 0.07) -> Tensor:
    """Compute KL(teacher ‖ student) of softmax over a token's similarities to those of its image, mean over all tokens.

    Both (B, N, D) of unit length; the widths may differ. Without T².
    """
    check_same_shape("tokens", student_tokens[..., 0], teacher_tokens[..., 0])
    units = (at_least_float32(tokens) for tokens in (student_tokens, teacher_tokens))
    log_s, log_t = ((unit @ unit.transpose(1, 2) / temperature).log_softmax(2) for unit in units)
    return (log_t.exp() * (log_t - log_s)).sum(2).mean()


class TokenSimilarity(QueueTerm):
    """:func:`token_similarity` of patches and :func:`queue_similarity` of their means.

    Maps and tokens without the prefix; the student's, resampled to the teacher's grid, go through a linear layer.
    ``w_local``: factor of the tokens' part. ``queue``: how many features of past batches are kept.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-1,),
        teacher_taps: Sequence[str | int] | None = (-1,),
        queue: int = 8192,
        temperature: float = 0.07,
        temperature_local: float = 0.07,
        w_local: float = 1.0,
    ) -> None:
        super().__init__(student_taps, teacher_taps, queue, temperature)
        if w_local < 0:
            raise ValueError(f"w_local = {w_local} is not allowed: it must be 0 or more")
        self.w_local, self.temperature_local = w_local, check_temperature(temperature_local)

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make tokens on the teacher's grid, the student's of the teacher's width."""
        _, other = check_maps(self.method, student, teacher)
        linear = nn.Linear(width_of(student), width_of(teacher))
        return nn.Sequential(Convert(student.layout, "tokens", other.grid), linear), Convert(teacher.layout, "tokens")

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the taps."""
        pool, values = Pool(TOKENS), []
        for queue, (own, other) in zip(self.queues, self.compared(student, teacher), strict=True):
            with full_precision(own):
                means = F.normalize(pool(own), dim=1), F.normalize(pool(other), dim=1)
                own, other = F.normalize(own, dim=2), F.normalize(other, dim=2)
                whole = queue_similarity(*means, queue(means[1]), self.temperature)
                values.append(whole + self.w_local * token_similarity(own, other, self.temperature_local))
        return torch.stack(values).sum()
