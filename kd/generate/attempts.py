"""The attempts that a server fails: the first of each kind is logged at once, all are counted. No torch."""

from __future__ import annotations

import logging
import threading

from kd.errors import KdError

log = logging.getLogger(__name__)

FIRST = 3  # answers of a run: when all of them have another form than the protocol's, no later one is expected to


class Attempts:
    """Counts over all threads.

    ``again``: attempts that were followed by another one, by kind of failure; ``answered``: the server has answered as
    the protocol says, in this run or before.
    """

    def __init__(self, answered: bool = False) -> None:
        self.again: dict[str, int] = {}
        self.answered = answered
        self._of_another_form = 0
        self._lock = threading.Lock()

    def failed(self, row: int, reason: str, number: int, retries: int) -> None:
        """Count an attempt that failed and is followed by the ``number``-th of ``retries``; log the first of a kind."""
        kind = reason.partition(":")[0]
        with self._lock:
            self.again[kind] = self.again.get(kind, 0) + 1
            first = self.again[kind] == 1
        if first:
            log.warning("row %s: %s; trying again %s/%s (further ones are counted)", row, reason, number, retries)

    def of_another_form(self, server: str, reason: str) -> None:
        """Count an answer that is no completion and no error. ``KdError`` when the first ones of a run are all so."""
        with self._lock:
            self._of_another_form += 1
            hopeless = self._of_another_form >= FIRST and not self.answered
        if hopeless:
            raise KdError(
                f"server = {server} sends something else than OpenAI's chat completions in its first {FIRST} answers, "
                f"the last time: {reason}"
            )
