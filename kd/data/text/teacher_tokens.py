"""The teacher's own tokenizer: the same texts in its tokens, in rows of the same bytes as the student's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.data.text import tokenizer as tokenizers
from kd.data.text.collate import Special
from kd.data.text.store import Tokens
from kd.errors import KdError

NOWHERE = 1 << 62  # bytes that no text has
SPACE = "▁"  # SentencePiece's


@dataclass(frozen=True)
class TeacherTokenizer:
    """A tokenizer of ``transformers`` with its digest and its special ids."""

    tokenizer: Any
    digest: str
    special: Special

    def matched_to(self, student: Any) -> Tensor:
        """Return the student's and the teacher's ids (1, 2, m) of the m tokens that stand for the same bytes.

        The first dimension is no sample, so that :meth:`kd.losses.base.Batch.few` leaves it whole.
        """
        return matched_ids(student, self.tokenizer).unsqueeze(0)


def teacher_tokenizer(spec: Any, student: Any, root: str | None, length: int | None) -> TeacherTokenizer | None:
    """Return the tokenizer of a name or folder, or an object; None where it has the ``student``'s vocabulary.

    ``length``: positions of a row, which its networks must take. ``KdError`` when there is none of that name.
    """
    found, digest = tokenizers.tokenizer(spec, "bpe", lambda: [], None, root, "teacher_tokenizer")
    if same_vocabulary(student, found):
        return None
    own = tokenizers.most_tokens(found)
    if length is not None and own is not None and length > own:
        raise KdError(
            f"data.length = {length} is not allowed: the networks of data.teacher_tokenizer take {own} tokens at most"
        )
    return TeacherTokenizer(found, digest, Special.of(found))


def same_vocabulary(student: Any, teacher: Any) -> bool:
    """Tell whether two tokenizers have the same tokens under the same ids; some may be added to one of them alone."""
    one, other = student.get_vocab(), teacher.get_vocab()
    if any(other[token] != number for token, number in one.items() if token in other):
        return False
    added = {*student.get_added_vocab(), *teacher.get_added_vocab()}
    return not (one.keys() ^ other.keys()) - added


class AsTeacherSees:
    """The data of a run with the teacher's tokenizer in the place of the student's; the rest is that of ``data``."""

    restriction = None  # it is of the student's tokenizer

    def __init__(self, data: Any, own: TeacherTokenizer) -> None:
        self._data, self._special = data, own.special
        self.tokenizer, self.tokenizer_digest, self.num_classes = own.tokenizer, own.digest, len(own.tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def example(self) -> dict[str, Tensor]:
        """Return inputs of one row of full length, a batch of one, all of one ordinary token."""
        ids = torch.full((1, *self._data.input_shape), int(self._special.ordinary[0]))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# ---------------------------------------------------------------------- where tokens end


def ends_of(tokens: Tokens, answers: Sequence[Sequence[tuple[int, int]]], closed: np.ndarray) -> np.ndarray:
    """Return where each token ends (tokens,) int64, in places that do not depend on the tokenizer; never falling.

    ``answers``: of each row the bytes [begin, end) that are the same text for every tokenizer: a whole document, what
    an assistant says. ``closed``: (rows,) bool, whether an end token stands behind a row. A place is the number of
    bytes of answers read so far, in this row and the ones before it, and one more for what closes an answer: an end
    token, or what a chat template writes there. What stands between answers has the place where the next one begins.
    """
    counts = np.diff(tokens.offsets)
    rows = np.repeat(np.arange(len(counts)), counts)
    assert tokens.bytes is not None
    total = np.cumsum(tokens.bytes, dtype=np.int64)
    read = total - np.concatenate([[0], total])[np.asarray(tokens.offsets[:-1])][rows]
    sizes = np.array([1 + sum(end - begin + 1 for begin, end in spans) for spans in answers], dtype=np.int64)
    ends = (np.cumsum(sizes) - sizes)[rows]
    for number in range(max(map(len, answers), default=0)):
        spans = np.array([(spans[number] if number < len(spans) else (NOWHERE, NOWHERE)) for spans in answers])
        begin, end = spans[rows].T
        ends += np.clip(read - begin, 0, end - begin) + (read > end)
    ends[np.asarray(tokens.offsets[1:])[closed] - 1] += 1
    return ends


Rows = tuple[np.ndarray, np.ndarray]  # where each row begins and ends in the stream of tokens, (rows,) int64


def blocks_together(student: np.ndarray, teacher: np.ndarray, length: int) -> tuple[Rows, Rows, int]:
    """Cut two streams into blocks of the same text, of at most ``length`` tokens on either side.

    ``student``, ``teacher``: where tokens end, see :func:`ends_of`. A block ends where a token of both sides does, and
    begins with the token before, which is not predicted. → the rows of both sides, and how many pieces between two
    common places are left out because they are too long for a block.
    """
    common = _common(student, teacher)
    one, other = (np.searchsorted(ends, common, side="right") for ends in (student, teacher))
    found, place, lost = [], 0, 0
    while place < len(common) - 1:
        reach = (np.searchsorted(side, side[place] - 1 + length, side="right") for side in (one, other))
        last = int(min(reach)) - 1
        if last <= place:
            lost, last = lost + 1, place + 1
        else:
            found.append((one[place] - 1, one[last], other[place] - 1, other[last]))
        place = last
    begin, end, teacher_begin, teacher_end = np.array(found, dtype=np.int64).reshape(-1, 4).T
    return (begin, end), (teacher_begin, teacher_end), lost


def _common(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Return the places that both have, each once; both do not fall, so that nothing has to be sorted."""
    if not len(teacher):
        return teacher
    near = np.minimum(np.searchsorted(teacher, student), len(teacher) - 1)
    found = student[teacher[near] == student]
    return found[np.diff(found, prepend=found[:1] - 1) > 0]


def cut_together(sides: Sequence[tuple[np.ndarray, np.ndarray]], length: int) -> tuple[Rows, Rows, int]:
    """Cut rows to at most ``length`` tokens on either side, both behind the last place where a token of both ends.

    ``sides``: of the student and of the teacher offsets (rows + 1,) and where tokens end. → the rows of both, and how
    many are cut.
    """
    begins = [np.array(offsets[:-1], dtype=np.int64) for offsets, _ in sides]
    until = [np.array(offsets[1:], dtype=np.int64) for offsets, _ in sides]
    long = np.flatnonzero((until[0] - begins[0] > length) | (until[1] - begins[1] > length))
    for row in long:
        ends = [places[b[row] : u[row]] for (_, places), b, u in zip(sides, begins, until, strict=True)]
        common = _common(ends[0][:length], ends[1][:length])
        counts = [np.searchsorted(part, common, side="right") for part in ends]
        fits = np.flatnonzero((counts[0] <= length) & (counts[1] <= length))
        for side in range(2):
            until[side][row] = begins[side][row] + (counts[side][fits[-1]] if len(fits) else 0)
    return (begins[0], until[0]), (begins[1], until[1]), len(long)


# ---------------------------------------------------------------------- tokens that both vocabularies have


def matched_ids(student: Any, teacher: Any) -> Tensor:
    """Return the ids (2, m) int64 of the tokens that stand for the same bytes; the end tokens are one pair of them."""
    own, other = token_bytes(student), token_bytes(teacher)
    pairs = [(number, other[text]) for text, number in own.items() if text in other]
    if student.eos_token_id is not None and teacher.eos_token_id is not None:
        pairs.append((student.eos_token_id, teacher.eos_token_id))
    return torch.tensor(sorted(set(pairs)), dtype=torch.int64).reshape(-1, 2).T.contiguous()


def token_bytes(tokenizer: Any) -> dict[bytes, int]:
    """Return the id of each text that tokens stand for, see :func:`bytes_of_tokens`.

    Of two ids the first counts, and the byte ``<0x2E>`` only where no other token is a full stop: that is what a
    tokenizer writes.
    """
    texts = bytes_of_tokens(tokenizer)
    names = dict(zip(texts, tokenizer.convert_ids_to_tokens(list(texts)), strict=True))
    found = dict[bytes, int]()
    for number, text in sorted(texts.items(), key=lambda one: (_is_byte(names[one[0]]), one[0])):
        found.setdefault(text, number)
    return found


def _is_byte(token: str) -> bool:
    """Tell whether a token is a byte of SentencePiece's."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def bytes_of_tokens(tokenizer: Any) -> dict[int, bytes]:
    """Return what the tokens of a vocabulary stand for, a space before a word with it; special ones are left out.

    Byte-level tokens, SentencePiece's (``▁the``, ``<0x0A>``) and WordPiece's (``##ing``; a word without the mark begins
    with a space) are read; those of another kind stand for themselves. In the order of ids.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole: Mapping[str, Any] = {} if backend is None else json.loads(backend.to_str())
    kinds = json.dumps([whole.get("decoder"), whole.get("pre_tokenizer"), whole.get("model", {}).get("type")])
    letters = _byte_letters() if '"ByteLevel"' in kinds else {}
    special, found = set(tokenizer.all_special_ids), dict[int, bytes]()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        if number in special:
            continue
        if letters and all(letter in letters for letter in token):
            text = bytes(letters[letter] for letter in token)
        elif '"WordPiece"' in kinds:
            text = (token[2:] if token.startswith("##") else f" {token}").encode()
        elif _is_byte(token):
            text = bytes([int(token[3:5], 16)])
        else:
            text = token.replace(SPACE, " ").encode("utf-8", "surrogatepass")
        found[number] = text
    return found


def _byte_letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for: GPT-2's table."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
