"""A sweep that is killed again and again ends as one that was left in peace."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SEEDS, EPOCHS, KILLS = 6, 8, 10
JOBS = 2 * SEEDS
EPOCH = re.compile(r"INFO epoch (\d+)/")
BEGIN = re.compile(r"INFO .* train/val/test; seed")


def start(folder: Path, teacher: Path, seeds: int, log: str) -> subprocess.Popen[bytes]:
    """The sweep's process, in a session of its own; what it says goes into two files."""
    arguments = ["loss=[ce],[ce,kd]", f"seed=range({seeds})", f"teacher.checkpoint={teacher}", "hardware=cpu"]
    arguments += [f"recipe.epochs={EPOCHS}", "protocol.val_every=1", "hydra.launcher.n_jobs=2"]
    command = [sys.executable, "-m", "kd.cli.main", "train", "-m", *arguments]
    environment = {**os.environ, "KD_RUNS": str(folder), "COLUMNS": "120"}
    folder.mkdir(exist_ok=True)
    with (folder / f"{log}.out").open("wb") as out, (folder / f"{log}.err").open("wb") as err:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=err, start_new_session=True)


def logs(folder: Path) -> dict[str, list[str]]:
    """The log of each job."""
    return {f.parent.name: f.read_text().splitlines() for f in sorted(folder.glob("sweep_*/*/train.log"))}


def epochs(folder: Path) -> set[tuple[str, int]]:
    """(job, epoch) of every epoch that has been trained, once."""
    return {(job, int(m[1])) for job, lines in logs(folder).items() for m in map(EPOCH.search, lines) if m}


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {f.parent.name: json.loads(f.read_text()) for f in sorted(folder.glob("sweep_*/*/result.json"))}


def finished(folder: Path) -> set[str]:
    return {name for name, record in records(folder).items() if record["status"] == "finished"}


def wait_for(process: subprocess.Popen[bytes], seen: Callable[[], Any], seconds: float = 120) -> Any:
    """What ``seen`` returns as soon as it is true; the process must be alive then."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = seen()
        if found:
            return found
        assert process.poll() is None, "the sweep ended before it could be killed"
        time.sleep(0.005)
    raise AssertionError("the sweep makes no progress")


def session(leader: int) -> list[int]:
    """The processes that live in a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the sweep and all its children; nothing of them lives on."""
    pids = [process.pid, *session(process.pid)]
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    assert process.wait(20) == -signal.SIGKILL
    until = time.monotonic() + 20
    while session(process.pid):
        assert time.monotonic() < until, "a child outlived its sweep"
        time.sleep(0.01)


def table(folder: Path, log: str) -> list[list[str]]:
    """The rows that the sweep printed, without their last cell, the seconds."""
    lines = (folder / f"{log}.out").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("│┃").split(line[0])][:-1] for line in lines if line[:1] in "│┃"]


def numbers(folder: Path) -> dict[str, Any]:
    """What a job's record says of its networks, and its curves, without what a clock measured."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k != "latency_ms"}
        return value

    found = {}
    for name, record in records(folder).items():
        with next(folder.glob(f"sweep_*/{name}/metrics.csv")).open() as file:
            curves = sorted(map(str, csv.DictReader(file)))
        keys = ("status", "error", "config_hash", "protocol", "data", "student", "teacher")
        found[name] = [timeless({k: record[k] for k in keys}), curves]
    return found


def went_on(lines: list[str]) -> bool:
    """Whether a log shows a start whose first epoch is not the first of the run."""
    first = False
    for line in lines:
        epoch = EPOCH.search(line)
        if epoch and first and int(epoch[1]) > 1:
            return True
        first = bool(BEGIN.search(line)) or (first and not epoch)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the children in /proc")
def test_ten_kills_at_random_moments_change_no_number(tmp_path: Path, teacher_run: Path) -> None:
    rng = random.Random(20)
    killed, peace = tmp_path / "killed", tmp_path / "peace"
    at: list[int] = []
    undisturbed = start(peace, teacher_run, SEEDS, "end")  # beside it: a start keeps one core busy
    for number in range(KILLS):
        process = start(killed, teacher_run, SEEDS, f"{number}")
        before = epochs(killed)
        left = JOBS * EPOCHS - len(before)
        if rng.random() < 0.15:  # while it plans, or sets out
            time.sleep(rng.uniform(0, 3))
        else:
            more = rng.randint(1, max(1, int(1.5 * left / (KILLS - number + 1))))
            wait_for(process, lambda before=before, more=more: len(epochs(killed) - before) >= more)
            time.sleep(rng.uniform(0, 0.15))
        at.append(len(finished(killed)))
        kill(process)
        assert all(record["status"] in ("running", "finished") for record in records(killed).values())
    assert sum(0 < done < JOBS for done in at) >= 4, f"finished jobs at each kill: {at}"

    for process, folder in ((start(killed, teacher_run, SEEDS, "end"), killed), (undisturbed, peace)):
        assert process.wait(300) == 0, (folder / "end.err").read_text()
    assert sum(map(went_on, logs(killed).values())) >= 4, f"jobs that went on from a checkpoint; kills at {at}"
    assert not any(map(went_on, logs(peace).values()))
    assert sum(" seed=" in row[0] for row in table(peace, "end")) == JOBS  # beside them means, and the teacher
    assert table(killed, "end") == table(peace, "end")
    assert numbers(killed) == numbers(peace)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the children in /proc")
def test_a_killed_job_does_not_stop_the_others(tmp_path: Path, teacher_run: Path) -> None:
    process = start(tmp_path, teacher_run, 2, "first")

    def in_work() -> list[tuple[int, Path]]:
        """Process and log of each job that has a checkpoint and is being trained."""
        found = []
        for pid in session(process.pid):
            try:
                log = Path(os.readlink(f"/proc/{pid}/fd/1"))
            except OSError:
                continue
            if log.name == "train.log" and 2 <= len(EPOCH.findall(log.read_text())) < EPOCHS - 2:
                found.append((pid, log))
        return found

    pid, log = wait_for(process, in_work)[0]
    os.kill(pid, signal.SIGKILL)
    assert process.wait(300) == 1
    victim = log.parent.name
    said = (tmp_path / "first.err").read_text()
    assert "1 of 4 jobs have no result" in said
    reasons = re.findall(r"^kd: (loss=.*): interrupted: killed by SIGKILL \(out of memory\?\)$", said, re.MULTILINE)
    assert len(reasons) == 1
    assert len(finished(tmp_path)) == 3
    assert victim not in finished(tmp_path)

    again = start(tmp_path, teacher_run, 2, "second")
    assert again.wait(300) == 0
    assert len(finished(tmp_path)) == 4
    assert [name for name, lines in logs(tmp_path).items() if went_on(lines)] == [victim]
    assert "  1/1  " in (tmp_path / "second.out").read_text()
