"""Prompts with completions, and dialogues, as texts of which only the answers are to be predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kd.data.text.encode import between
from kd.data.text.records import Records
from kd.errors import KdError

CUT_OFF = ("length", "max_tokens", "max_output_tokens")  # finish_reason, as servers write it


class Dialogue(NamedTuple):
    """A text, and the characters [begin, end) of it that are to be predicted.

    ``begins``: whether the token that begins a text comes first, which a chat template writes itself.
    ``ends``: whether the end token follows: not after a chat template, which writes its own, nor where the answer was
    cut off.
    ``answers``: of each span the characters that are not of the template, (-1, -1) where it has changed them.
    ``teacher``: the dialogue as the teacher's tokenizer writes it; None: the same.
    """

    text: str
    spans: list[tuple[int, int]]
    begins: bool
    ends: bool
    answers: list[tuple[int, int]]
    teacher: Dialogue | None = None

    def answer_bytes(self) -> list[tuple[int, int]]:
        """Return the answers as bytes of UTF-8. ``KdError`` where a template has changed one."""
        if (-1, -1) in self.answers:
            raise KdError(
                "a chat template changes what the assistant says, so that the tokens of two tokenizers cannot be "
                "compared: write prompt and completion as texts"
            )
        return [(_bytes(self.text[:begin]), _bytes(self.text[:end])) for begin, end in self.answers]


def dialogues(records: Records, tokenizer: Any) -> list[Dialogue]:
    """Return the dialogues of columns ``messages``, or ``prompt`` and ``completion``.

    Of ``messages``, a list of {role, content} a row, what the assistant says is to be predicted; of a pair the
    completion, which is a text, or as the prompt a list of messages. Messages become a text by the chat template of
    the tokenizer. Where ``finish_reason`` is one of ``CUT_OFF`` (``kd generate`` writes ``length``), the row's last
    answer was cut off: no end of it is to be predicted, and nothing of it where the template has changed it, so that it
    is not known where it ends. ``KdError`` for other columns and values, and for a tokenizer without a template.
    """
    cut = [str(reason).lower() in CUT_OFF for reason in records.columns.get("finish_reason", [None] * len(records))]
    if "messages" in records.columns:
        rows = [(messages, 0) for messages in records.columns["messages"]]
    elif {"prompt", "completion"} <= set(records.columns):
        prompts, completions = records.columns["prompt"], records.columns["completion"]
        pairs = list(zip(prompts, completions, strict=True))
        if all(isinstance(text, str) for pair in pairs for text in pair):
            spans = [[(len(p), len(p) + len(c))] for p, c in pairs]
            return [Dialogue(p + c, s, True, not off, s) for (p, c), s, off in zip(pairs, spans, cut, strict=True)]
        if not all(isinstance(part, Sequence) and not isinstance(part, str) for pair in pairs for part in pair):
            raise KdError(f"{records.where}: prompt and completion must both be texts, or both lists of messages")
        rows = [([*prompt, *completion], len(prompt)) for prompt, completion in pairs]
    else:
        there = ", ".join(records.columns)
        raise KdError(f"{records.where} must have columns text, prompt and completion, or messages: it has {there}")
    if getattr(tokenizer, "chat_template", None) is None:
        raise KdError(
            f"{records.where} has messages, and data.tokenizer has no chat template: use one that has, or "
            "write prompt and completion as texts"
        )
    found = [_rendered(messages, first, tokenizer, records.row(i)) for i, (messages, first) in enumerate(rows)]
    return [_cut(one) if off else one for one, off in zip(found, cut, strict=True)]


def answers_of(
    rows: Sequence[str | Dialogue], tokenizer: Any, packing: bool
) -> tuple[list[list[tuple[int, int]]], np.ndarray]:
    """Return the bytes of each row that are the same text for every tokenizer, and whether an end token follows it.

    Of a document they are all of it, of a dialogue its answers: prompts may be written by two chat templates.
    """
    ended = bool(between(tokenizer, False, packing)[1])
    found = [
        (row.answer_bytes(), row.ends and tokenizer.eos_token_id is not None)
        if isinstance(row, Dialogue)
        else ([(0, _bytes(row))], ended)
        for row in rows
    ]
    return [answers for answers, _ in found], np.array([closed for _, closed in found])


def _rendered(messages: Any, first: int, tokenizer: Any, where: str) -> Dialogue:
    """Render messages; what the assistant says from number ``first`` on, with its end, is to be predicted."""
    known = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not known or not all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in messages):
        raise KdError(f"{where}: messages must be a list of objects with role and content")
    spans, answers = [], []
    text = _template(tokenizer, messages, False, where)
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number >= first:
            before = _template(tokenizer, messages[:number], True, where)
            after = _template(tokenizer, messages[: number + 1], False, where)
            if not after.startswith(before) or not text.startswith(after.rstrip()):
                raise KdError(
                    f"{where}: the chat template writes a dialogue otherwise once it goes on, so that it is not known "
                    "what the assistant says: write prompt and completion as texts"
                )
            spans.append((len(before), len(after.rstrip())))
            said = message["content"].strip() if isinstance(message["content"], str) else None
            place = -1 if said is None else text.find(said, *spans[-1])
            answers.append((place, place + len(said)) if said is not None and place >= 0 else (-1, -1))
    return Dialogue(text, spans, False, False, answers)


def _cut(whole: Dialogue) -> Dialogue:
    """Leave what a template writes behind the last answer out of what is to be predicted.

    Where the template has changed that answer, all of it is left out: its end is not known.
    """
    *spans, (begin, _) = whole.spans or [(0, 0)]
    end = whole.answers[-1][1] if whole.answers else -1
    return whole._replace(spans=spans if end < 0 else [*spans, (begin, end)])


def _template(tokenizer: Any, messages: Sequence[Any], answering: bool, where: str) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answering)
    except Exception as error:  # whatever the template raises
        raise KdError(f"{where}: the chat template refuses the messages: {str(error).splitlines()[0]}") from None


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
