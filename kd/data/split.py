"""Stratified, seeded splits that leave the global random state alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def mix(*parts: object) -> int:
    """Make a 63-bit seed of all ``parts``: (seed, epoch) pairs never collide as ``seed + epoch`` would."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def hashed(*parts: object) -> float:
    """Return a number in [0, 1) that looks drawn by chance and depends on ``parts`` alone."""
    return mix(*parts) / 2**63


def generator(*parts: object) -> torch.Generator:
    """Make a CPU generator seeded with :func:`mix` of ``parts``."""
    return torch.Generator().manual_seed(mix(*parts))


def round_half_up(value: float) -> int:
    """Round to the nearest integer; halves go up."""
    return int(value + 0.5)


def allocate(counts: list[int], total: int, minimum: int = 0) -> list[int]:
    """Share ``total`` out in proportion to ``counts`` by largest remainders, each share at most its count.

    Every class that has a sample gets at least ``minimum``, even where the sum then exceeds ``total``.
    """
    whole = sum(counts)
    quotas = [count * total / whole if whole else 0.0 for count in counts]
    shares = [max(int(quota), min(minimum, count)) for quota, count in zip(quotas, counts, strict=True)]
    by_remainder = sorted(range(len(counts)), key=lambda c: int(quotas[c]) - quotas[c])
    for c in by_remainder:
        if sum(shares) < total and shares[c] <= quotas[c] and shares[c] < counts[c]:
            shares[c] += 1
    while sum(shares) > total and max(shares) > minimum:  # the minimum took from the largest
        shares[max(range(len(shares)), key=shares.__getitem__)] -= 1
    return shares


def stratified(targets: Tensor, total: int, *key: object, minimum: int = 0) -> tuple[Tensor, Tensor]:
    """Return positions of about ``total`` samples, drawn class by class, and the positions of the rest; both sorted.

    ``targets``: (n,) int64, 0 or more. ``key``: seed and purpose; the same arguments always give the same split.
    """
    order = torch.randperm(len(targets), generator=generator(*key))
    counts = torch.bincount(targets).tolist()
    chosen = torch.zeros(len(targets), dtype=torch.bool)
    for label, share in enumerate(allocate(counts, total, minimum)):
        chosen[order[targets[order] == label][:share]] = True
    return chosen.nonzero().flatten(), (~chosen).nonzero().flatten()
