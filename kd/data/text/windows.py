"""Questions with long contexts as windows of tokens: the question, and a part of the context, in overlapping parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kd.data.text.encode import joined
from kd.data.text.loader import Part, TextLoader
from kd.errors import KdError
from kd.losses.base import Batch

AT_ONCE = 512  # contexts that are given to the tokenizer together
Answer = tuple[str, int]
"""A text, and the character of the context that it begins at."""


class Question(NamedTuple):
    """A question on a context, and its answers: the first is learned, any is right. ``row``: in its source, from 0."""

    text: str
    context: str
    answers: list[Answer]
    row: int


@dataclass(frozen=True)
class Windows:
    """Rows of token ids; those of window i are ``ids[offsets[i]:offsets[i + 1]]``.

    ``ids``: (tokens,) int32; ``offsets``: (windows + 1,) int64; ``types``: (tokens,) uint8, which of the two texts a
    token belongs to, None where the tokenizer gives none. ``question``: (windows,) int64, the number of the question;
    ``context``: (windows, 2) int64, the positions [begin, end) that are of the context; ``null``: (windows,) int64, the
    position that says "no answer is in this window"; ``targets``: (windows, 2) int64, the first and the last position
    of the answer. ``characters``: (tokens, 2) int32, the characters [begin, end) of the context that a token stands
    for; None where they are not wanted.
    """

    stem: ClassVar[str] = "windows"
    making: ClassVar[str] = "tokenised"

    ids: np.ndarray
    offsets: np.ndarray
    question: np.ndarray
    context: np.ndarray
    null: np.ndarray
    targets: np.ndarray
    types: np.ndarray | None = None
    characters: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def whole(self) -> bool:
        """Tell whether the arrays belong together."""
        same = all(len(array) == len(self) for array in (self.question, self.context, self.null, self.targets))
        tokens = all(one is None or len(one) == len(self.ids) for one in (self.types, self.characters))
        return same and tokens and int(self.offsets[-1]) == len(self.ids)


class _Encoded(NamedTuple):
    """A question and its whole context: ids and types of what is before, in and behind the context."""

    ids: tuple[list[int], list[int], list[int]]
    types: tuple[list[int], list[int], list[int]]
    places: np.ndarray  # (context tokens, 2), characters


def windows_of(
    tokenizer: Any,
    questions: Sequence[Question],
    length: int,
    stride: int,
    most: int,
    row: Callable[[int], str],
    characters: bool,
) -> Windows:
    """Divide contexts into windows of at most ``length`` tokens, each with its question, as BERT does.

    ``stride``: tokens of the context from the beginning of a window to that of the next one; the last window ends with
    the context. ``most``: tokens of a question, which is truncated. A window that does not hold the whole answer has
    none. ``row``: what errors call a row by its number; ``characters``: whether they are kept.

    ``KdError`` for a context, or an answer, of which the tokenizer leaves nothing.
    """
    rows: list[list[int]] = []
    types: list[list[int]] = []
    places: list[np.ndarray] = []
    facts: list[tuple[int, ...]] = []
    for number, (question, found) in enumerate(zip(questions, _encoded(tokenizer, questions, most, row), strict=True)):
        answer = _tokens_of_answer(question, found.places, row)
        before, inside, behind = found.ids
        room = length - len(before) - len(behind)
        for begin in range(0, max(1, len(inside) - room + stride), stride):
            end = min(begin + room, len(inside))
            rows.append([*before, *inside[begin:end], *behind])
            types.append([*found.types[0], *found.types[1][begin:end], *found.types[2]])
            null = _null(tokenizer, rows[-1])
            first, last = (null, null)
            if answer is not None and begin <= answer[0] and answer[1] < end:
                first, last = (len(before) + place - begin for place in answer)
            facts.append((number, len(before), len(before) + end - begin, null, first, last))
            if characters:
                around = ((len(before), len(behind)), (0, 0))
                places.append(np.pad(found.places[begin:end], around).astype(np.int32))
    ids, offsets = joined(rows)
    columns = np.array(facts, dtype=np.int64)
    with_types = "token_type_ids" in tokenizer.model_input_names
    return Windows(
        *(ids, offsets, columns[:, 0], columns[:, 1:3], columns[:, 3], columns[:, 4:6]),
        types=joined(types, np.uint8)[0] if with_types else None,
        characters=np.concatenate(places) if characters else None,
    )


def _encoded(tokenizer: Any, questions: Sequence[Question], most: int, row: Callable[[int], str]) -> Iterator[_Encoded]:
    """Tokenise questions with their contexts, nothing of which is truncated."""
    for start in range(0, len(questions), AT_ONCE):
        part = questions[start : start + AT_ONCE]
        found = tokenizer(
            [question.text for question in part],
            [question.context for question in part],
            add_special_tokens=True,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        for place, question in enumerate(part):
            sides = found.sequence_ids(place)
            if 1 not in sides:
                raise KdError(f"{row(question.row)}: the tokenizer leaves nothing of its context")
            begin, end = sides.index(1), sides.index(1) + sides.count(1)
            of_question = [i for i in range(begin) if sides[i] == 0]
            lost = set(of_question[most:])
            kept = [i for i in range(begin) if i not in lost]
            ids, types = found["input_ids"][place], found["token_type_ids"][place]
            yield _Encoded(
                ([ids[i] for i in kept], ids[begin:end], ids[end:]),
                ([types[i] for i in kept], types[begin:end], types[end:]),
                np.array(found["offset_mapping"][place][begin:end], dtype=np.int64).reshape(-1, 2),
            )


def _tokens_of_answer(question: Question, places: np.ndarray, row: Callable[[int], str]) -> tuple[int, int] | None:
    """Return the first and the last token of the context that share a character with the first answer."""
    if not question.answers:
        return None
    text, begin = question.answers[0]
    first = int(np.searchsorted(places[:, 1], begin, side="right"))
    last = int(np.searchsorted(places[:, 0], begin + len(text), side="left")) - 1
    if first > last:
        raise KdError(f"{row(question.row)}: the tokenizer leaves nothing of the answer {text!r}")
    return first, last


def _null(tokenizer: Any, row: list[int]) -> int:
    """Return the position of the token that a text is classified by, or the first one."""
    return row.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in row else 0


def special_tokens(tokenizer: Any) -> int:
    """Return how many special tokens a tokenizer adds to a question with its context."""
    ids = tokenizer("a", "a", add_special_tokens=True, verbose=False)["input_ids"]
    return len(ids) - 2 * len(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True)
class WindowPart(Part):
    """One split; its row with the ``index`` i is window i of ``windows``.

    ``asked``: by the number of a question the text of its context, and all of its answers.
    """

    windows: Windows | None = None
    asked: Sequence[tuple[str, list[str]]] = ()
    unanswerable: bool = False


class WindowLoader(TextLoader):
    """Batches of windows: targets (B, 2) int64, the first and the last position of the answer.

    ``extra["allowed"]`` (B, width) bool: the positions of the context, and ``extra["null"]`` (B,) int64, that of no
    answer, which is allowed as well; width: of the longest window that there may be.

    In val and test also ``characters`` (B, width, 2) int64, the part of the context that a token stands for; ``asked``,
    a list of the number of the question, the context and the answers of each window; ``unanswerable`` (0-d bool). All
    windows of a question are on one rank then.
    """

    part: WindowPart

    def _own(self, rank: int) -> Tensor:
        """Return the windows (n,) of a rank in val and test, in order."""
        assert self.part.windows is not None
        questions = torch.from_numpy(self.part.windows.question[self.part.index.numpy()])
        return (questions % self.world_size == rank).nonzero().flatten()

    def samples(self) -> int:
        """Count the windows that are this rank's in an epoch."""
        return super().samples() if self.train else len(self._own(self.rank))

    def __len__(self) -> int:
        """Count batches of this rank: in val and test as many on each, since a network that is sharded runs on all."""
        if self.train:
            return super().__len__()
        counts = [len(self._own(rank)) for rank in range(self.world_size)]
        return min(-(-max(counts) // self.batch_size), *counts) if self.world_size > 1 else super().__len__()

    def batches(self) -> list[Tensor]:
        """Return the windows of each batch of this rank in this epoch."""
        if self.train or self.world_size == 1:
            return super().batches()
        return list(self._own(self.rank).tensor_split(len(self))) if len(self) else []

    def batch(self, rows: Tensor) -> Batch:
        """Make a batch of these rows (B,) of the part."""
        made, windows, width = super().batch(rows), self.part.windows, self.form.most
        assert windows is not None
        assert width is not None
        assert made.index is not None
        chosen = made.index.numpy()
        context, null = windows.context[chosen], torch.from_numpy(windows.null[chosen])
        places = np.arange(width)
        inside = (places >= context[:, :1]) & (places < context[:, 1:])
        made.extra["allowed"] = torch.from_numpy(inside).scatter(1, null.unsqueeze(1), True)
        made.extra["null"] = null
        if not self.train and windows.characters is not None:
            characters = np.zeros((len(chosen), width, 2), dtype=np.int64)
            for line, window in enumerate(chosen):
                begin, end = windows.offsets[window : window + 2]
                characters[line, : end - begin] = windows.characters[begin:end]
            made.extra["characters"] = torch.from_numpy(characters)
            numbers = windows.question[chosen].tolist()
            made.extra["asked"] = [(number, *self.part.asked[number]) for number in numbers]
            made.extra["unanswerable"] = torch.tensor(self.part.unanswerable)
        return made
