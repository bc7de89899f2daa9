"""Forked jobs: how each one ended, never too many at once, and none that outlives its parent.

Each case is a script: a process that forks must not be the one that runs the tests, which has threads.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

OPENING = """
import functools, os, signal, sys, time
from pathlib import Path
from kd.errors import KdError
from kd.sweeps.pool import ask, forked
"""


def begin(code: str, folder: Path) -> subprocess.Popen[str]:
    """The script, in ``folder``."""
    command = [sys.executable, "-c", OPENING + code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def said(code: str, folder: Path) -> list[str]:
    """What the script prints, line by line."""
    process = begin(code, folder)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.splitlines()


def test_how_each_one_ended_is_told(tmp_path: Path) -> None:
    code = """
def fine(slot): Path("fine").write_text(f"{os.getpid() != parent}")
def raises(slot): raise ValueError("told by the traceback")
def exits(slot): sys.exit(7)
def dies(slot): os.kill(os.getpid(), signal.SIGKILL)
def stops(slot): raise KeyboardInterrupt
parent = os.getpid()
print(sorted(forked([fine, raises, exits, dies, stops], 2)))
print(list(forked([], 2)))
"""
    assert said(code, tmp_path) == ["[(0, 0), (1, 1), (2, 7), (3, -9), (4, 130)]", "[]"]
    assert (tmp_path / "fine").read_text() == "True"


def test_never_more_at_once_and_each_in_a_slot_of_its_own(tmp_path: Path) -> None:
    code = """
def job(number, slot):
    held = Path(f"slot{slot}")
    held.touch(exist_ok=False)  # nobody else is in it
    time.sleep(0.02 * (1 + number % 3))
    Path(f"ran{number}").write_text(f"{slot} {len(list(Path().glob('slot*')))}")
    held.unlink()
print(sorted(forked([functools.partial(job, n) for n in range(9)], 3)))
"""
    assert said(code, tmp_path) == [str([(n, 0) for n in range(9)])]
    ran = [f.read_text().split() for f in tmp_path.glob("ran*")]
    assert {slot for slot, _ in ran} == {"0", "1", "2"}
    assert max(int(together) for _, together in ran) <= 3


WAITING = """
def job(number, slot):
    try:
        Path(f"{number}.pid").write_text(str(os.getpid()))
        os.rename(f"{number}.pid", f"{number}.there")
        while True: time.sleep(0.01)
    except KeyboardInterrupt:
        Path(f"{number}.record").write_text("interrupted")
        raise
try:
    for ended in forked([functools.partial(job, n) for n in range(3)], 2): print(ended)
except KeyboardInterrupt:
    print("stopped")
"""


def children(folder: Path) -> list[int]:
    """The two jobs that run, as soon as they do."""
    until = time.monotonic() + 30
    while len(list(folder.glob("*.there"))) < 2:
        assert time.monotonic() < until
        time.sleep(0.01)
    return [int(f.read_text()) for f in folder.glob("*.there")]


def gone(pid: int) -> bool:
    """Whether the process ends soon. One that nobody has collected yet has ended too."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interruption_reaches_the_jobs_and_no_other_starts(tmp_path: Path, number: signal.Signals) -> None:
    process = begin(WAITING, tmp_path)
    pids = children(tmp_path)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "stopped\n", "")
    assert all(map(gone, pids))
    assert sorted(f.name for f in tmp_path.glob("*.record")) == ["0.record", "1.record"]
    assert not (tmp_path / "2.there").exists()


def test_the_jobs_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    process = begin(WAITING, tmp_path)
    pids = children(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    assert all(map(gone, pids))
    assert not list(tmp_path.glob("*.record"))


def test_a_terminated_job_is_told_by_its_signal(tmp_path: Path) -> None:
    process = begin(WAITING, tmp_path)
    pids = children(tmp_path)
    os.kill(pids[0], signal.SIGTERM)
    until = time.monotonic() + 30
    while not (tmp_path / "2.there").exists():  # the next one takes its place
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert out.splitlines()[0] in ("(0, -15)", "(1, -15)")
    assert out.splitlines()[1:] == ["stopped"]


def test_ask_returns_raises_and_says_when_nobody_answers(tmp_path: Path) -> None:
    code = """
def refuses(): raise ValueError("loss.kd needs a teacher")
def silent(): raise LookupError
def dies(): os._exit(3)
print(ask(lambda: {"pid": os.getpid()})["pid"] != os.getpid(), ask(lambda: None))
for call in (refuses, silent, dies):
    try: ask(call)
    except KdError as error: print(error)
"""
    assert said(code, tmp_path) == [
        "True None",
        "loss.kd needs a teacher",
        "LookupError",
        "the process that was to find out ended with exit code 3",
    ]
