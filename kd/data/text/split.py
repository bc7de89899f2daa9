"""Splits of texts in which no text is on two sides."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kd.data.split import round_half_up, stratified
from kd.errors import KdError
from kd.losses.base import UNLABELLED

log = logging.getLogger(__name__)


def carve(keys: Sequence[str], targets: Tensor, fraction: float, *seed: object) -> tuple[Tensor, Tensor]:
    """Choose the rows of a new split and those that stay: (n,) int64 positions each; stratified, equal texts together.

    ``keys``: normalised texts; ``targets`` (n,) int64 with UNLABELLED. Of a set with labels the rows without one are
    not chosen, and those that equal a chosen one are in neither.
    """
    numbers: dict[str, int] = {}
    group = torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.int64)
    label = torch.full((len(numbers),), UNLABELLED, dtype=torch.int64).scatter_reduce(0, group, targets, "amax")
    eligible = (label != UNLABELLED).nonzero().flatten()
    if not len(eligible):
        eligible, label = torch.arange(len(label)), torch.zeros_like(label)
    total = round_half_up(fraction * len(eligible))
    chosen = torch.zeros(len(label), dtype=torch.bool)
    chosen[eligible[stratified(label[eligible], total, *seed)[0]]] = True
    there = chosen[group]
    usable = there & (targets != UNLABELLED) if bool((targets != UNLABELLED).any()) else there
    return usable.nonzero().flatten(), (~there).nonzero().flatten()


def apart(keys: Mapping[str, Sequence[str]], overlap: str, what: str = "texts") -> dict[str, list[int]]:
    """Return the rows of train and val that remain when no text is in two of train, val and test.

    ``keys``: split → normalised texts; test keeps all of its rows. ``overlap``: ``remove`` the others, ``keep`` them,
    or ``refuse``. What was found is logged once; ``what``: how the rows are called.
    """
    kept = {split: list(range(len(rows))) for split, rows in keys.items()}
    found, later = {}, set(keys["test"])
    for split in ("val", "train"):
        twice = [row for row, key in enumerate(keys[split]) if key in later]
        if twice:
            found[split] = f"{len(twice):,} of {len(keys[split]):,} {what} of {split}"
        if overlap == "remove":
            lost = set(twice)
            kept[split] = [row for row in kept[split] if row not in lost]
        later |= set(keys[split])
    if not found:
        return kept
    said = f"{' and '.join(found.values())} are in {'val or test' if 'train' in found else 'test'} as well"
    if overlap == "refuse":
        raise KdError(f"{said}: remove them from the files, or set data.overlap")
    log.warning("%s and are %s", said, "left out there" if overlap == "remove" else "kept")
    return kept
