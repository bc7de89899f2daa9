"""What the methods for a teacher of k known classes share: its log-probabilities, and buckets of both sides."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Output, at_least_float32, check_temperature

NOTHING = -1e4  # the log-probability of a class that has none: finite, and 0 as a probability in every precision


def check_k(k: int) -> int:
    """Return the number. ``ValueError`` when it is not a whole number above 0."""
    if k < 1 or k != int(k):
        raise ValueError(f"k = {k} is not allowed: it must be a whole number above 0")
    return int(k)


def teacher_topk(teacher: Output, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log-probabilities at T and ids (rows, k), likeliest first: of ``teacher.topk``, else of the dense logits.

    Dense logits are softened before they are cut, which is exact, and so is a stored top-k that has the mass outside at
    its temperatures (:meth:`kd.losses.base.TopK.at`, ``ValueError`` for another one). One that has none is cut to ``k``
    and softened after that (:func:`soften_topk`). Fewer than ``k`` where there are not as many.
    """
    if teacher.topk is None:
        log_probs = F.log_softmax(at_least_float32(teacher.logits) / check_temperature(temperature), dim=-1)
        values, ids = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
        return values, ids
    stored = teacher.topk
    exact = bool(stored.log_rests) or stored.ids.shape[-1] == stored.classes
    known = stored.at(temperature) if exact else at_least_float32(stored.log_probs)
    values, places = known.topk(min(k, known.shape[-1]), dim=-1)
    return (values if exact else soften_topk(values, temperature)), stored.ids.gather(-1, places)


def soften_topk(log_probs: Tensor, temperature: float) -> Tensor:
    """Map log-probabilities (rows, k) at T = 1 → at T, with the mass of all other classes taken for that of one.

    That is not what softening the full distribution gives, where the other classes gain more: they are many.
    """
    known = at_least_float32(log_probs) / check_temperature(temperature)
    rest = log_rest(log_probs) / temperature
    return known - torch.logsumexp(torch.cat([known, rest], dim=-1), dim=-1, keepdim=True)


def log_rest(log_probs: Tensor) -> Tensor:
    """Return log(1 − Σ_k exp(log_probs)) (rows, 1): the mass of the classes outside the k, at least 1e-12."""
    return (1 - at_least_float32(log_probs).exp().sum(-1, keepdim=True)).clamp(min=1e-12).log()


def log_others(student_logits: Tensor, ids: Tensor) -> Tensor:
    """Return log Σ exp(z) (rows, 1) over the classes outside ``ids`` (rows, k), one or more of them."""
    return student_logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
