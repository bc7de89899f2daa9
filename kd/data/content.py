"""What samples are, whatever they are called: a digest of a data set, and which of its images weights have seen.

A data set of a million files is not read for it: names and sizes are taken from the listing, and of the contents a
sample is read. Folders of up to ``CONTENTS`` files, and arrays in memory, count to the last byte.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

CONTENTS = 1000  # files of a folder whose bytes go into its digest, evenly spaced in the listing
SEEN = 2048  # images whose contents are recorded with weights: of up to so many, all
READ = 4096  # test images that are compared with them, at most
HEAD = 1 << 14  # bytes of a file that tell it from others of its size, in that comparison
DIGITS = 12  # hexadecimal digits of a content that are kept


class Content(Protocol):
    """The samples of one array or folder, by position."""

    def __len__(self) -> int: ...

    def parts(self) -> Iterator[bytes | memoryview]:
        """Give what a digest is made of."""

    def sizes(self) -> np.ndarray:
        """Give a number a sample, (n,) int64, that is found without reading it and does not depend on its name."""

    def marks(self, positions: np.ndarray) -> np.ndarray:
        """Give a number (n,) int64 for each of these samples that depends on a few of its bytes."""

    def read(self, position: int) -> bytes:
        """Read one sample."""

    def head(self, position: int) -> bytes:
        """Read what tells a sample from others of its size: its bytes, of a file the first ``HEAD``."""

    def name(self, position: int) -> str:
        """Name one sample for people."""


class ArrayContent:
    """Images (n, C, H, W) uint8 in memory."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def parts(self) -> Iterator[bytes | memoryview]:
        """Give all bytes."""
        yield str(tuple(self.images.shape)).encode()
        yield self.images.contiguous().numpy().data

    def sizes(self) -> np.ndarray:
        """Give the sum of the bytes of each image."""
        return self.images.flatten(1).sum(1, dtype=torch.int64).numpy()

    def marks(self, positions: np.ndarray) -> np.ndarray:
        """Give a number made of all bytes of each image."""
        return np.array([_number(self.read(int(p))) for p in positions], dtype=np.int64)

    def read(self, position: int) -> bytes:
        """Give the bytes of one image."""
        return self.images[position].numpy().tobytes()

    head = read

    def name(self, position: int) -> str:
        """Give its position."""
        return f"number {position}"


class FileContent:
    """Files below ``folder``; ``bytes_each``: their sizes."""

    def __init__(self, folder: Path, files: Sequence[Path], bytes_each: Sequence[int]) -> None:
        self.folder, self.files = folder, files
        self.bytes_each = np.asarray(bytes_each, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def parts(self) -> Iterator[bytes | memoryview]:
        """Give the names below the folder, the sizes, and the bytes of up to ``CONTENTS`` files."""
        yield "\n".join(map(self.name, range(len(self)))).encode("utf-8", "surrogateescape")
        yield self.bytes_each.tobytes()
        for position in np.linspace(0, len(self) - 1, min(len(self), CONTENTS)).astype(int) if len(self) else ():
            yield self.read(int(position))

    def sizes(self) -> np.ndarray:
        """Give the bytes of each file."""
        return self.bytes_each

    def marks(self, positions: np.ndarray) -> np.ndarray:
        """Give a number made of the size and 64 bytes in the middle of each file."""
        return np.array([_number(self._middle(int(p))) for p in positions], dtype=np.int64)

    def _middle(self, position: int) -> bytes:
        size = int(self.bytes_each[position])
        with self.files[position].open("rb") as file:
            file.seek(max(0, size // 2 - 32))
            return str(size).encode() + file.read(64)

    def read(self, position: int) -> bytes:
        """Read one file."""
        return self.files[position].read_bytes()

    def head(self, position: int) -> bytes:
        """Read its size and the beginning of one file."""
        with self.files[position].open("rb") as file:
            return str(self.bytes_each[position]).encode() + file.read(HEAD)

    def name(self, position: int) -> str:
        """Give its path below the folder: ``CLASS/file.png``."""
        return str(self.files[position])[len(str(self.folder)) + 1 :].replace(os.sep, "/")


class Rows(NamedTuple):
    """Some samples of an array or folder: positions (n,) int64."""

    content: Content
    positions: Tensor


def digest(contents: Sequence[Content], more: bytes) -> str:
    """Hash contents and ``more`` (labels, class names) to twelve hex digits, the same wherever the data lies."""
    found = hashlib.blake2b(more)
    for content in contents:
        for part in content.parts():
            found.update(part)
    return found.hexdigest()[:DIGITS]


def seen(rows: Sequence[Rows]) -> dict[str, Any]:
    """Describe which images these are, so that others can be compared with them without the data: a few kilobytes.

    The images are put in an order that depends on their sizes alone (where many are of one size, on a few bytes of
    each), so that a file is found again under any name; of the first ``SEEN`` the contents are hashed (a bottom-k
    sketch). ``until`` is the place of the last of them.
    """
    by, keys = "size", np.concatenate([_keys(one, "size") for one in rows])
    order = np.argsort(keys, kind="stable")[:SEEN]
    if len(order) and np.count_nonzero(keys <= keys[order[-1]]) > 9 * SEEN // 8:  # uncompressed files: one size
        by, keys = "mark", np.concatenate([_keys(one, "mark") for one in rows])
        order = np.argsort(keys, kind="stable")[:SEEN]
    starts = np.cumsum([0, *(len(one.positions) for one in rows)])
    samples = set()
    for place in order:
        part = int(np.searchsorted(starts, place, side="right")) - 1
        samples.add(_hash(rows[part].content, int(rows[part].positions[place - starts[part]])))
    return {"by": by, "until": int(keys[order[-1]]) if len(order) else 0, "samples": sorted(samples)}


def overlap(recorded: Mapping[str, Any], test: Rows, own: Sequence[Rows]) -> list[str]:
    """Name the ``test`` images that are among those :func:`seen`; what is twice in ``own`` and test counts as known.

    Every image that was seen is found where all were recorded, up to ``SEEN`` of them; in larger sets as many as fall
    below ``until``. Data sets that hold an image twice (CIFAR does) have it in their own training set as well.
    """
    by, until, samples = recorded["by"], int(recorded["until"]), set(recorded["samples"])
    keys = _keys(test, by)
    leaked = _among(test, np.flatnonzero(keys <= until)[:READ], samples)
    if leaked:
        sizes = np.unique([keys[place] for place in leaked])
        for part in own:
            twice = _among(part, np.flatnonzero(np.isin(_keys(part, by), sizes))[:READ], set(leaked.values())).values()
            leaked = {place: image for place, image in leaked.items() if image not in twice}
    return [test.content.name(int(test.positions[place])) for place in leaked]


def copies(test: Rows, train: Rows) -> int:
    """Count the ``test`` images in memory that are training images as well; 0 for files, which are not read for it."""
    if not all(isinstance(rows.content, ArrayContent) for rows in (test, train)):
        return 0
    # 64 bits of each image: quicker than to find its size
    here, there = ([hash(rows.content.read(p)) for p in rows.positions.tolist()] for rows in (test, train))
    known = set(there)
    return sum(image in known for image in here)


def _among(rows: Rows, places: np.ndarray, samples: set[str]) -> dict[int, str]:
    """Map place to content, of those ``rows`` whose content is one of ``samples``."""
    read = ((int(place), _hash(rows.content, int(rows.positions[place]))) for place in places)
    return {place: image for place, image in read if image in samples}


def _keys(rows: Rows, by: str) -> np.ndarray:
    """Return the place of each row in the order, 0 to 2^53: sizes that lie close together are far apart in it."""
    positions = rows.positions.numpy()
    numbers = rows.content.sizes()[positions] if by == "size" else rows.content.marks(positions)
    mixed = numbers.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64's finaliser
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def _hash(content: Content, position: int) -> str:
    return hashlib.blake2b(content.head(position)).hexdigest()[:DIGITS]
