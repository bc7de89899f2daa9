"""Prompts with completions, and dialogues, as texts of which only the answers are to be predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kd.data.text.records import Records
from kd.errors import KdError


class Dialogue(NamedTuple):
    """A text, the characters [begin, end) of it that are to be predicted, and whether the end token follows."""

    text: str
    spans: list[tuple[int, int]]
    ends: bool


def dialogues(records: Records, tokenizer: Any) -> list[Dialogue]:
    """Return the dialogues of columns ``messages``, or ``prompt`` and ``completion``.

    Of ``messages``, a list of {role, content} a row, what the assistant says is to be predicted; of a pair the
    completion, which is a text, or as the prompt a list of messages. Messages become a text by the chat template of
    the tokenizer. ``KdError`` for other columns and values, and for a tokenizer without a template.
    """
    if "messages" in records.columns:
        rows = [(messages, 0) for messages in records.columns["messages"]]
    elif {"prompt", "completion"} <= set(records.columns):
        prompts, completions = records.columns["prompt"], records.columns["completion"]
        pairs = list(zip(prompts, completions, strict=True))
        if all(isinstance(text, str) for pair in pairs for text in pair):
            return [Dialogue(p + c, [(len(p), len(p) + len(c))], True) for p, c in pairs]
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
    return [
        _rendered(messages, first, tokenizer, f"{records.where}, row {i}") for i, (messages, first) in enumerate(rows)
    ]


def _rendered(messages: Any, first: int, tokenizer: Any, where: str) -> Dialogue:
    """Render messages; what the assistant says from number ``first`` on, with its end, is to be predicted."""
    known = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not known or not all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in messages):
        raise KdError(f"{where}: messages must be a list of objects with role and content")
    spans = []
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
    return Dialogue(text, spans, False)


def _template(tokenizer: Any, messages: Sequence[Any], answering: bool, where: str) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answering)
    except Exception as error:  # whatever the template raises
        raise KdError(f"{where}: the chat template refuses the messages: {str(error).splitlines()[0]}") from None
