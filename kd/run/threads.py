"""Jobs on several threads, of which none that was finished is lost when the run ends. No torch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


class Stopped(Exception):
    """The run ends: a request that has not been sent is not sent any more."""


class Failed(Exception):
    """There is no completion of a prompt. ``wasted``: what the attempts cost; ``of_the_server``: not of the prompt."""

    def __init__(self, reason: str, wasted: float = 0.0, of_the_server: bool = True) -> None:
        super().__init__(reason)
        self.wasted, self.of_the_server = wasted, of_the_server


def asked(
    ask: Callable[[Job], Result], jobs: Iterable[Job], threads: int, stop: threading.Event
) -> Iterator[tuple[Job, Result | Failed]]:
    """Yield each job with its result or its ``Failed``, as they come.

    Once ``stop`` is set no further job begins, and those that are under way are waited for. Another error of ``ask``
    sets it and is raised after them; a job that ends with ``Stopped`` is left out.
    """
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for _ in range(threads):
        threading.Thread(target=_work, args=(ask, waiting, results, stop), daemon=True).start()
    running, first = threads, None
    try:
        while running:
            item = results.get()
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


def _work(ask: Callable[[Any], Any], waiting: Any, results: Any, stop: threading.Event) -> None:
    """Do jobs until there is none, put each with what came out, and None at the end."""
    try:
        while not stop.is_set():
            job = waiting.get_nowait()
            try:
                results.put((job, ask(job)))
            except Failed as error:
                results.put((job, error))
            except Stopped:
                return
            except BaseException as error:
                stop.set()
                results.put((job, error))
    except queue.Empty:
        return
    finally:
        results.put(None)
