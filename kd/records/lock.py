"""Locks on files that fall with the process that holds them, and which process that is. No torch."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def this_process() -> dict[str, Any]:
    """This process, for the record of a run: a lock goes with its file, when that is deleted or moved."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())}


def alive(process: Any) -> bool:
    """Whether another process than this one, written down by :func:`this_process`, lives on this host.

    False where it cannot be told, as of other hosts and without ``/proc``.
    """
    if not isinstance(process, dict) or process.get("host") != socket.gethostname():
        return False
    pid, began = process.get("pid"), process.get("began")
    return pid != os.getpid() and began is not None and began == _began(pid)


def _began(pid: Any) -> int | None:
    """When a process began, in ticks since the machine did: numbers of processes come again. None of a dead one."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(numbers[18]) if state not in "ZX" else None
    except (OSError, ValueError, IndexError):
        return None
