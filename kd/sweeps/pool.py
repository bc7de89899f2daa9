"""Jobs in fresh processes, forked from this one after it has imported everything: isolation at the price of none.

This process must never touch a GPU nor start torch's threads: children of such a process hang.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from kd.errors import KdError
from kd.parallel.launch import interruptible

TICK = 1.0  # seconds
Call = Callable[[int], Any]
"""What a child runs; it is given its slot, 0 to the number of jobs at once - 1."""


def forked(
    calls: Sequence[Call], at_once: int, tick: Callable[[Sequence[int]], None] | None = None
) -> Iterator[tuple[int, int]]:
    """Run each call in a process of its own, ``at_once`` at a time; yields (position, exit code) as they end.

    ``tick``: called about once a second with the positions of those that run.

    A negative code is the signal that killed the child. When this process is interrupted, so are the children; when it
    is killed, they die with it.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(enumerate(calls))[::-1]
    free = list(range(at_once))[::-1]
    running: dict[Any, tuple[int, int, BaseProcess]] = {}
    with interruptible():
        try:
            while waiting or running:
                while waiting and free:
                    position, call = waiting.pop()
                    slot = free.pop()
                    sys.stdout.flush()
                    sys.stderr.flush()
                    process: BaseProcess = context.Process(target=_child, args=(call, slot))
                    process.start()
                    running[process.sentinel] = (position, slot, process)
                ended = wait(list(running), None if tick is None else TICK)
                if tick is not None and not ended:
                    tick([position for position, _, _ in running.values()])
                for sentinel in ended:
                    position, slot, process = running.pop(sentinel)
                    process.join()
                    free.append(slot)
                    yield position, process.exitcode or 0
        finally:
            _interrupt([process for _, _, process in running.values()])


def run_in_subprocess(call: Callable[[], Any]) -> Any:
    """Call a function in a process of its own and return what it returns; this process stays without torch threads.

    What it raises becomes a ``KdError`` with that sentence.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def answer(_: int) -> None:
        try:
            there.send((call(), None))
        except Exception as error:
            there.send((None, str(error) or type(error).__name__))

    process = context.Process(target=_child, args=(answer, 0))
    process.start()
    there.close()
    try:
        value, error = here.recv()
    except EOFError:
        process.join()
        raise KdError(f"the process that was to find out ended with exit code {process.exitcode}") from None
    except KeyboardInterrupt:
        _interrupt([process])
        raise
    process.join()
    if error is not None:
        raise KdError(error)
    return value


def preload() -> None:
    """Import what every job needs, once; of the data sets' packages the slow one. No torch operation runs here."""
    import sklearn.datasets  # noqa: F401 - half of a short run on digits

    import kd.models.mlp  # start-up: torch
    import kd.run.build  # start-up: torch
    import kd.run.callbacks  # start-up: torch
    import kd.run.train  # noqa: F401 # start-up


def _child(call: Call, slot: int) -> None:
    os.setpgrp()  # Ctrl-C on a terminal reaches the parent alone and is passed on once: a second would cut the record
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with_the_parent, daemon=True).start()
    try:
        call(slot)
    except KeyboardInterrupt:
        sys.exit(130)


def _die_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _interrupt(processes: list[BaseProcess], patience: float = 20.0) -> None:
    """End processes as Ctrl-C does: a child writes its record and ends; one that does not is killed."""
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGINT)
    for process in processes:
        process.join(patience)
        if process.is_alive():
            process.kill()
            process.join()
