"""MiniLLM: Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, ICLR 2024, arXiv 2306.08543."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch, Output, Term, at_least_float32, check_choice
from kd.losses.logits._divergences import check_share, kl, log_mixture, log_probabilities, mean_over_rows
from kd.losses.logits.rkl import reverse_kl_divergence

__all__ = ["clipped_policy_gradient", "discounted_returns", "minillm_advantages", "mixture_importance"]

VARIANTS = ("code", "paper")


def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    """Compute Σ_{k ≥ t} γ^(k − t) r_k at each position t.

    ``rewards`` (samples, positions) → the same shape; γ from 0 to 1.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma = {gamma} is not allowed: it must be from 0 to 1")
    places = torch.arange(rewards.shape[-1], device=rewards.device)
    ahead = places[:, None] - places[None, :]  # k − t at [k, t]
    factors = torch.where(ahead >= 0, torch.pow(float(gamma), ahead.clamp(min=0).to(rewards.dtype)), 0.0)
    return rewards @ factors


@torch.no_grad()
def minillm_advantages(rewards: Tensor, mask: Tensor, gamma: float = 0.95, variant: str = "code") -> Tensor:
    """Compute the advantages (samples, positions) of sampled answers, without gradient; 0 where ``mask`` is.

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
    """Compute max(−A ρ w, −A clip(ρ w, 1 − c, 1 + c)), mean over rows, ρ = p_s(y) / p_old(y): the long part of MiniLLM.

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


@torch.no_grad()
def mixture_importance(student_log_probs: Tensor, teacher_log_probs: Tensor, share: float) -> Tensor:
    """Compute the importance p_s(y) / ((1 − α) p_s(y) + α p_t(y)) of tokens y sampled from the mixture, (rows,).

    ``student_log_probs``, ``teacher_log_probs`` (rows,): log-probabilities of y; ``share`` α: of the teacher, 0 to 1.
    Between 0 and 1 / (1 − α), without gradient. It stands for the product over all tokens before (section 2.2), in the
    paper and in the authors' code.
    """
    return (student_log_probs - log_mixture(teacher_log_probs, student_log_probs, check_share("share", share))).exp()


def _rows_apart(values: Tensor, samples: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Lay out rows of several samples one sample a line, padded with 0 on the right, and say which places are rows.

    ``values`` (rows,); ``samples`` (rows,) int64 in rising order: whose row each is, of ``count`` samples. Returns
    (count, longest) twice, the second one bool; ``lines[mask]`` are the rows again.
    """
    lengths = torch.bincount(samples, minlength=count)
    mask = torch.arange(int(lengths.max()), device=values.device) < lengths.unsqueeze(1)
    return values.new_zeros(mask.shape).masked_scatter(mask, values), mask


class MiniLLM(Term):
    """Single-step part, :func:`~kd.losses.logits.rkl.reverse_kl_divergence` at T = 1, plus the long part.

    The long part is :func:`clipped_policy_gradient` over the tokens that the student has sampled, which the set-up that
    samples leaves in ``batch.extra["sampled"]`` (rows,) int64 (``distiller=on_policy``). A batch without them was not
    sampled: only the single-step part is left. One step is made with each sample, by the student that wrote it (at
    temperature 1, without dropout), so that p_old is p_s and ρ = 1 in the value; the authors make several. What an
    older student wrote, or at another temperature or top-p, the set-up refuses beside this term. w is 1, or
    :func:`mixture_importance` where the tokens are those of a mixture with the teacher (``distiller.teacher_mix``,
    which the set-up leaves in ``batch.extra["teacher_mix"]``).

    ``gamma``, ``variant``: of :func:`minillm_advantages`; ``"code"`` normalises them over the batch of each process.
    ``"paper"`` weights the single-step part with w as well (section 2.2), ``"code"`` does not.
    """

    reads_softmax_at = 1.0

    def __init__(self, clip: float = 0.2, gamma: float = 0.95, variant: str = "code") -> None:
        super().__init__()
        self.clip, self.gamma = _check_clip(clip), gamma
        self.variant = check_choice("variant", variant, VARIANTS)
        discounted_returns(torch.zeros(1, 1), gamma)  # refuses a gamma that cannot be

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over rows."""
        sampled = batch.extra.get("sampled")
        if sampled is None or batch.mask is None:
            return reverse_kl_divergence(student.logits, teacher.logits)
        own, others = (
            F.log_softmax(at_least_float32(logits.detach()), dim=-1).gather(-1, sampled[:, None]).squeeze(-1)
            for logits in (student.logits, teacher.logits)
        )
        samples = batch.extra["positions"] // batch.mask.shape[1]
        rewards, mask = _rows_apart(others - own, samples, len(batch.mask))
        advantages = minillm_advantages(rewards, mask, self.gamma, self.variant)[mask]
        weights = mixture_importance(own, others, float(batch.extra.get("teacher_mix", 0.0)))
        single = kl(*log_probabilities(student.logits, teacher.logits, 1.0))
        single = single * weights if self.variant == "paper" else single
        long = clipped_policy_gradient(student.logits, sampled, advantages, own, weights, self.clip)
        return mean_over_rows(single) + long


def _check_clip(clip: float) -> float:
    if not 0 < clip < 1:
        raise ValueError(f"clip = {clip} is not allowed: it must be above 0 and below 1")
    return float(clip)
