"""Batches of token rows: padded, masked, with the documents of a block apart. No loop over tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.data.split import mix
from kd.data.text.store import Tokens
from kd.losses.base import UNLABELLED


@dataclass(frozen=True)
class Special:
    """Ids that the tokenizer gives a meaning: of ``pad``, of ``mask`` (None: it has none), and all of them.

    ``ordinary``: (n,) the ids that stand for text, from which random replacements are drawn.
    """

    pad: int
    mask: int | None
    every: np.ndarray
    ordinary: np.ndarray

    @classmethod
    def of(cls, tokenizer: Any) -> Special:
        """Read them from a tokenizer of ``transformers``."""
        every = np.unique(np.array(tokenizer.all_special_ids, dtype=np.int64))
        ordinary = np.setdiff1d(np.array(sorted(tokenizer.get_vocab().values()), dtype=np.int64), every)
        return cls(int(tokenizer.pad_token_id), tokenizer.mask_token_id, every, ordinary)


def width_of(lengths: np.ndarray, multiple: int, most: int | None) -> int:
    """Return the number of positions of a batch: of its longest row, rounded up to a multiple, ``most`` at most."""
    longest = int(lengths.max(initial=1))
    rounded = -(-longest // multiple) * multiple
    return rounded if most is None else max(longest, min(rounded, most))


def padded(flat: np.ndarray, begin: np.ndarray, lengths: np.ndarray, width: int, pad: int) -> np.ndarray:
    """Gather rows (B, width) of a flat array, filled with ``pad``; ``begin``, ``lengths``: (B,) int64."""
    place = np.arange(width)
    real = place < lengths[:, None]
    # what lies beyond a row is read as its first number and overwritten
    found = flat[np.where(real, begin[:, None] + place, 0)] if len(flat) else np.zeros(real.shape, dtype=flat.dtype)
    return np.where(real, found, pad)


def wrapped(ids: np.ndarray, lengths: np.ndarray, before: list[int], after: list[int], pad: int) -> np.ndarray:
    """Put special tokens before and after each padded row: (B, L) to (B, L + those)."""
    count, width = ids.shape
    made = np.full((count, len(before) + width + len(after)), pad, dtype=np.int64)
    made[:, : len(before)] = before
    made[:, len(before) : len(before) + width] = ids
    for number, token in enumerate(after):
        made[np.arange(count), len(before) + lengths + number] = token
    return made


def uniform(key: int, index: np.ndarray, width: int, which: int) -> np.ndarray:
    """Return numbers (B, width) in [0, 1) that depend on the key, each row's ``index`` (B,) and the position alone."""
    with np.errstate(over="ignore"):
        rows = _mixed(index.astype(np.uint64) ^ np.uint64(key))
        places = np.arange(width, dtype=np.uint64) * np.uint64(8) + np.uint64(which)
        return (_mixed(rows[:, None] + places) >> np.uint64(11)) / float(1 << 53)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    mixed = numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64's finaliser
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def masked(
    ids: np.ndarray, real: np.ndarray, index: np.ndarray, share: float, special: Special, *key: object
) -> tuple[np.ndarray, np.ndarray]:
    """Choose positions to predict, as BERT does: inputs (B, L) and targets (B, L), UNLABELLED where nothing is.

    Of each row ``max(1, round(share · n))`` of its n tokens that are not special are chosen; 80 % of them become the
    mask token, 10 % a random one, 10 % stay. ``key``: seed and epoch; with ``index`` (B,) it decides alone, so that a
    row's mask does not depend on the batch that it is in. Devlin et al. 2019, appendix A.1
    """
    seed = mix(*key)
    assert special.mask is not None
    usable = real & ~np.isin(ids, special.every)
    draws = np.where(usable, uniform(seed, index, ids.shape[1], 0), 2.0)
    counts = usable.sum(1)
    wanted = np.minimum(counts, np.maximum(1, np.floor(share * counts + 0.5))).astype(np.int64)
    rank = np.empty(ids.shape, dtype=np.int64)
    np.put_along_axis(rank, draws.argsort(1, kind="stable"), np.broadcast_to(np.arange(ids.shape[1]), ids.shape), 1)
    chosen = rank < wanted[:, None]
    fate = uniform(seed, index, ids.shape[1], 1)
    drawn = (uniform(seed, index, ids.shape[1], 2) * len(special.ordinary)).astype(np.int64)
    inputs = np.where(chosen & (fate < 0.8), special.mask, ids)
    inputs = np.where(chosen & (fate >= 0.8) & (fate < 0.9), special.ordinary[drawn], inputs)
    return inputs, np.where(chosen, ids, UNLABELLED)


def documents_apart(first: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Return what keeps the documents of a block apart: positions (B, L) that restart, and a causal mask.

    ``first``: (B, L) bool, whether a document begins there. The mask is (B, 1, L, L) float32, 0 where a position may
    attend, the least finite number elsewhere, as ``transformers`` takes it for every kind of attention; a pad attends
    to itself alone, so that no row is without any.
    """
    place = np.broadcast_to(np.arange(first.shape[1]), first.shape)
    begun = np.maximum.accumulate(np.where(first, place, 0), axis=1)
    document = np.where(real, begun, -1)
    allowed = (document[:, :, None] == document[:, None, :]) & (place[:, :, None] >= place[:, None, :])
    allowed &= real[:, :, None]
    allowed |= np.eye(first.shape[1], dtype=bool)
    mask = torch.zeros(allowed.shape, dtype=torch.float32)
    mask.masked_fill_(~torch.from_numpy(allowed), torch.finfo(torch.float32).min)
    return np.where(real, place - begun, 0), mask.unsqueeze(1)


def first_tokens(tokens: Tokens, begin: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """Tell for each position (B, width) of rows of the stream whether a document begins there."""
    where = begin[:, None] + np.arange(width)
    place = np.searchsorted(tokens.offsets, where)
    starts = tokens.offsets[np.minimum(place, len(tokens.offsets) - 1)] == where
    return starts & (np.arange(width) < lengths[:, None])
