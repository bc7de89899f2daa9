"""Jobs on several threads, of which none that was finished is lost when the run ends. No torch."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

GRACE = 0.5  # seconds that jobs under way have when the run is interrupted: what a server has sent is not lost
POLL = 0.1

Job = TypeVar("Job")
Result = TypeVar("Result")


class Stopped(Exception):
    """The run ends: a request that has not been sent is not sent any more."""


class Failed(Exception):
    """There is no completion of a prompt. ``wasted``: what the attempts cost; ``of_the_server``: not of the prompt."""

    def __init__(self, reason: str, wasted: float = 0.0, of_the_server: bool = True) -> None:
        super().__init__(reason)
        self.wasted, self.of_the_server = wasted, of_the_server


class GivenUp(Failed):
    """The run was interrupted, and the job did not end within the grace: it may still be under way at the server."""


def asked(
    ask: Callable[[Job], Result],
    jobs: Iterable[Job],
    threads: int,
    stop: threading.Event,
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Job, Result | Failed]]:
    """Yield each job with its result or its ``Failed``, as they come.

    Once ``stop`` is set no further job begins, and those that are under way are waited for; when it is set because the
    run is ``interrupted``, for no longer than a short grace: each of the others is yielded with ``GivenUp``. Another
    error of ``ask`` sets ``stop`` and is raised after the jobs under way; a job that ends with ``Stopped`` is left out.
    """
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    under_way: dict[int, Any] = {}
    for _ in range(threads):
        threading.Thread(target=_work, args=(ask, waiting, results, under_way, stop), daemon=True).start()
    running, first = threads, None
    given_up = _given_up(under_way, interrupted)
    try:
        while running:
            try:
                item = results.get(timeout=POLL)
            except queue.Empty:
                for job in next(given_up):
                    running -= 1
                    yield job, GivenUp("the run was interrupted before the answer came", of_the_server=False)
                continue
            if item is None:
                running -= 1
            elif isinstance(item[1], Failed) or not isinstance(item[1], BaseException):
                yield item
            else:
                first = first or item[1]
    except BaseException:  # of the reader
        stop.set()
        raise
    if first is not None:
        raise first


def _given_up(under_way: dict[int, Any], interrupted: Callable[[], bool]) -> Iterator[list[Any]]:
    """Yield the jobs that are not waited for any more: none until the grace after an interruption is over."""
    while not interrupted():
        yield []
    until = time.monotonic() + GRACE
    while time.monotonic() < until:
        yield []
    while True:
        yield [job for number in list(under_way) if (job := under_way.pop(number, None)) is not None]


def _work(ask: Callable[[Any], Any], waiting: Any, results: Any, under_way: dict[int, Any], stop: Any) -> None:
    """Do jobs until there is none, put each with what came out, and None at the end.

    A job is taken out of ``under_way`` either here, when it is done, or by the reader, who does not wait for it then.
    """
    number = threading.get_ident()
    while not stop.is_set():
        try:
            job = waiting.get_nowait()
        except queue.Empty:
            break
        under_way[number] = job
        found = None
        try:
            found = ask(job)
        except Stopped:
            pass
        except Failed as error:
            found = error
        except BaseException as error:
            stop.set()
            found = error
        if under_way.pop(number, None) is None:
            return
        if found is not None:
            results.put((job, found))
    results.put(None)
