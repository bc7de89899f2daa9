"""How far the running jobs of a sweep are: epoch and time left, from what each writes into its log."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TextIO

LOG = "train.log"
TAIL = 8192  # bytes of a log that are read
SECONDS = 60.0  # between two lines where nothing can be rewritten
DONE = re.compile(r"\b(?:epoch|step) (\d+)/(\d+)")


@dataclass
class Progress:
    """Writes a line about the running jobs: again and again on a terminal, else once a minute.

    ``total``: jobs of the whole sweep; ``slots``: how many run at once.
    """

    total: int
    slots: int
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    begun: dict[int, tuple[float, float]] = field(default_factory=dict)  # job → time and share when first seen
    took: list[float] = field(default_factory=list)  # seconds of the jobs that ended
    started: dict[int, float] = field(default_factory=dict)
    said: float = field(default_factory=lambda: time.monotonic())
    shown: bool = False

    def update(self, running: Mapping[int, tuple[str, Path]], done: int) -> None:
        """Say it now, if it is time; ``running``: job → its label and directory; ``done``: how many have ended."""
        now = time.monotonic()
        for job in running:
            self.started.setdefault(job, now)
        terminal = self.stream.isatty()
        if not terminal and now - self.said < SECONDS:
            return
        self.said = now
        parts = [f"{label} {text}" for job, (label, run_dir) in running.items() if (text := self.of(job, run_dir, now))]
        if not parts:
            return
        line = f"  {done}/{self.total} done{self._left(running, done, now)}; {'; '.join(parts)}"
        if terminal:
            self.clear()
            self.stream.write(line[: _width()])
            self.shown = True
        else:
            self.stream.write(f"{line}\n")
        self.stream.flush()

    def end(self, job: int) -> None:
        """Remember how long a job took."""
        if job in self.started:
            self.took.append(time.monotonic() - self.started.pop(job))

    def clear(self) -> None:
        """Remove the line, before another one is printed."""
        if self.shown:
            self.stream.write("\r\x1b[2K")
            self.stream.flush()
            self.shown = False

    def of(self, job: int, run_dir: Path, now: float) -> str:
        """Write ``epoch 12/200, 0:01:05 left``; "" before the first epoch has ended."""
        found = last(run_dir / LOG)
        if found is None:
            return ""
        word, count, whole = found
        share = count / whole
        at, first = self.begun.setdefault(job, (now, share))
        left = f", {_time((now - at) * (1 - share) / (share - first))} left" if share > first else ""
        return f"{word} {count}/{whole}{left}"

    def _left(self, running: Mapping[int, object], done: int, now: float) -> str:
        """Write the time left of all jobs, once one has ended."""
        if not self.took:
            return ""
        mean = sum(self.took) / len(self.took)
        rest = (self.total - done) * mean - sum(min(mean, now - self.started[job]) for job in running)
        return f", {_time(rest / self.slots)} left"


def last(log: Path) -> tuple[str, int, int] | None:
    """Read the last epoch, or step, that a log tells of, and how many there are."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return None
    found = list(DONE.finditer(text))
    if not found or not int(found[-1][2]):
        return None
    return found[-1][0].partition(" ")[0], int(found[-1][1]), int(found[-1][2])


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(max(0.0, seconds))))


def _width() -> int:
    return shutil.get_terminal_size().columns - 1
