"""Batches of texts, rows of about the same length together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.data.content import Rows
from kd.data.images.loader import Loader
from kd.data.split import generator
from kd.data.text.collate import Special, documents_apart, first_tokens, masked, padded, width_of, wrapped
from kd.data.text.store import Tokens
from kd.losses.base import UNLABELLED, Batch

GROUP = 50  # batches whose rows are sorted by length together: large enough for little padding, small enough for chance


@dataclass(frozen=True)
class Part:
    """One split: row i is ``tokens.ids[begin[i]:end[i]]``, with its class ``targets[i]`` and stable ``index[i]``.

    ``begin``, ``end``: (n,) int64; ``targets``, ``index``: (n,) int64 tensors; ``rows``: its texts, for their digest:
    that of each row, or, where rows are blocks of documents (``blocks``), all lines.
    """

    tokens: Tokens
    begin: np.ndarray
    end: np.ndarray
    targets: Tensor
    index: Tensor
    rows: Rows
    blocks: bool = False

    def __len__(self) -> int:
        return len(self.begin)

    def take(self, chosen: Tensor) -> Part:
        """The part made of these rows (n,) int64."""
        places, rows = chosen.numpy(), self.rows
        return replace(
            self,
            begin=self.begin[places],
            end=self.end[places],
            targets=self.targets[chosen],
            index=self.index[chosen],
            rows=rows if self.blocks else rows._replace(positions=rows.positions[chosen]),
        )


def part_of(tokens: Tokens, targets: Tensor, index: Tensor, rows: Rows) -> Part:
    """Make a part whose rows are those of ``tokens``."""
    return Part(tokens, np.asarray(tokens.offsets[:-1]), np.asarray(tokens.offsets[1:]), targets, index, rows)


@dataclass(frozen=True)
class Form:
    """What a row becomes.

    ``targets``: ``labels``, the class of each row; ``next``, the ids of the tokens, for a task that shifts them;
    ``masked``, those of the tokens that are masked. ``masking``: their share. ``before``, ``after``: special tokens
    round each row. ``apart``: whether documents in a block see one another. ``most``: positions, at most.
    """

    special: Special
    targets: str = "labels"
    masking: float = 0.0
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    apart: bool = False
    most: int | None = None
    multiple: int = 1
    types: bool = False


class TextLoader(Loader):
    """Batches of a part: inputs ``input_ids`` and ``attention_mask`` (B, L) int64, padded on the right to the longest.

    In val and test ``extra["bytes"]`` (B, L) int64 says how many bytes each token stands for, where that is known.

    ``bucketing``: in training, groups of 50 batches are drawn anew in each epoch and sorted by length, then the batches
    are put in random order: all from (seed, epoch). Batch k of all ranks together is batch k of one process; the last
    one, of the rows that are left over, may be smaller.
    """

    def __init__(self, part: Part, batch_size: int, form: Form, *, bucketing: bool, split: str, **options: Any) -> None:
        super().__init__(part.targets, part.index, batch_size, **options)
        self.part, self.form, self.bucketing, self.split = part, form, bucketing, split
        self.lengths = part.end - part.begin

    def batches(self) -> list[Tensor]:
        """The rows of each batch of this rank in this epoch."""
        if not (self.shuffle and self.bucketing):
            return super().batches()
        whole = self.batch_size * self.world_size
        random = generator(self.seed, self.epoch, "order")
        order = torch.randperm(len(self.part), generator=random)
        full = len(order) - len(order) % whole
        batches: list[Tensor] = []
        for group in order[:full].split(whole * GROUP):
            by_length = np.argsort(self.lengths[group.numpy()], kind="stable")
            batches += group[torch.from_numpy(by_length)].split(whole)
        batches = [batches[i] for i in torch.randperm(len(batches), generator=random).tolist()]
        mine = [rows[self.rank :: self.world_size] for rows in [*batches, order[full:]]]
        mine = [rows for rows in mine if len(rows)]
        if len(mine) < len(self):
            mine[-1:] = mine[-1].tensor_split(2)
        return mine[: len(self)]

    def fetch(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        """Make one batch of each tensor of rows."""
        for rows in batches:
            yield self.batch(rows)

    def batch(self, rows: Tensor) -> Batch:
        """Make a batch of these rows (B,) of the part."""
        form, places = self.form, rows.numpy()
        begin, lengths = self.part.begin[places], self.lengths[places]
        more = len(form.before) + len(form.after)
        width = width_of(lengths + more, form.multiple, form.most) - more
        ids = padded(self.part.tokens.ids, begin, lengths, width, form.special.pad).astype(np.int64)
        if more:
            ids = wrapped(ids, lengths, list(form.before), list(form.after), form.special.pad)
        real = np.arange(width + more) < (lengths + more)[:, None]
        index = self.part.index[rows]
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": real.astype(np.int64)}
        if self.part.tokens.types is not None and form.types:
            inputs["token_type_ids"] = padded(self.part.tokens.types, begin, lengths, width, 0).astype(np.int64)
        targets: Any = self.part.targets[rows]
        if form.targets == "masked":
            inputs["input_ids"], targets = masked(
                ids, real, index.numpy(), form.masking, form.special, *self._key_of_the_mask()
            )
        elif form.targets == "next":
            targets = self._next(ids, real, begin, lengths, inputs)
        made = {name: torch.as_tensor(array) for name, array in inputs.items()}
        return Batch(
            made, torch.as_tensor(targets), index, torch.from_numpy(real), extra=self._bytes(begin, lengths, width)
        )

    def _bytes(self, begin: np.ndarray, lengths: np.ndarray, width: int) -> dict[str, Tensor]:
        """Bytes (B, L) that each token stands for, for bits a byte."""
        if self.part.tokens.bytes is None or self.train:
            return {}
        found = padded(self.part.tokens.bytes, begin, lengths, width, 0).astype(np.int64)
        before, after = len(self.form.before), len(self.form.after)
        return {"bytes": torch.from_numpy(np.pad(found, ((0, 0), (before, after))))}

    def _key_of_the_mask(self) -> tuple[object, ...]:
        """In training another mask in each epoch; in val and test the same one in all runs."""
        return ("mask", self.seed, self.epoch) if self.train else ("mask", self.split)

    def _next(
        self, ids: np.ndarray, real: np.ndarray, begin: np.ndarray, lengths: np.ndarray, inputs: dict[str, Any]
    ) -> np.ndarray:
        """Return the ids that are supervised, and put what keeps documents apart among the inputs."""
        wanted = real
        if self.part.tokens.supervised is not None:
            wanted = wanted & padded(self.part.tokens.supervised, begin, lengths, ids.shape[1], 0).astype(bool)
        if self.form.apart:
            first = first_tokens(self.part.tokens, begin, lengths, ids.shape[1])
            inputs["position_ids"], inputs["attention_mask"] = documents_apart(first, real)
            wanted = wanted & ~first  # nothing before it is seen
        return np.where(wanted, ids, UNLABELLED)
