"""Let the memory allocator of a Linux process keep what tensors leave. No torch."""

from __future__ import annotations

import ctypes
import os
import sys

# parameters of glibc's mallopt, as in its malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = -1  # a threshold that no free block at the end of the heap reaches


def keep_memory() -> bool:
    """Keep freed blocks for the next tensors, in the place of handing them back to the kernel; whether it does.

    By default glibc maps a block of 32 MiB or more anew each time that it is asked for, and the kernel clears it page
    by page: of a step over a large vocabulary that is half of the time. From now on such blocks come from the heap and
    return to it. It holds for this process and its forks; a process then stays as large as it has once been. False,
    and nothing happens, where the allocator is another one: musl, macOS, Windows, one of ``LD_PRELOAD``.
    """
    if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return False
    if "malloc" in os.environ.get("LD_PRELOAD", ""):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
