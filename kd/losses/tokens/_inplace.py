"""Divergences of a chunk of rows with their gradient, written by hand and in place: no tensor but those of a pool."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kd.losses.base import UNLABELLED
from kd.losses.tokens._topk import NOTHING, log_rest


class Pool:
    """Buffers (rows, classes) that are used again: allocated when none is free, never given back to the allocator."""

    def __init__(self, rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.classes, self.dtype, self.device = rows, classes, dtype, device
        self.free: list[Tensor] = []

    def take(self) -> Tensor:
        """Take a buffer with whatever was left in it, of as many rows as the chunk has."""
        if not self.free:
            return torch.empty(self.rows, self.classes, dtype=self.dtype, device=self.device)
        return self.free.pop()[: self.rows]  # the last chunk may have fewer

    def give(self, *buffers: Tensor) -> None:
        """Put buffers back."""
        self.free += buffers


def log_softmax(logits: Tensor, temperature: float, pool: Pool, last: bool) -> Tensor:
    """Return log softmax(z / T) in a buffer of its own; with ``last`` the logits' buffer is spent."""
    scaled = logits
    if temperature != 1.0:
        scaled = logits if last else pool.take()
        torch.mul(logits, 1 / temperature, out=scaled)
    found = pool.take()
    torch.log_softmax(scaled, -1, out=found)
    if last or scaled is not logits:
        pool.give(scaled)
    return found


# ---------------------------------------------------------------------- two distributions
#
# Each takes log p_s and log p_t (rows, classes), spends both buffers, and returns the divergence of each row with a
# buffer that has its gradient by the student's softened logits. Of f(log p_s) with u = ∂f/∂log p_s it is u − p_s Σ u.

Divergence = Callable[[Tensor, Tensor, float, Pool], tuple[Tensor, Tensor]]


def forward_kl(log_s: Tensor, log_t: Tensor, share: float, pool: Pool) -> tuple[Tensor, Tensor]:
    """Compute KL(p_t ‖ p_s); gradient p_s − p_t."""
    p_t = torch.exp(log_t, out=pool.take())
    rows = log_t.sub_(log_s).mul_(p_t).sum(-1)
    log_s.exp_().sub_(p_t)
    pool.give(log_t, p_t)
    return rows, log_s


def reverse_kl(log_s: Tensor, log_t: Tensor, share: float, pool: Pool) -> tuple[Tensor, Tensor]:
    """Compute KL(p_s ‖ p_t); gradient p_s (log p_s − log p_t − KL)."""
    gap = torch.sub(log_s, log_t, out=pool.take())
    p_s = torch.exp(log_s, out=log_t)
    rows = torch.mul(gap, p_s, out=log_s).sum(-1)
    gap.sub_(rows.unsqueeze(-1)).mul_(p_s)
    pool.give(log_s, p_s)
    return rows, gap


def js(log_s: Tensor, log_t: Tensor, share: float, pool: Pool) -> tuple[Tensor, Tensor]:
    """Compute β KL(p_t ‖ m) + (1 − β) KL(p_s ‖ m), m = β p_t + (1 − β) p_s.

    Gradient (1 − β) p_s (log p_s − log m − KL_s).
    """
    if share in (0, 1):
        return (reverse_kl if share == 1 else forward_kl)(log_s, log_t, share, pool)
    log_m = _log_mixture(log_t, log_s, share, pool)
    p = torch.exp(log_t, out=pool.take())
    rows = log_t.sub_(log_m).mul_(p).sum(-1).mul_(share)
    torch.exp(log_s, out=p)
    of_student = torch.mul(log_s.sub_(log_m), p, out=log_t).sum(-1)
    log_s.sub_(of_student.unsqueeze(-1)).mul_(p).mul_(1 - share)
    pool.give(log_t, log_m, p)
    return rows + (1 - share) * of_student, log_s


def skewed_kl(log_s: Tensor, log_t: Tensor, share: float, pool: Pool) -> tuple[Tensor, Tensor]:
    """Compute KL(p_t ‖ m), m = α p_t + (1 − α) p_s; gradient (1 − α) p_s (Σ p_s p_t / m − p_t / m)."""
    if share == 0:
        return forward_kl(log_s, log_t, share, pool)
    log_m = _log_mixture(log_t, log_s, share, pool)
    p_t = torch.exp(log_t, out=pool.take())
    rows = torch.mul(log_t.sub_(log_m), p_t, out=p_t).sum(-1)
    ratio, p_s = log_t.exp_(), log_s.exp_()
    mean = torch.mul(ratio, p_s, out=log_m).sum(-1, keepdim=True)
    ratio.sub_(mean).mul_(p_s).mul_(share - 1)
    pool.give(log_m, p_t, p_s)
    return rows, ratio


def skewed_reverse_kl(log_s: Tensor, log_t: Tensor, share: float, pool: Pool) -> tuple[Tensor, Tensor]:
    """Compute KL(p_s ‖ m), m = (1 − α) p_t + α p_s; gradient p_s (h − Σ p_s h), h = log p_s − log m − α p_s / m."""
    if share == 0:
        return reverse_kl(log_s, log_t, share, pool)
    log_m = _log_mixture(log_s, log_t, share, pool)
    p_s = torch.exp(log_s, out=pool.take())
    gap = log_s.sub_(log_m)
    rows = torch.mul(gap, p_s, out=log_m).sum(-1)
    gap.sub_(torch.exp(gap, out=log_m), alpha=share)
    mean = torch.mul(gap, p_s, out=log_m).sum(-1, keepdim=True)
    gap.sub_(mean).mul_(p_s)
    pool.give(log_t, log_m, p_s)
    return rows, gap


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float, pool: Pool) -> Tensor:
    """Return log(share · p + (1 − share) · q) in a buffer of its own."""
    one = torch.add(log_p, math.log(share), out=pool.take())
    other = torch.add(log_q, math.log1p(-share), out=pool.take())
    torch.logaddexp(one, other, out=one)
    pool.give(other)
    return one


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": js,
    "skewed_kl": skewed_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
}

# ---------------------------------------------------------------------- labels, and a teacher of k classes


def cross_entropy(log_s: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Compute −Σ q log p_s per row, 0 without a label; q: the label, smoothed. Gradient p_s − q, in the same buffer."""
    labelled = (targets != UNLABELLED).to(log_s.dtype)
    ids = targets.clamp(min=0).unsqueeze(-1)
    own = log_s.gather(-1, ids)
    rows = -own.squeeze(-1)
    if smoothing:
        rows = (1 - smoothing) * rows - smoothing * log_s.mean(-1)
    gradient = log_s.exp_()
    gradient.scatter_(-1, ids, own.exp() - (1 - smoothing))
    if smoothing:
        gradient.sub_(smoothing / gradient.shape[-1])
    return rows * labelled, gradient.mul_(labelled.unsqueeze(-1))


def topk_kl(scaled: Tensor, log_probs: Tensor, ids: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Compute KL(b_t ‖ b_s) of each row over k classes and the rest (:func:`~kd.losses.tokens.topk_kl.topk_buckets`).

    ``scaled`` (rows, classes): z / T, spent: its buffer has the gradient. That of a class among the k is that of its
    bucket, b_s − b_t; each other class has its part, by the student's softmax, of the gradient of the rest.
    """
    known = scaled.gather(-1, ids)
    if ids.shape[-1] == scaled.shape[-1] or form == "renormalised":
        log_s, log_t = known.log_softmax(-1), log_probs.log_softmax(-1)
        gradient = scaled.zero_()
    else:
        largest = scaled.scatter_(-1, ids, -torch.inf).amax(-1, keepdim=True)
        others = scaled.sub_(largest).exp_().sum(-1, keepdim=True)
        log_s = torch.cat([known, largest + others.log()], -1).log_softmax(-1)
        rest = log_rest(log_probs)
        if form == "zero":
            log_probs, rest = log_probs.log_softmax(-1), torch.full_like(rest, NOTHING)
        log_t = torch.cat([log_probs, rest], -1)
        gradient = scaled.mul_((log_s[:, -1:].exp() - rest.exp()) / others)
    p_t = log_t.exp()
    gaps = log_s.exp() - p_t
    gradient.scatter_(-1, ids, gaps[:, : ids.shape[-1]])
    return (p_t * (log_t - log_s)).sum(-1), gradient
