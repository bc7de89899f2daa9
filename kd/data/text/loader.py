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

    ``teacher``: the same rows in the tokens of the teacher's own tokenizer, ``ends`` (tokens,) int64 then says where
    each token ends, in both of them: :func:`kd.data.text.teacher_tokens.ends_of`.
    """

    tokens: Tokens
    begin: np.ndarray
    end: np.ndarray
    targets: Tensor
    index: Tensor
    rows: Rows
    blocks: bool = False
    ends: np.ndarray | None = None
    teacher: Part | None = None

    def __len__(self) -> int:
        return len(self.begin)

    def take(self, chosen: Tensor) -> Part:
        """Return the part made of these rows (n,) int64."""
        places, rows = chosen.numpy(), self.rows
        return replace(
            self,
            begin=self.begin[places],
            end=self.end[places],
            targets=self.targets[chosen],
            index=self.index[chosen],
            rows=rows if self.blocks else rows._replace(positions=rows.positions[chosen]),
            teacher=None if self.teacher is None else self.teacher.take(chosen),
        )

    def longest_prompt(self, length: int | None = None) -> int:
        """Count the tokens of the longest prompt: the first ``length``, or None: those before the supervised ones."""
        if length is not None:
            return min(length, int((self.end - self.begin).max()))
        if self.tokens.supervised is None:
            return 0
        flags = np.asarray(self.tokens.supervised)
        return max(int(flags[begin:end].argmax()) for begin, end in zip(self.begin, self.end, strict=True))

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Give all numbers that the inputs are made of, by name: for a digest of them."""
        tokens = self.tokens  # its offsets say where a document begins, which may not see the one before
        found = {"ids": tokens.ids, "types": tokens.types, "supervised": tokens.supervised, "offsets": tokens.offsets}
        found |= {"begin": self.begin, "end": self.end}
        yield from ((name, np.asarray(array)) for name, array in found.items() if array is not None)


def part_of(tokens: Tokens, targets: Tensor, index: Tensor, rows: Rows) -> Part:
    """Make a part whose rows are those of ``tokens``."""
    return Part(tokens, np.asarray(tokens.offsets[:-1]), np.asarray(tokens.offsets[1:]), targets, index, rows)


@dataclass(frozen=True)
class Form:
    """What a row becomes.

    ``targets``: ``labels``, the class of each row; ``next``, the ids of the tokens, for a task that shifts them;
    ``masked``, those of the tokens that are masked. ``masking``: their share. ``before``, ``after``: special tokens
    round each row. ``apart``: whether documents in a block see one another. ``most``: positions, at most. ``teacher``:
    of rows in the teacher's own tokens, with the ids that are ``matched`` between both vocabularies (1, 2, m).
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
    teacher: Form | None = None
    matched: Tensor | None = None


class TextLoader(Loader):
    """Batches of a part: inputs ``input_ids`` and ``attention_mask`` (B, L) int64, padded on the right to the longest.

    In val and test ``extra["bytes"]`` (B, L) int64 says how many bytes each token stands for, where that is known.

    With a tokenizer of the teacher's own, ``views["teacher"]`` is a batch of the same samples in its tokens, both have
    ``extra["ends"]`` (B, L) int64, and ``extra["matched"]`` (1, 2, m) the ids of tokens that both vocabularies have.

    ``bucketing``: in training, groups of 50 batches are drawn anew in each epoch and sorted by length, then the batches
    are put in random order: all from (seed, epoch). Batch k of all ranks together is batch k of one process; the last
    one, of the rows that are left over, may be smaller.
    """

    def __init__(self, part: Part, batch_size: int, form: Form, *, bucketing: bool, split: str, **options: Any) -> None:
        super().__init__(part.targets, part.index, batch_size, **options)
        self.part, self.form, self.bucketing, self.split = part, form, bucketing, split
        self.lengths = part.end - part.begin

    def batches(self) -> list[Tensor]:
        """Return the rows of each batch of this rank in this epoch."""
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
        made = self._made(self.part, self.form, rows)
        if self.part.teacher is not None and self.form.teacher is not None:
            made.views["teacher"] = self._made(self.part.teacher, self.form.teacher, rows)
            made.extra["matched"] = self.form.matched
        return made

    def _made(self, part: Part, form: Form, rows: Tensor) -> Batch:
        places = rows.numpy()
        begin = part.begin[places]
        lengths = part.end[places] - begin
        more = len(form.before) + len(form.after)
        width = width_of(lengths + more, form.multiple, form.most) - more
        ids = padded(part.tokens.ids, begin, lengths, width, form.special.pad).astype(np.int64)
        if more:
            ids = wrapped(ids, lengths, list(form.before), list(form.after), form.special.pad)
        real = np.arange(width + more) < (lengths + more)[:, None]
        index = part.index[rows]
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": real.astype(np.int64)}
        if part.tokens.types is not None and form.types:
            inputs["token_type_ids"] = padded(part.tokens.types, begin, lengths, width, 0).astype(np.int64)
        targets: Any = part.targets[rows]
        if form.targets == "masked":
            inputs["input_ids"], targets = masked(
                ids, real, index.numpy(), form.masking, form.special, *self._key_of_the_mask()
            )
        elif form.targets == "next":
            targets = _next(part.tokens, form, (ids, real), (begin, lengths), inputs)
        made = {name: torch.as_tensor(array) for name, array in inputs.items()}
        numbers = {"ends": part.ends, "bytes": None if self.train else part.tokens.bytes}  # bytes: for bits a byte
        around = ((0, 0), (len(form.before), len(form.after)))
        extra = {
            name: torch.from_numpy(np.pad(padded(array, begin, lengths, width, 0).astype(np.int64), around))
            for name, array in numbers.items()
            if array is not None
        }
        return Batch(made, torch.as_tensor(targets), index, torch.from_numpy(real), extra=extra)

    def _key_of_the_mask(self) -> tuple[object, ...]:
        """Return the mask's key: in training another one in each epoch; in val and test the same one in all runs."""
        return ("mask", self.seed, self.epoch) if self.train else ("mask", self.split)


def _next(
    tokens: Tokens,
    form: Form,
    padded_rows: tuple[np.ndarray, np.ndarray],
    where: tuple[np.ndarray, np.ndarray],
    inputs: dict[str, Any],
) -> np.ndarray:
    """Return the ids that are supervised, and put what keeps documents apart among the inputs."""
    (ids, real), (begin, lengths) = padded_rows, where
    wanted = real
    if tokens.supervised is not None:
        wanted = wanted & padded(tokens.supervised, begin, lengths, ids.shape[1], 0).astype(bool)
    if form.apart:
        first = first_tokens(tokens, begin, lengths, ids.shape[1])
        inputs["position_ids"], inputs["attention_mask"] = documents_apart(first, real)
        wanted = wanted & ~first  # nothing before it is seen
    return np.where(wanted, ids, UNLABELLED)
