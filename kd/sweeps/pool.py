"""Jobs in fresh processes, forked from a server that has imported everything: isolation at the price of none.

This process needs neither torch nor a GPU for them, and may use both: nothing of it is in its children but the
environment and what they are given, which must be picklable.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from kd.errors import KdError
from kd.parallel.launch import interruptible

Call = Callable[[int], Any]
"""What a child runs; it is given its slot, 0 to the number of jobs at once - 1."""

CONTEXT = multiprocessing.get_context("forkserver")
# what every job needs; of the data sets' packages the slow one, half of a short run on digits
IMPORTED = ["sklearn.datasets", "kd.cli.main", "kd.models.mlp", "kd.run.build", "kd.run.callbacks", "kd.run.train"]


def forked(calls: Sequence[Call], at_once: int) -> Iterator[tuple[int, int]]:
    """Run each call in a process of its own, ``at_once`` at a time; yields (position, exit code) as they end.

    A negative code is the signal that killed the child. When this process is interrupted, so are the children; when it
    is killed, they die with it.
    """
    waiting = list(enumerate(calls))[::-1]
    free = list(range(at_once))[::-1]
    running: dict[Any, tuple[int, int, BaseProcess]] = {}
    with interruptible():
        try:
            while waiting or running:
                while waiting and free:
                    position, call = waiting.pop()
                    slot = free.pop()
                    process = _start(partial(call, slot))
                    running[process.sentinel] = (position, slot, process)
                for sentinel in wait(list(running)):
                    position, slot, process = running.pop(sentinel)
                    process.join()
                    free.append(slot)
                    yield position, process.exitcode or 0
        finally:
            _interrupt([process for _, _, process in running.values()])


def run_in_subprocess(call: Callable[[], Any]) -> Any:
    """Call a function in a process of its own, where torch is imported already, and return what it returns.

    What it raises becomes a ``KdError`` with that sentence.
    """
    here, there = CONTEXT.Pipe(duplex=False)
    process = _start(partial(_answer, call, there))
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
    """Start the server, which imports while this process goes on; without it the first call does."""
    CONTEXT.set_forkserver_preload(IMPORTED)
    environment = dict(os.environ)
    os.environ.update(PYTHONPATH=os.pathsep.join(sys.path), PYTHONSAFEPATH="1")  # so that it imports what we would
    # it outlives a SIGTERM to the whole process group: this process must still be able to interrupt its children
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _become(environment)


def _start(call: Callable[[], Any]) -> BaseProcess:
    preload()
    process = CONTEXT.Process(target=_child, args=(call, dict(os.environ)))
    process.start()
    return process


def _child(call: Callable[[], Any], environment: Mapping[str, str]) -> None:
    os.setpgrp()  # Ctrl-C on a terminal reaches the parent alone and is passed on once: a second would cut the record
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_die_with_the_parent, args=(os.getppid(),), daemon=True).start()
    _become(environment)
    try:
        call()
    except KeyboardInterrupt:
        sys.exit(130)


def _become(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def _answer(call: Callable[[], Any], pipe: Connection) -> None:
    try:
        pipe.send((call(), None))
    except Exception as error:
        pipe.send((None, str(error) or type(error).__name__))


def _die_with_the_parent(server: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == server and not wait([parent.sentinel], timeout=1.0):  # without it nobody knows our exit code
        pass
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
