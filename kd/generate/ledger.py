"""What requests to a server cost, and how fast they may follow one another. No torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kd.errors import KdError
from kd.generate.threads import Stopped

BYTES_OF_A_TOKEN = 4  # of English; fewer in most other languages
MILLION = 1e6


class BudgetReached(KdError):
    """The next request would exceed the budget."""


@dataclass(frozen=True)
class Usage:
    """Tokens of requests: in prompts, in completions."""

    tokens_in: int = 0
    tokens_out: int = 0


class Ledger:
    """Counts costs over all threads, and holds requests back that would exceed the budget.

    ``price_in``, ``price_out``: of a million tokens of prompts, of completions; None: unknown, nothing is counted.
    ``budget``: in the same currency; ``spent``: of earlier processes; ``most_out``: tokens of a completion, at most.
    """

    def __init__(
        self,
        price_in: float | None = None,
        price_out: float | None = None,
        budget: float | None = None,
        spent: float = 0.0,
        most_out: int = 256,
    ) -> None:
        self.prices = None if price_in is None or price_out is None else (price_in, price_out)
        self.budget, self.spent, self.most_out = budget, spent, most_out
        self._reserved = 0.0
        self._bytes = self._in = self._out = self._answers = 0
        self._changed = threading.Condition()

    def cost(self, usage: Usage) -> float | None:
        """Return what tokens cost, None without prices."""
        if self.prices is None:
            return None
        return (usage.tokens_in * self.prices[0] + usage.tokens_out * self.prices[1]) / MILLION

    def expected(self, size: int) -> Usage:
        """Estimate the tokens of a request with a prompt of ``size`` bytes from the mean of the answers so far.

        Before the first answer it is what the request takes at most: two bytes a token, and ``most_out``.
        """
        with self._changed:
            if not self._answers:
                return Usage(-(-size // 2), self.most_out)
            return Usage(-(-size * self._in // max(1, self._bytes)), -(-self._out // self._answers))

    @contextmanager
    def reserved(self, size: int, stop: threading.Event) -> Iterator[Usage]:
        """Set aside what a request is expected to take while it is under way.

        Waits while it would exceed the budget only with the requests that are under way; raises ``BudgetReached`` when
        it would without them, ``Stopped`` when the run ends meanwhile.
        """
        with self._changed:
            while True:
                usage = self.expected(size)  # which changes while this waits
                amount = self.cost(usage) or 0.0
                if self.budget is None or self.spent + self._reserved + amount <= self.budget:
                    break
                if stop.is_set():
                    raise Stopped
                if self.spent + amount > self.budget or not self._reserved:
                    raise BudgetReached(f"the next request would exceed budget = {self.budget:g}")
                self._changed.wait(0.1)
            self._reserved += amount
        try:
            yield usage
        finally:
            with self._changed:
                self._reserved -= amount
                self._changed.notify_all()

    def settle(self, usage: Usage, size: int | None = None) -> float:
        """Add what an attempt took to what is spent; return its cost, 0 without prices.

        ``size``: bytes of the prompt, of an attempt that has a completion: the mean is taken over these.
        """
        amount = self.cost(usage) or 0.0
        with self._changed:
            self.spent += amount
            if size is not None:
                self.learn(usage, size)
            self._changed.notify_all()
        return amount

    def learn(self, usage: Usage, size: int) -> None:
        """Take what a completion took into the mean; of one that is paid already as well."""
        with self._changed:
            self._bytes += size
            self._in += usage.tokens_in
            self._out += usage.tokens_out
            self._answers += 1


class Pace:
    """Lets requests follow one another at an even rate.

    ``requests``, ``tokens``: a minute, at most; None: as fast as they come.
    """

    def __init__(self, requests: float | None = None, tokens: float | None = None) -> None:
        self.requests, self.tokens = requests, tokens
        self._next = self._until = 0.0
        self._lock = threading.Lock()

    def wait(self, tokens: int, stop: threading.Event) -> None:
        """Wait for the turn of a request of so many tokens. Raises ``Stopped`` when the run ends meanwhile."""
        apart = 60 / self.requests if self.requests else 0.0
        apart = max(apart, 60 * tokens / self.tokens if self.tokens else 0.0)
        with self._lock:
            turn = max(time.monotonic(), self._next)
            self._next = turn + apart
        while (left := max(turn, self._until) - time.monotonic()) > 0:
            if stop.wait(left):
                raise Stopped
        if stop.is_set():
            raise Stopped

    def pause(self, seconds: float) -> None:
        """Hold all requests back, as the server asks."""
        with self._lock:
            self._until = max(self._until, time.monotonic() + seconds)
