"""From texts to token ids, by the tokenizer's own fast code, a few thousand texts at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from kd.data.text.store import Tokens

AT_ONCE = 4096  # texts that are given to the tokenizer together
PIECE = 1 << 18  # characters of a document that are tokenised as one; longer ones are cut where a line ends


def encode_texts(tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int | None) -> Tokens:
    """Tokenise texts, or pairs of them, with the tokenizer's special tokens.

    Rows of more than ``max_length`` tokens are truncated as the tokenizer does it, of a pair the longer one first.
    """
    rows, types, cut = [], [], 0
    for start in range(0, len(texts), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        ids, kinds = _encoded(tokenizer, texts[part], None if pairs is None else pairs[part])
        long = [i for i, row in enumerate(ids) if max_length is not None and len(row) > max_length]
        if long:
            second = None if pairs is None else [pairs[start + i] for i in long]
            ids_cut, kinds_cut = _encoded(tokenizer, [texts[start + i] for i in long], second, max_length)
            for i, row, kind in zip(long, ids_cut, kinds_cut, strict=True):
                ids[i], kinds[i] = row, kind
        cut += len(long)
        rows += ids
        types += kinds
    flat, offsets = joined(rows)
    with_types = pairs is not None and "token_type_ids" in tokenizer.model_input_names
    return Tokens(flat, offsets, joined(types, np.uint8)[0] if with_types else None, cut=np.array([cut]))


def _encoded(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    found = tokenizer(
        list(texts),
        None if pairs is None else list(pairs),
        add_special_tokens=True,
        truncation=max_length is not None,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=pairs is not None,
        verbose=False,
    )
    ids = list(found["input_ids"])
    return ids, list(found["token_type_ids"]) if "token_type_ids" in found else [[] for _ in ids]


def encode_documents(tokenizer: Any, documents: Sequence[str], before: Sequence[int], after: Sequence[int]) -> Tokens:
    """Tokenise documents without special tokens but those of ``before`` and ``after`` each; nothing is truncated."""
    pieces = [(number, piece) for number, document in enumerate(documents) for piece in cut(document)]
    rows: list[list[int]] = []
    sizes: list[np.ndarray] = []
    for group in _grouped(pieces):
        texts = [piece for _, piece in group]
        found = tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        rows += found["input_ids"]
        sizes += [bytes_of(text, places) for text, places in zip(texts, found["offset_mapping"], strict=True)]
    of = np.array([number for number, _ in pieces], dtype=np.int64)
    counts = np.bincount(of, [len(row) for row in rows], len(documents)).astype(np.int64)
    flat, _ = joined(rows)
    offsets = np.concatenate([[0], np.cumsum(counts + len(before) + len(after))])
    ids, counted = np.empty(offsets[-1], dtype=np.int32), np.zeros(offsets[-1], dtype=np.uint16)
    inside = np.ones(len(ids), dtype=bool)
    for place, token in chain(
        ((offsets[:-1] + i, token) for i, token in enumerate(before)),
        ((offsets[1:] - len(after) + i, token) for i, token in enumerate(after)),
    ):
        ids[place], inside[place] = token, False
    ids[inside] = flat
    counted[inside] = np.concatenate([np.zeros(0, dtype=np.uint16), *sizes])
    return Tokens(ids, offsets, bytes=counted)


def bytes_of(text: str, places: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return how many bytes of a text each token stands for, (tokens,) uint16; ``places``: its characters [begin, end).

    What lies between two tokens belongs to the second one, what follows the last one to it: the sum is the text's.
    """
    until = np.maximum.accumulate(np.fromiter((end for _, end in places), dtype=np.int64, count=len(places)))
    if not len(until):
        return np.zeros(0, dtype=np.uint16)
    until[-1] = len(text)
    if not text.isascii():
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
        until = np.concatenate([[0], np.cumsum(widths)])[until]
    return np.minimum(np.diff(until, prepend=0), np.iinfo(np.uint16).max).astype(np.uint16)


def _grouped(pieces: Sequence[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Yield pieces together, up to a number of them and of their characters."""
    group: list[tuple[int, str]] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece[1])
        if len(group) == AT_ONCE or size >= 4 * PIECE:
            yield group
            group, size = [], 0
    if group:
        yield group


def cut(document: str) -> Iterator[str]:
    """Yield a document in pieces of at most ``PIECE`` characters, cut before a line, or else before a space."""
    start = 0
    while len(document) - start > PIECE:
        end = start + PIECE
        for mark in ("\n", " "):
            place = document.rfind(mark, start + PIECE // 2, end)
            if place > 0:
                end = place
                break
        yield document[start:end]
        start = end
    yield document[start:]


def encode_spans(
    tokenizer: Any,
    texts: Sequence[str],
    spans: Sequence[Sequence[tuple[int, int]]],
    begins: Sequence[bool],
    ends: Sequence[bool],
) -> Tokens:
    """Tokenise texts of which only some characters are to be predicted.

    ``spans``: of each text the characters [begin, end) that are; ``begins``: whether the token that begins a text comes
    first, where the tokenizer has one; ``ends``: whether the end token follows, to be predicted as well. A token is
    supervised when it ends inside of a span: one that begins in the prompt and ends in the completion belongs to the
    completion.
    """
    rows: list[list[int]] = []
    marks: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    first = [tokenizer.bos_token_id] if around(tokenizer)[0] == [tokenizer.bos_token_id] else []
    for start in range(0, len(texts), AT_ONCE):
        found = tokenizer(
            list(texts[start : start + AT_ONCE]),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for number, (ids, places) in enumerate(zip(found["input_ids"], found["offset_mapping"], strict=True), start):
            until = np.array([end for _, end in places], dtype=np.int64)
            inside = np.zeros(len(ids), dtype=bool)
            for begin, end in spans[number]:
                inside |= (until > begin) & (until <= end)
            size = bytes_of(texts[number], places)
            before = first if begins[number] else []
            after = [tokenizer.eos_token_id] if ends[number] else []
            rows.append([*before, *ids, *after])
            marks.append(np.concatenate([np.zeros(len(before), dtype=bool), inside, np.ones(len(after), dtype=bool)]))
            sizes.append(np.pad(size, (len(before), len(after))))
    flat, offsets = joined(rows)
    return Tokens(flat, offsets, supervised=np.concatenate(marks), bytes=np.concatenate(sizes))


def joined(rows: Sequence[Sequence[int]], kind: Any = np.int32) -> tuple[np.ndarray, np.ndarray]:
    """Put lists one after the other: their numbers (total,), and where each begins (rows + 1,) int64."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    numbers: Iterable[int] = chain.from_iterable(rows)
    return np.fromiter(numbers, dtype=kind, count=int(offsets[-1])), offsets


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and after a text."""
    probe = list(tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    count = len(probe) - len(bare)
    first = next((i for i in range(count + 1) if probe[i : i + len(bare)] == bare), 0)
    return probe[:first], probe[first + len(bare) :]


def between(tokenizer: Any, masking: bool, packing: bool) -> tuple[list[int], list[int]]:
    """Return the ids before and after each document: its end, and what its networks expect at a beginning."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if masking:
        end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else end
        return [], [end] if packing and end is not None else []
    own, begin = around(tokenizer)[0], tokenizer.bos_token_id
    return own if own == [begin] else [], [] if end is None else [end]


def predicted(tokens: Tokens, begin: np.ndarray, end: np.ndarray, masking: bool) -> np.ndarray:
    """Return how many tokens of rows [begin, end) are predicted, (rows,): not the first one, not those of prompts."""
    if masking:
        return end - begin
    if tokens.supervised is None:
        return end - begin - 1
    until = np.concatenate([[0], np.cumsum(tokens.supervised, dtype=np.int64)])
    return until[end] - until[np.minimum(begin + 1, end)]
