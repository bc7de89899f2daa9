"""What losses that read the label share: rows with a label, and a distribution split at it."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.losses.base import UNLABELLED


def labels_of(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the label of each row, 0 where it is withheld, and whether there is one: (rows,) int64, (rows,) bool.

    ``ValueError`` for shares of classes: what is split at the label needs one label a row.
    """
    if targets.is_floating_point():
        raise ValueError("targets are shares of several classes, and this loss needs one label a row: set data.mixup=0")
    return targets.clamp(min=0), targets != UNLABELLED


def mean_over_labelled(per_row: Tensor, labelled: Tensor) -> Tensor:
    """Average over the rows with a label; exactly 0, with zero gradient, when there is none. No synchronisation."""
    return torch.where(labelled, per_row, 0).sum() / labelled.sum().clamp(min=1)


def split_at(scaled_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Split softmax(z) at the label y: log-probabilities of {y, not y} and of the other classes among themselves.

    ``scaled_logits`` (…, classes), ``labels`` (…) int64 → (…, 2) and (…, classes); the second one is 0 in the place of
    the label, which adds nothing to a KL and to a cross-entropy over it. In log space: finite for logits 10⁴ apart.
    """
    place = labels.unsqueeze(-1)
    of_label = scaled_logits.gather(-1, place)
    others = scaled_logits.scatter(-1, place, -torch.inf)
    of_others = others.logsumexp(-1, keepdim=True)
    whole = torch.logaddexp(of_label, of_others)
    binary = torch.cat([of_label - whole, of_others - whole], dim=-1)
    return binary, (others - of_others).scatter(-1, place, 0.0)
