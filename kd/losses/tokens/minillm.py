"""MiniLLM: Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, ICLR 2024, arXiv 2306.08543."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import UNLABELLED, Batch, Output, Term, at_least_float32, check_choice
from kd.losses.logits.rkl import reverse_kl_divergence

__all__ = ["clipped_policy_gradient", "discounted_returns", "minillm_advantages"]

VARIANTS = ("code", "paper")


def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    """Σ_{k ≥ t} γ^(k − t) r_k at each position t: ``rewards`` (samples, positions) → the same shape; γ from 0 to 1."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma = {gamma} is not allowed: it must be from 0 to 1")
    places = torch.arange(rewards.shape[-1], device=rewards.device)
    ahead = places[:, None] - places[None, :]  # k − t at [k, t]
    factors = torch.where(ahead >= 0, torch.pow(float(gamma), ahead.clamp(min=0).to(rewards.dtype)), 0.0)
    return rewards @ factors


@torch.no_grad()
def minillm_advantages(rewards: Tensor, mask: Tensor, gamma: float = 0.95, variant: str = "code") -> Tensor:
    """Advantages (samples, positions) of sampled answers, without gradient; 0 where ``mask`` is.

    ``rewards`` (samples, positions): log p_t(y) − log p_s(y) of each token y; ``mask`` (samples, positions) bool: the
    positions of the answer. Both normalise the length: without it long answers are avoided.

    ``variant``: ``"code"``, the discounted return from the position on, ÷ the number of positions left, then less their
    mean and ÷ their standard deviation over all of the batch, padding included (``gamma`` 0.95); ``"paper"``, the mean
    of the rewards *behind* the position (section 2.2: the single step is a term of its own), nothing more.
    """
    check_choice("variant", variant, VARIANTS)
    counted = mask.to(rewards.dtype)
    rewards = rewards * counted
    left = counted.flip(-1).cumsum(-1).flip(-1)
    if variant == "paper":
        behind = discounted_returns(rewards, 1.0) - rewards
        return behind / (left - 1).clamp(min=1) * counted
    advantages = discounted_returns(rewards, gamma) / left.clamp(min=1)
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8) * counted


def clipped_policy_gradient(
    student_logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    old_log_probs: Tensor,
    importance: Tensor,
    clip: float = 0.2,
) -> Tensor:
    """Mean over rows of max(−A ρ w, −A clip(ρ w, 1 − c, 1 + c)), with ρ = p_s(y) / p_old(y): the long part of MiniLLM.

    ``student_logits`` (rows, vocabulary); the others (rows,): ``targets`` int64, the sampled tokens y; ``advantages`` A
    (:func:`minillm_advantages`); ``old_log_probs``: log p_old(y) of the student that sampled, or of what it was at the
    last step; ``importance`` w: p_old / the mixture of student and teacher that was sampled from, 1 where the student
    alone was. ``clip`` c above 0, below 1. The gradient goes through ρ alone. 0 without rows.

    The paper writes the gradient, Eq. 5 with the weights w; the clip as in PPO is that of its section 2.2 and the code.
    """
    log_probs = F.log_softmax(at_least_float32(student_logits), dim=-1).gather(-1, targets[:, None]).squeeze(-1)
    ratio = (log_probs - old_log_probs).exp() * importance
    clipped = ratio.clamp(1 - _check_clip(clip), 1 + clip)
    per_row = torch.maximum(-advantages * ratio, -advantages * clipped)
    return per_row.sum() / max(1, per_row.numel())


class MiniLLM(Term):
    """Single-step part, :func:`~kd.losses.logits.rkl.reverse_kl_divergence` at T = 1, plus the long part.

    The long part is :func:`clipped_policy_gradient` over the tokens that the student has sampled, ``batch.targets``.
    The set-up that samples leaves ``batch.extra["advantages"]``, ``batch.extra["old_log_probs"]`` and, if a mixture was
    sampled from, ``batch.extra["importance"]``, (rows,) each. A batch without ``advantages`` was not sampled: only the
    single-step part is left.
    """

    needs_labels = True
    over = "labelled"

    def __init__(self, clip: float = 0.2) -> None:
        super().__init__()
        self.clip = _check_clip(clip)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """The mean over the labelled rows."""
        kept = batch.targets != UNLABELLED
        logits = student.logits[kept]
        value = reverse_kl_divergence(logits, teacher.logits[kept])
        advantages = batch.extra.get("advantages")
        if advantages is None:
            return value
        importance = batch.extra.get("importance", torch.ones_like(advantages))
        old = batch.extra["old_log_probs"]
        long = clipped_policy_gradient(
            logits, batch.targets[kept], advantages[kept], old[kept], importance[kept], self.clip
        )
        return value + long


def _check_clip(clip: float) -> float:
    if not 0 < clip < 1:
        raise ValueError(f"clip = {clip} is not allowed: it must be above 0 and below 1")
    return float(clip)
