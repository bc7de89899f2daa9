"""Completions of prompts on the disk, while they are made and when they are complete. No torch.

``NAME.partial.jsonl`` beside ``NAME.jsonl`` is only appended to: the settings first, then a line for each completion
and each failure, so that a killed process loses no more than what was under way. ``NAME.settings.json`` stays: the
settings and what it took.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.config.rules import shown
from kd.errors import KdError, named
from kd.records.durable import replacing
from kd.records.lock import held

FLUSHED = 2.0  # seconds between two flushes to the disk: a power failure loses no more
Key = tuple[str, int]
"""Digest of a prompt, and which of its samples."""


@dataclass(frozen=True)
class Completion:
    """What a teacher wrote.

    ``finish_reason``: ``stop``, ``length`` (``max_new_tokens`` were not enough), or another word of a server.
    ``tokens_in``, ``tokens_out``: of the prompt and of the completion; ``estimated``: the server did not count them.
    ``cost``: of this answer, None without prices. ``logprobs``: a token each, as :func:`stored_token` writes it.
    """

    text: str
    model: str
    finish_reason: str | None
    tokens_in: int
    tokens_out: int
    estimated: bool = False
    cost: float | None = None
    logprobs: list[dict[str, Any]] | None = None

    def record(self) -> dict[str, Any]:
        """Return the line's part that is of the completion."""
        found: dict[str, Any] = {"completion": self.text, "model": self.model, "finish_reason": self.finish_reason}
        found |= {"tokens_in": self.tokens_in, "tokens_out": self.tokens_out}
        found |= {"tokens_estimated": True} if self.estimated else {}
        found |= {"cost": self.cost} if self.cost is not None else {}
        return found | ({"logprobs": self.logprobs} if self.logprobs is not None else {})


Candidate = tuple[str, float, bytes | None]
"""A token as text, its log-probability, the bytes that it stands for; None: those of the text."""


def stored_token(written: Candidate, likeliest: Iterable[Candidate]) -> dict[str, Any]:
    """Write a token with those that were the ``likeliest`` in its place: {token, logprob, top: [[token, logprob], …]}.

    ``bytes``, or a third number of ``top``, are the token's where its text is not all of it: a part of a character.
    Log-probabilities are at least −10,000: −∞ is no JSON.
    """
    (text, value, raw), *top = [
        [text, max(value, -1e4), _not_text(text, raw)] for text, value, raw in (written, *likeliest)
    ]
    found = {"token": text, "logprob": value, "top": [one if one[2] is not None else one[:2] for one in top]}
    return found if raw is None else {**found, "bytes": raw}


def _not_text(text: str, raw: bytes | None) -> list[int] | None:
    return None if raw is None or raw == text.encode() else list(raw)


class Generations:
    """The completions of one output file. Made by :func:`opened`.

    ``done``: the lines of what is there, by key; ``failed``: why others are not, where an attempt was made;
    ``wasted``: the cost of attempts without a completion.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.out, self.settings = out, dict(settings)
        self.partial, self.sidecar = partial_of(out), out.with_name(f"{out.stem}.settings.json")
        self.done: dict[Key, dict[str, Any]] = {}
        self.failed: dict[Key, str] = {}
        self.wasted = 0.0
        self._file: int | None = None
        self._flushed = time.monotonic()

    # ------------------------------------------------------------------ reading

    def read(self) -> None:
        """Read what earlier processes wrote. ``KdError`` for other settings, and for files of something else."""
        if self.out.exists():
            self._read_complete()
        whole = self._whole_lines()
        if not whole:
            return
        header = _object(whole[0])
        if header is None or not isinstance(header.get("settings"), dict):
            raise KdError(f"{self.partial} was not written by kd generate: move it away, or give another out")
        known = [_object(line) or {} for line in whole[1:]]
        if all("failed" in line and not line.get("wasted") for line in known) and header["settings"] != self.settings:
            self.partial.unlink()  # there is nothing to go on with: settings that failed may be mended
            return
        self._same(header["settings"], self.partial)
        for number, line in enumerate(whole[1:], 2):
            found = _object(line)
            if found is None:  # after a power failure: what it said is asked again
                continue
            try:
                self._take(found)
            except (KeyError, TypeError, ValueError):
                raise KdError(f"{self.partial}, line {number}, is not what kd generate writes: move it away") from None

    def _whole_lines(self) -> list[bytes]:
        """Read the lines of the partial file; one that a kill cut off is taken out of it."""
        content = self.partial.read_bytes() if self.partial.exists() else b""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self.partial.open("r+b") as file:
                file.truncate(whole)
        return content[:whole].split(b"\n")[:-1]

    def _read_complete(self) -> None:
        before = _object(self.sidecar.read_bytes()) if self.sidecar.is_file() else None
        if before is None or not isinstance(before.get("settings"), dict):
            raise KdError(f"out = {self.out} is there and was not written by kd generate: give another name")
        self._same(before["settings"], self.sidecar)
        try:
            self.wasted = float(before.get("wasted", 0.0))
            for line in self.out.read_text(encoding="utf-8").split("\n"):
                if line:
                    self._take(json.loads(line))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise KdError(f"out = {self.out} was changed since kd generate wrote it: give another name") from None

    def _take(self, line: Mapping[str, Any]) -> None:
        key = str(line["id"]), int(line.get("sample", 0))
        self.wasted += float(line.get("wasted", 0.0))
        if "failed" in line:
            self.failed[key] = str(line["failed"])
            return
        self.done[key] = {**line, "tokens_in": int(line["tokens_in"]), "tokens_out": int(line["tokens_out"])}
        self.failed.pop(key, None)

    def _same(self, before: Mapping[str, Any], where: Path) -> None:
        for name in dict.fromkeys([*self.settings, *before]):
            old, new = before.get(name), self.settings.get(name)
            if old != new:
                raise KdError(
                    f"{name} = {shown(new)} is not what the completions in {where} were made with ({shown(old)}): give "
                    "the same settings to go on, or another out"
                )

    # ------------------------------------------------------------------ writing

    def add(self, key: Key, completion: Completion, wasted: float = 0.0) -> None:
        """Append a completion; ``wasted``: the cost of attempts before it."""
        line = {"id": key[0], "sample": key[1], **completion.record()}
        self._append({**line, **({"wasted": wasted} if wasted else {})})

    def add_failure(self, key: Key, reason: str, wasted: float = 0.0) -> None:
        """Append why there is no completion; it is no completion, and asked again by the next run."""
        self._append({"id": key[0], "sample": key[1], "failed": reason, **({"wasted": wasted} if wasted else {})})

    def _append(self, line: dict[str, Any]) -> None:
        try:
            if self._file is None:
                self._file = os.open(self.partial, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                if os.fstat(self._file).st_size == 0:
                    os.write(self._file, _line({"settings": self.settings}))
            content = _line(line)
            if os.write(self._file, content) != len(content):
                raise OSError(28, "no space left on the device", str(self.partial))
            if time.monotonic() - self._flushed > FLUSHED:
                os.fsync(self._file)
                self._flushed = time.monotonic()
        except OSError as error:
            raise named(error, self.partial) from error
        self._take(line)

    def close(self) -> None:
        """Flush what was appended."""
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None

    def complete(self, rows: Iterable[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
        """Write the output file and what it took, each whole or not at all, and remove the partial file."""
        self.close()
        with replacing(self.sidecar) as temporary:
            text = json.dumps({"settings": self.settings, **about, "wasted": self.wasted}, indent=2)
            temporary.write_text(text + "\n", encoding="utf-8")
        with replacing(self.out) as temporary, temporary.open("wb") as file:
            file.writelines(_line(row) for row in rows)
        with suppress(FileNotFoundError):
            self.partial.unlink()


@contextmanager
def opened(out: Path, settings: Mapping[str, Any]) -> Iterator[Generations]:
    """Yield the completions of an output file, which no other process can write meanwhile.

    ``settings``: what decides what a teacher writes. ``KdError``: the file is being written by another process, was
    made with other settings, or is something else.
    """
    if not out.parent.is_dir():
        raise KdError(f"out = {out} cannot be written: its folder does not exist")
    guard = out.with_name(f".{out.name}.lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(held(guard))
        except BlockingIOError:
            raise KdError(f"out = {out} is being written by another process") from None
        except OSError as error:
            raise named(error, out) from error
        stack.callback(guard.unlink, missing_ok=True)
        found = Generations(out, settings)
        stack.callback(found.close)
        try:
            found.read()
        except OSError as error:
            raise named(error, out) from error
        yield found


def partial_of(out: Path) -> Path:
    """Return the file that is appended to while ``out`` is made."""
    return out.with_name(f"{out.stem}.partial.jsonl")


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def _object(text: bytes) -> dict[str, Any] | None:
    """Read a JSON object; None for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
