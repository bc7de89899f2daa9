"""What is said of running jobs: epoch and time left, rewritten on a terminal, else once a minute."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from kd.sweeps import progress
from kd.sweeps.progress import Progress, last


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """A clock that stands still until it is set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def log(run: Path, epoch: int, of: int = 100, word: str = "epoch") -> None:
    run.mkdir(exist_ok=True)
    with (run / progress.LOG).open("a") as file:
        file.write(f"2026-11-29 12:47:54,842 INFO {word} {epoch}/{of}  train/loss 1.2704  (0.2 s)\n")


def test_the_last_epoch_or_step_of_a_log(tmp_path) -> None:
    assert last(tmp_path / "none") is None
    log(tmp_path / "run", 3)
    assert last(tmp_path / "run" / progress.LOG) == ("epoch", 3, 100)
    log(tmp_path / "run", 40, 2000, "step")
    assert last(tmp_path / "run" / progress.LOG) == ("step", 40, 2000)
    (tmp_path / "run" / progress.LOG).write_text("digits: 808/270/719 train/val/test\n")
    assert last(tmp_path / "run" / progress.LOG) is None


def test_time_left_of_a_job_and_of_all(tmp_path, clock) -> None:
    screen, jobs = Terminal(), {0: ("seed=0", tmp_path / "a"), 1: ("seed=1", tmp_path / "b")}
    shown = Progress(4, 2, screen)
    shown.update(jobs, 0)
    assert screen.getvalue() == "", "no epoch has ended"
    log(tmp_path / "a", 10)
    shown.update(jobs, 0)
    assert screen.getvalue().endswith("0/4 done; seed=0 epoch 10/100")
    clock[0] = 20.0
    log(tmp_path / "a", 30)
    log(tmp_path / "b", 1)
    shown.update(jobs, 0)  # 20 epochs in 20 seconds: 70 are left
    assert screen.getvalue().endswith("\r\x1b[2K  0/4 done; seed=0 epoch 30/100, 0:01:10 left; seed=1 epoch 1/100")
    clock[0] = 100.0
    shown.end(0)
    shown.clear()
    assert screen.getvalue().endswith("\x1b[2K")
    shown.update({1: jobs[1]}, 1)  # 3 × 100 s, of which one job has done 100, in two slots
    assert "1/4 done, 0:01:40 left; seed=1 epoch 1/100" in screen.getvalue()


def test_where_nothing_can_be_rewritten_there_is_a_line_a_minute(tmp_path, clock) -> None:
    stream = io.StringIO()
    shown = Progress(1, 1, stream)
    log(tmp_path / "a", 1)
    for second in range(0, 150, 10):
        clock[0] = float(second)
        shown.update({0: ("seed=0", tmp_path / "a")}, 0)
    shown.clear()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert all("\x1b" not in line and "seed=0 epoch 1/100" in line for line in lines)
