"""Locks on files that fall with the process that holds them. No torch."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RUN = "run.lock"  # of a run directory, held by the process that trains in it
PATIENCE = 2.0  # seconds: a reader has the lock for some microseconds, a trainer until it ends


@contextmanager
def held(file: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock on a file, which is made where it is missing.

    ``BlockingIOError``: another process has held it for ``patience`` seconds; ``OSError`` as of ``open``.
    """
    with file.open("a") as handle:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        yield


def busy(file: Path) -> bool:
    """Tell whether a process, perhaps on another node, holds the lock on a file."""
    try:
        handle = file.open()
    except OSError:
        return False
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
