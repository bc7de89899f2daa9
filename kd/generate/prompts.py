"""Prompts for a teacher: a text or messages a row, each once, and their references. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.data.text.records import Records, read_file
from kd.errors import KdError, did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool")
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file.

    ``content``: a text, or messages {role, content}; ``index``: its row, from 0; ``id``: a digest of the content;
    ``references``: the texts that an answer is compared with.
    """

    content: str | Messages
    index: int
    id: str
    references: tuple[str, ...] = ()

    def messages(self, system: str | None) -> Messages:
        """Return what a chat model is given, after the system message."""
        before = [] if system is None else [{"role": "system", "content": system}]
        own = [{"role": "user", "content": self.content}] if isinstance(self.content, str) else self.content
        return [*before, *own]

    @property
    def size(self) -> int:
        """The bytes of its texts: what tokens are estimated from."""
        texts = [self.content] if isinstance(self.content, str) else [m["content"] for m in self.content]
        return sum(len(text.encode()) for text in texts)


def read_prompts(file: Path, references: str | None = None, system: str | None = None) -> tuple[list[Prompt], int]:
    """Read the different prompts of a file in the order of their rows, and the number of rows that repeat one.

    A prompt is a row's ``prompt`` (a text, or a list of messages), or its ``messages``, without an answer at their end;
    in a .txt, a line. ``references``: a column with a text, or a list of texts, a row; those of repeated prompts are
    put together. ``KdError`` for a file that cannot be read, and for rows without a prompt.
    """
    records = _records(file)
    column = next((name for name in ("prompt", "messages", "text") if name in records.columns), None)
    if column is None:
        raise KdError(f"{file} must have a column prompt or messages: it has {', '.join(records.columns)}")
    if references is not None and references not in records.columns:
        near = did_you_mean(references, records.columns)
        raise KdError(f"references = {references} is no column of {file}{near}: it has {', '.join(records.columns)}")
    wanted = records.columns[references] if references is not None else [None] * len(records)
    found: dict[str, Prompt] = {}
    for index, (value, reference) in enumerate(zip(records.columns[column], wanted, strict=True)):
        where = records.row(index)
        if column == "text" and not str(value).strip():  # an empty line of a text file
            continue
        content = _content(value, system is not None, where)
        texts = _references(reference, where) if references is not None else ()
        name = digest(content)
        if name in found:
            before = found[name]
            texts = tuple(dict.fromkeys([*before.references, *texts]))
            found[name] = Prompt(before.content, before.index, name, texts)
        else:
            found[name] = Prompt(content, index, name, texts)
    if not found:
        raise KdError(f"prompts = {file} has no prompts")
    return list(found.values()), len(records) - len(found)


def digest(content: str | Messages) -> str:
    """Return 16 hexadecimal digits of a prompt."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def _records(file: Path) -> Records:
    if not file.is_file():
        raise KdError(f"prompts = {file}: there is no such file")
    try:
        return read_file(file, "utf-8")
    except KdError as error:
        raise KdError(f"prompts = {str(error).partition(': set data.')[0]}") from None


def _content(value: Any, with_system: bool, where: str) -> str | Messages:
    if isinstance(value, str) and value.strip():
        return _valid(value, where)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise KdError(f"{where}: the prompt is empty, or neither a text nor a list of messages")
    for message in value:
        known = isinstance(message, Mapping) and message.get("role") in ROLES
        if not known or not isinstance(message.get("content"), str):
            raise KdError(f"{where}: a message must have a role ({', '.join(ROLES)}) and a content, which is a text")
    messages = [{"role": m["role"], "content": _valid(m["content"], where)} for m in value]
    while messages and messages[-1]["role"] == "assistant":  # the answer that a teacher shall give
        messages.pop()
    if not messages:
        raise KdError(f"{where}: the messages are all of the assistant")
    if with_system and messages[0]["role"] in ROLES[:2]:
        raise KdError(f"{where}: the messages begin with a system message, and system is given as well: leave one out")
    return messages


def _references(value: Any, where: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise KdError(f"{where}: the reference must be a text, or a list of texts")
    return tuple(_valid(text, where) for text in texts)


def _valid(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write half of a pair of surrogates
        raise KdError(f"{where}: the text is not valid Unicode") from None
    return text
