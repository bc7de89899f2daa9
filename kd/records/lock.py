"""Locks on files that fall with the process that holds them, and which process that is. No torch."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

RUN = "run.lock"  # of a run directory, held by the process that trains in it
# Linux's locks of an open file can be queried; elsewhere a reader has to take one for some microseconds
QUERIED = hasattr(fcntl, "F_OFD_GETLK") and struct.calcsize("P") == 8
PATIENCE = 0.0 if QUERIED else 2.0  # seconds: a trainer has the lock until it ends, such a reader for a moment


@contextmanager
def held(file: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock on a file, which is made where it is missing.

    ``BlockingIOError``: another process has held it for ``patience`` seconds; ``OSError`` as of ``open``.
    """
    with file.open("a") as handle:
        deadline = time.monotonic() + patience
        while True:
            try:
                _take(handle)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
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
        if QUERIED:
            found = fcntl.fcntl(handle, fcntl.F_OFD_GETLK, _whole_file(fcntl.F_RDLCK))
            return bool(struct.unpack(LAYOUT, found)[0] != fcntl.F_UNLCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _take(handle: IO[str]) -> None:
    if QUERIED:
        fcntl.fcntl(handle, fcntl.F_OFD_SETLK, _whole_file(fcntl.F_WRLCK))
    else:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


LAYOUT = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length (0: all), process (0: of an open file)


def _whole_file(kind: int) -> bytes:
    return struct.pack(LAYOUT, kind, 0, 0, 0, 0)


def this_process() -> dict[str, Any]:
    """Describe this process, for the record of a run: a lock goes with its file, when that is deleted or moved."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())}


def alive(process: Any) -> bool:
    """Tell whether another process than this one, written down by :func:`this_process`, lives on this host.

    False where that is not known, as of other hosts and without ``/proc``.
    """
    if not isinstance(process, dict) or process.get("host") != socket.gethostname():
        return False
    pid, began = process.get("pid"), process.get("began")
    return pid != os.getpid() and began is not None and began == _began(pid)


def _began(pid: Any) -> int | None:
    """Say when a process began, in ticks since the machine did: numbers of processes come again. None of a dead one."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(numbers[18]) if state not in "ZX" else None
    except (OSError, ValueError, IndexError):
        return None
