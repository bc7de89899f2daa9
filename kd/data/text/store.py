"""What texts are made into, as arrays, and its cache on the disk: whole or not at all, never code."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from kd.records.durable import mark

log = logging.getLogger(__name__)

FORM = 1  # of the files; another number is another cache
ABOUT = "about.json"


class Arrays(Protocol):
    """A dataclass of arrays. ``stem``: how its folder begins; ``making``: what is done to the texts, for messages."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    stem: ClassVar[str]
    making: ClassVar[str]

    def whole(self) -> bool:
        """Tell whether the arrays belong together."""


A = TypeVar("A", bound=Arrays)


@dataclass(frozen=True)
class Tokens:
    """Rows of token ids, one after the other; those of row i are ``ids[offsets[i]:offsets[i + 1]]``.

    ``ids``: (tokens,) int32; ``offsets``: (rows + 1,) int64; ``types``: (tokens,) uint8, which of two texts a token
    belongs to; ``supervised``: (tokens,) bool, whether it is to be predicted; ``bytes``: (tokens,) uint16, how many
    bytes of UTF-8 it stands for, those that the tokenizer leaves out before it with it; ``cut``: (1,) int64, how many
    rows were longer and are truncated. None where all is one text, all is supervised, it is not known.
    """

    stem: ClassVar[str] = "tokens"
    making: ClassVar[str] = "tokenised"

    ids: np.ndarray
    offsets: np.ndarray
    types: np.ndarray | None = None
    supervised: np.ndarray | None = None
    bytes: np.ndarray | None = None
    cut: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def truncated(self) -> int:
        """Rows that are truncated."""
        return 0 if self.cut is None else int(self.cut[0])

    def whole(self) -> bool:
        """Tell whether the arrays belong together."""
        count = len(self.ids)
        same = all(one is None or len(one) == count for one in (self.types, self.supervised, self.bytes))
        return same and len(self.offsets) > 0 and int(self.offsets[0]) == 0 and int(self.offsets[-1]) == count


@dataclass(frozen=True)
class Features:
    """A vector a text: ``values`` (texts, width) float32."""

    stem: ClassVar[str] = "features"
    making: ClassVar[str] = "encoded"

    values: np.ndarray

    def whole(self) -> bool:
        """Tell whether it is a matrix of float32."""
        return self.values.ndim == 2 and self.values.dtype == np.float32


def cached(folder: Path | None, key: str, make: Callable[[], A], kind: type[A]) -> A:
    """Return the arrays that ``make`` makes, from ``folder`` where they are there already, mapped into memory.

    ``key``: hexadecimal digits of all that decides; ``kind``: the class of the arrays. Files that are truncated,
    damaged or of another key are never used: they are made anew. Several processes may do so at once; the first one
    that is ready counts. Where nothing can be written, the arrays stay in memory.
    """
    if folder is None:
        return make()
    place = folder / f"{kind.stem}-{key}"
    found = read(place, key, kind)
    if found is not None:
        return found
    if place.exists():
        log.warning("%s is not whole: the texts are %s anew", place, kind.making)
    made = make()
    try:
        write(made, place, key)
    except OSError as error:
        log.warning("the texts are %s anew in each run, %s cannot be written: %s", kind.making, place, error.strerror)
        return made
    return read(place, key, kind) or made


def read(place: Path, key: str, kind: type[A]) -> A | None:
    """Map a cache into memory; None where it is missing, not whole, or of another ``key``."""
    try:
        about = json.loads((place / ABOUT).read_text(encoding="utf-8"))
        if about["form"] != FORM or about["key"] != key:
            return None
        arrays: dict[str, Any] = {}
        for name, wanted in about["arrays"].items():
            if name not in _names(kind):
                return None
            arrays[name] = np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if _digest(arrays[name]) != wanted:
                return None
        found = kind(**arrays)
        return found if found.whole() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write(made: Arrays, place: Path, key: str) -> None:
    """Write a cache beside its place, flush it, and move it there. ``OSError`` when that is not possible."""
    place.parent.mkdir(parents=True, exist_ok=True)
    own = mark()
    with _removed(place.with_name(f".{place.name}.{own}.tmp")) as temporary:
        temporary.mkdir()
        arrays = {n: a for n in _names(type(made)) if (a := getattr(made, n)) is not None}
        for name, array in arrays.items():
            with (temporary / f"{name}.npy").open("wb") as file:
                np.save(file, array, allow_pickle=False)
                _flush(file)
        about = {"form": FORM, "key": key, "arrays": {name: _digest(array) for name, array in arrays.items()}}
        with (temporary / ABOUT).open("w", encoding="utf-8") as text:
            json.dump(about, text)
            _flush(text)
        for _ in range(3):
            try:
                os.rename(temporary, place)
                return
            except OSError:
                if not place.exists():
                    raise
            if read(place, key, type(made)) is not None:  # another process was first
                return
            with _removed(place.with_name(f".{place.name}.{own}.old")) as old:
                os.rename(place, old)


def _names(kind: type[Arrays]) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind))


def _digest(array: np.ndarray) -> str:
    """Return a digest of form and numbers; a page at a time, so that a mapped array stays on the disk."""
    found = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=16)
    step = max(1, (1 << 22) // (array[:1].size or 1))  # rows
    for start in range(0, len(array), step):
        found.update(np.ascontiguousarray(array[start : start + step]).data)
    return found.hexdigest()


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _removed(folder: Path) -> Iterator[Path]:
    """Yield a path where nothing is, and leave nothing there."""

    def remove() -> None:
        if folder.is_file():
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)

    remove()
    try:
        yield folder
    finally:
        remove()
