"""Log-probabilities that ``kd generate logprobs=K`` has stored beside a teacher's texts, read in its place."""

from __future__ import annotations

import itertools
import logging
import math
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.data.text.dialogues import Dialogue
from kd.data.text.lm import Documents
from kd.data.text.records import LATE, Undecoded
from kd.data.text.store import Tokens
from kd.data.text.teacher_tokens import bytes_of_tokens, token_bytes
from kd.distill.answers import Answers
from kd.distill.cache_key import index_of
from kd.errors import KdError
from kd.losses.base import Batch, Output, TopK
from kd.tasks.base import Want

log = logging.getLogger(__name__)

SURE = 0.99  # probability of a token that the teacher wrote and of which nothing is stored
LEAST = -60.0  # log-probabilities below it say "none" (servers write −9999), and would be all that a reverse KL sees
SLIGHTLY = 1e-3  # above 0: rounded
REST = 1e-6  # probability of the tokens that are not stored, at least: servers round
TOKEN_ID = re.compile(r"token_id:(\d+)")
ALIGNED = 0.5  # of the tokens that a server tells something of: with fewer in common the tokenizer is another one
DOUBTFUL = 0.05  # of these tokens: more are worth a warning
ROUNDED = 0.01  # probability above 1 of all candidates together

Known = list[tuple[int, float]]
"""Ids with log-probabilities, each id once."""


class StoredLogprobs(Answers):
    """``teacher.answers={_target_: kd.distill.stored_logprobs.StoredLogprobs}``: the teacher is known by a file alone.

    For a teacher behind a server: ``kd generate … logprobs=20`` has stored, beside each token of its texts, the
    likeliest ones. With ``data=lm data.train=FILE`` on the same texts these are ``Output.topk`` of the tokens to be
    predicted; what is stored is at T = 1. The student's tokenizer must be the teacher's.

    ``file``: with the columns of ``kd generate``; None: the data's own training set. Its rows are found by their
    tokens.

    A token of the file counts where one of the student's stands for the same bytes at the same place; candidates that
    are no entry of the vocabulary are left to the rest, which is spread over all other entries evenly. Where the text
    was divided otherwise, and at an end of which the server told nothing, the token that was written has ``SURE``: a
    label, and no answer of the teacher, which may have found it unlikely. How many these are is logged, from
    ``DOUBTFUL`` on as a warning.

    On validation and test there is no teacher. ``KdError`` where the file has no such column, where its tokens are
    another tokenizer's, and where it lacks a training row.
    """

    cache = whole_samples = True

    def __init__(self, teacher: Any, data: Any, *, file: Any = None) -> None:
        super().__init__()
        if teacher is not None:
            raise KdError(
                "teacher.answers reads what a teacher has written, and there is a live one: leave teacher.checkpoint "
                "and teacher.model out"
            )
        own = getattr(data, "own", data)
        if isinstance(own, Documents):
            own.setup()
        if not isinstance(own, Documents) or own.masking is not None or own.packing or own.for_teacher is not own:
            raise KdError(
                "teacher.answers reads log-probabilities of tokens: it needs data=lm with prompts and completions, and "
                "no data.masking, data.packing or data.teacher_tokenizer"
            )
        if own.spec is None or isinstance(own.spec, Mapping):
            raise KdError(
                "teacher.answers reads tokens of the teacher's tokenizer, and data.tokenizer trains one on the texts: "
                "set data.tokenizer to the teacher's, a name or a folder"
            )
        self._classes = len(own.tokenizer)
        self._read(own, file)

    def answer(self, batch: Batch, want: Want) -> Output:
        """Return what is stored for a batch of training."""
        if want.input_gradient:
            raise KdError("teacher.answers keeps no graph, and a term reads the gradient of the inputs: set it to null")
        if not want.logits:
            return Output()
        if "own_text" in batch.extra:
            raise KdError("teacher.answers knows the texts of its file, and not what the student writes")
        samples = np.searchsorted(self._index, index_of(batch).cpu().numpy())
        first, counts = self._begin[samples], self._begin[samples + 1] - self._begin[samples]
        ends = np.cumsum(counts)
        if batch.targets is None or ends[-1] != len(batch.targets):
            raise KdError("teacher.answers knows the tokens to be predicted of data=lm, this batch has other rows")
        rows = torch.from_numpy(np.arange(ends[-1]) + np.repeat(first - (ends - counts), counts))
        ids, log_probs, rests = (part[rows].to(batch.device) for part in (self._ids, self._log_probs, self._rests))
        return Output(topk=TopK(ids.long(), log_probs, self._classes, {1.0: rests}))

    # ------------------------------------------------------------------ reading

    def _read(self, data: Documents, file: Any) -> None:
        """Read what is stored of each token to be predicted, row after row of the training set."""
        try:
            records, texts, tokens = data.encoded("train", file)
        except KdError as error:
            raise KdError(
                str(error).replace("data.train", "data.train" if file is None else "teacher.answers.file")
            ) from None
        if LATE not in records.columns:
            raise KdError(
                f"{records.where} has no column logprobs: kd generate stores them beside its texts with logprobs=20"
            )
        assert data.most is not None
        assert tokens.bytes is not None
        ranges = ((n, slice(b, min(e, b + data.most))) for n, (b, e) in reversed(_ranges(tokens.offsets)))
        place = {_key(tokens, span): number for number, span in ranges}
        vocabulary, train = Vocabulary(data.tokenizer), data.parts["train"]
        order = np.argsort(train.index.numpy(), kind="stable")
        known, counts, told, aligned = Packed(), [], 0, 0
        for row in order.tolist():
            begin, end = int(train.begin[row]), int(train.end[row])
            ids = np.asarray(train.tokens.ids[begin:end])
            if (number := place.get(_key(train.tokens, slice(begin, end)))) is None:
                raise KdError(f"{records.where} lacks a training row: {data.tokenizer.decode(ids.tolist())[:80]!r} …")
            sizes = tokens.bytes[tokens.offsets[number] :][: len(ids)].tolist()
            stored = records.columns[LATE][number]
            stored = stored.value() if isinstance(stored, Undecoded) else stored
            try:
                found = vocabulary.align(stored, texts[number], ids.tolist(), sizes)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError):
                raise KdError(
                    f"{records.row(number)}: logprobs must be null or a list of {{token, logprob, top: [[token, "
                    "logprob], …]}, none above 0, probabilities together at most 1, as kd generate writes them"
                ) from None
            due = np.flatnonzero(train.tokens.supervised[begin:end])
            due = due[due > 0]  # the first token of a row is not predicted
            counts.append(len(due))
            aligned += sum(n in found for n in due.tolist())
            told += 0 if not stored else sum(n in found or ids[n] not in vocabulary.special for n in due.tolist())
            for n in due.tolist():
                known.add(found.get(n) or [(int(ids[n]), math.log(SURE))])
        _judge(records.where, known, told, aligned)
        self._index, self._begin = train.index.numpy()[order], np.concatenate([[0], np.cumsum(counts)])
        self._ids, self._log_probs, self._rests = known.tensors(self._classes)


def _judge(where: str, known: Packed, told: int, aligned: int) -> None:
    """Refuse, or say, what a file does not know. ``told``: tokens that it tells something of; ``aligned``: found."""
    if not told:
        raise KdError(f"{where} has no log-probabilities of the training rows: the server gave none")
    if aligned < ALIGNED * told:
        raise KdError(
            f"{where}: of {told:,} tokens to be predicted {aligned:,} have a log-probability of the same bytes in "
            "data.tokenizer: it must be the teacher's, the texts those that it wrote, and what is stored all of them"
        )
    if aligned < len(known):
        log.log(
            logging.WARNING if aligned < (1 - DOUBTFUL) * told else logging.INFO,
            "%s has nothing on %s of %s tokens (ends of texts, and where they were divided otherwise): what was "
            "written is the target there",
            *(where, f"{len(known) - aligned:,}", f"{len(known):,}"),
        )
    alone = sum(count < 2 for count in known.counts) - (len(known) - aligned)
    if alone > DOUBTFUL * aligned:
        log.warning(
            "%s has no candidate of the vocabulary beside the token that was written for %s of %s tokens: the server "
            "gave none (top_logprobs), or they are another vocabulary's",
            *(where, f"{alone:,}", f"{aligned:,}"),
        )


class Vocabulary:
    """A student's vocabulary by the bytes that its entries stand for; special ones are as they are spelled."""

    def __init__(self, tokenizer: Any) -> None:
        numbers = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
        spelled = {number: str(tokenizer.convert_ids_to_tokens(number)).encode() for number in numbers}
        self.special = frozenset(tokenizer.all_special_ids)
        self.raw: dict[int, bytes] = {**spelled, **bytes_of_tokens(tokenizer)}
        self.ids = {**token_bytes(tokenizer), **{self.raw[number]: number for number in sorted(numbers, reverse=True)}}

    def align(self, stored: Any, row: Dialogue, ids: Sequence[int], sizes: Sequence[int]) -> dict[int, Known]:
        """Return what is stored of each token of a row, by its place, where the teacher's one is the same bytes.

        ``stored``: the row's ``logprobs``, of its last answer; ``ids`` (n,), ``sizes`` (n,): the student's tokens, and
        their bytes in the row's text.
        """
        if stored is None or not row.answers or row.answers[-1][0] < 0:
            return {}
        begin, end = row.answer_bytes()[-1]
        whole = row.text.encode("utf-8", "surrogatepass")
        said, ends = whole[begin:end], np.cumsum(sizes)
        first = int(np.searchsorted(ends, begin, side="right"))
        own, theirs = [self.raw.get(i, b"") for i in ids[first:]], [self._bytes(one) for one in stored]
        inside, after = _spans(theirs, said, _place(b"".join(theirs), said))
        mine, rest = _spans(own, said, begin - _start(own[0], whole, int(ends[first] - sizes[first])) if own else 0)
        pairs = [(number, inside[span]) for span, number in mine.items() if span in inside]
        for one, other in zip(rest, after, strict=False):  # one of them may know more of the end
            if own[one] != theirs[other]:
                break
            pairs.append((one, other))
        found = {first + one: self._known(stored[other], ids[first + one]) for one, other in pairs}
        return {number: known for number, known in found.items() if known}

    def _bytes(self, one: Mapping[str, Any]) -> bytes:
        """Return the bytes of a token; ``bytes`` are given where its text is not all of it.

        Instead of its text it may have the id that it has in the vocabulary, as vLLM writes it when it is told to.
        """
        given, text = one.get("bytes"), one["token"]
        if (number := TOKEN_ID.fullmatch(text)) is not None:
            return self.raw.get(int(number[1]), b"")
        return bytes([*given]) if given is not None else text.encode("utf-8", "surrogatepass")

    def _known(self, one: Mapping[str, Any], written: int) -> Known:
        """Return the candidates for a token that are entries of the vocabulary, and the one that was ``written``."""
        found = {written: float(one["logprob"])}
        for text, value, *raw in one.get("top") or []:
            candidate = self._bytes({"token": text, "bytes": raw[0] if raw else None})
            if (number := self.ids.get(candidate)) is not None and candidate != self.raw.get(written):
                found.setdefault(number, float(value))
        if not all(value <= SLIGHTLY for value in found.values()):  # not a number, too
            raise ValueError
        if sum(map(math.exp, found.values())) > 1 + ROUNDED:
            raise ValueError
        return [(number, value) for number, value in found.items() if value > LEAST]


def _start(word: bytes, text: bytes, place: int) -> int:
    """Find where a token begins that stands at some ``place``: it may have a space more or fewer than the text."""
    if word[:1] == b" ":
        return place - (text[place : place + 1] != b" ")
    return place + (0 if word[:1].isspace() else len(text[place:]) - len(text[place:].lstrip()))


def _place(whole: bytes, said: bytes) -> int:
    """Find where what was ``said`` begins in a ``whole`` answer: behind spaces, or behind what a model thought."""
    spaces = 0 if said[:1].isspace() else len(whole) - len(whole.lstrip())
    if whole[spaces:].startswith(said):
        return spaces
    found = whole.rfind(said)
    return found if found >= 0 else spaces


def _spans(words: Sequence[bytes], said: bytes, before: int) -> tuple[dict[tuple[int, int], int], list[int]]:
    """Return the tokens of a text by the bytes [begin, end) of it that they are, and those that come behind its end.

    ``words``: the tokens; ``before``: how many of their bytes lie before the text, below 0: of the text before them.
    Spaces, which templates and servers take away, belong to the first token; one that begins with anything else is none
    of the text. Where they are another text than what was ``said``, nothing is known from there on.
    """
    whole, left_out = b"".join(words), max(-before, 0)
    alike = (one == other for one, other in zip(whole[max(before, 0) :], said[left_out:], strict=False))
    same = left_out + sum(itertools.takewhile(bool, alike))
    found, after, end = dict[tuple[int, int], int](), [], -before
    for number, word in enumerate(words):
        begin, end = end, end + len(word)
        if begin < 0 < end and word[:-begin].strip():
            continue
        if 0 < end <= same:
            found[max(begin, 0), end] = number
        elif end > len(said) == same:
            after.append(number)
    return found, after


class Packed:
    """Candidates of many tokens in little memory: eight bytes each."""

    def __init__(self) -> None:
        self.ids, self.values, self.counts = array("i"), array("f"), array("i")

    def __len__(self) -> int:
        return len(self.counts)

    def add(self, known: Known) -> None:
        """Add the candidates of the next token."""
        self.ids.extend(number for number, _ in known)
        self.values.extend(value for _, value in known)
        self.counts.append(len(known))

    def tensors(self, classes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids (tokens, k) int32, log-probabilities (tokens, k) and the log of what is left (tokens,).

        Tokens with fewer than k are filled up with other ids, which have their even part of what is left.
        """
        rows, k = len(self), max(self.counts)
        ids, log_probs = np.zeros((rows, k), np.int32), np.zeros((rows, k), np.float32)
        rests, end = np.zeros(rows, np.float32), 0
        flat, values = np.asarray(self.ids), np.asarray(self.values)
        for row, count in enumerate(self.counts):
            begin, end = end, end + count
            left = max(1 - float(np.exp(values[begin:end]).sum()), REST)
            others, more = max(classes - count, 1), k - count
            ids[row, :count], log_probs[row, :count] = flat[begin:end], values[begin:end]
            if more:
                ids[row, count:] = list(_first(set(flat[begin:end].tolist()), more))
                log_probs[row, count:] = math.log(left / others)
            rests[row] = math.log(max(left * (others - more) / others, 1e-12))
        return torch.from_numpy(ids), torch.from_numpy(log_probs), torch.from_numpy(rests)


def _first(there: set[int], count: int) -> Iterator[int]:
    """Yield the ``count`` smallest numbers that are not ``there``."""
    number = 0
    while count:
        if number not in there:
            yield number
            count -= 1
        number += 1


def _key(tokens: Tokens, span: slice) -> tuple[bytes, bytes]:
    """Identify a row: another division into prompt and completion is another row."""
    assert tokens.supervised is not None
    return tokens.ids[span].tobytes(), tokens.supervised[span].tobytes()


def _ranges(offsets: np.ndarray) -> list[tuple[int, tuple[int, int]]]:
    return list(enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)))
