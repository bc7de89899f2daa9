"""Sampling from a mixture of student and teacher: Gu et al., MiniLLM, ICLR 2024, arXiv 2306.08543, section 2.2."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from kd.losses.logits._divergences import log_mixture
from kd.losses.networks import unwrapped


class TeacherMixed:
    """Makes the next token's scores those of (1 − α) p_s + α p_t, in a student's ``generate(logits_processor=[…])``.

    ``teacher``: a causal network of transformers with the student's vocabulary, in eval mode; it keeps its own cache of
    keys and values, where it has one. ``mask``: (samples, positions) bool, which positions of the prompts are no
    padding. ``share`` α: from 0 to 1. One object serves one call of ``generate``.
    """

    def __init__(self, teacher: nn.Module, mask: Tensor, share: float) -> None:
        self.teacher, self.mask, self.share = teacher, mask.long(), share
        self.cache: Any = None
        inner = unwrapped(teacher)
        accepted = inspect.signature(inner.forward).parameters
        self.takes_places = "position_ids" in accepted
        self.name = "cache" if "cache" in accepted else "past_key_values"  # older transformers

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the mixture's log-probabilities (samples, vocabulary); ``scores``: the student's logits."""
        new = input_ids.shape[1] - self.mask.shape[1]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(input_ids), new)], 1)
        due = input_ids if self.cache is None else input_ids[:, -1:]
        places = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -due.shape[1] :]
        more = {self.name: self.cache} | ({"position_ids": places} if self.takes_places else {})
        answer = self.teacher(input_ids=due, attention_mask=self.mask, use_cache=True, **more)
        self.cache = getattr(answer, self.name, None)
        own, other = scores.float().log_softmax(-1), answer.logits[:, -1].float().log_softmax(-1)
        return log_mixture(other, own, self.share)
