"""Texts as the contents of a data set: what they are compared by, and their digest."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np


def normalised(text: str) -> str:
    """Return a text without what makes no other text of it: case, width of characters, spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def digest_of(texts: Sequence[str], *more: object) -> str:
    """Return 16 hexadecimal digits of texts, in order, and of what else decides."""
    found = hashlib.blake2b("/".join(map(str, more)).encode(), digest_size=8)
    for text in texts:
        coded = text.encode("utf-8", "surrogatepass")
        found.update(len(coded).to_bytes(8, "big"))
        found.update(coded)
    return found.hexdigest()


class TextContent:
    """Texts in memory, as :class:`kd.data.content.Content`; equal ones are those with equal ``keys``."""

    def __init__(self, keys: Sequence[str], name: str) -> None:
        self.keys, self.called = keys, name
        self._numbers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def parts(self) -> Iterator[bytes | memoryview]:
        """Give all texts."""
        yield digest_of(self.keys).encode()

    def sizes(self) -> np.ndarray:
        """Give 63 bits of each text's digest: texts are short, so that no other number is quicker to find."""
        if self._numbers is None:
            numbers = (hashlib.blake2b(self.read(i), digest_size=8).digest() for i in range(len(self)))
            self._numbers = np.array([int.from_bytes(n, "big") >> 1 for n in numbers], dtype=np.int64)
        return self._numbers

    def marks(self, positions: np.ndarray) -> np.ndarray:
        """Give the same numbers."""
        return self.sizes()[positions]

    def read(self, position: int) -> bytes:
        """Give the bytes of one text."""
        return self.keys[position].encode("utf-8", "surrogatepass")

    head = read

    def name(self, position: int) -> str:
        """Give its number, from 1, and its beginning."""
        return f"{self.called} {position + 1} ({self.keys[position][:30]!r})"
