"""A sweep that is killed again and again ends with the numbers of one that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

EPOCHS = 16
COMMAND = [
    *("-m", "recipe.optimizer.lr=0.001,0.003,0.01", "seed=0,1,2,3", f"recipe.epochs={EPOCHS}", "protocol.val_every=1"),
    *("hardware=cpu", "hardware.threads=1", "student.model.dropout=0.2", "hydra.launcher.n_jobs=2"),
]
JOBS, KILLS = 12, 10


def start(folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "kd.cli", "train", *COMMAND, "hydra.sweep.dir=sweep"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=folder, text=True, env=environment, start_new_session=True, **streams)  # type: ignore[call-overload]


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {f.parent.name: json.loads(f.read_text()) for f in sorted(folder.glob("sweep/*/result.json"))}


def numbers(folder: Path) -> dict[str, Any]:
    """Each job's measurements; the seconds of a forward pass are never twice the same."""
    found = {name: dict(record["student"]) for name, record in records(folder).items()}
    for student in found.values():
        student.pop("latency_ms")
    return found


def table(said: str) -> list[list[str]]:
    """The cells of the printed table but the seconds."""
    return [[cell.strip() for cell in line.split("│")[1:-2]] for line in said.splitlines() if line.startswith("│")]


def lines_done(folder: Path) -> int:
    """Progress: epochs that the jobs have told of in their logs."""
    logs = [log.read_text(errors="replace") for log in folder.glob("sweep/*/train.log")]
    return sum(len(re.findall(r"^\S+ \S+ INFO epoch ", text, re.MULTILINE)) for text in logs)


def wait_for_lines(process: subprocess.Popen[str], folder: Path, more: int) -> None:
    """Until the jobs have gone on by so many epochs. The sweep must not end before."""
    goal, end = lines_done(folder) + more, time.monotonic() + 200
    while lines_done(folder) < goal:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{lines_done(folder)} of {goal} epochs after 200 s"
        time.sleep(0.01)


def of_session(leader: int) -> Iterator[int]:
    """The living processes of a session: the sweep and its jobs, whatever group they put themselves into."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            yield int(entry.name)


def kill_all(process: subprocess.Popen[str]) -> None:
    """The machine goes down: every process at once, without a chance to write anything."""
    for pid in of_session(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    while list(of_session(process.pid)):
        time.sleep(0.01)


def children(process: subprocess.Popen[str]) -> list[int]:
    return [pid for pid in of_session(process.pid) if pid != process.pid]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep that nobody disturbs, and what it says."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said
    return folder, said


def test_killed_ten_times_it_ends_with_the_same_table(whole, tmp_path) -> None:
    rng, finished_at = random.Random(0), []
    for _ in range(KILLS):
        process = start(tmp_path)
        try:
            wait_for_lines(process, tmp_path, rng.randint(4, 20))
            time.sleep(0.03 * rng.random())  # anywhere in an epoch, its validation or its checkpoint
        finally:
            kill_all(process)
        states = [record["status"] for record in records(tmp_path).values()]
        finished_at.append(states.count("finished"))
        assert states.count("running") <= 2
    assert finished_at[-1] < JOBS, "the last kill came too late to disturb anything"
    assert len(set(finished_at)) >= 3, f"the kills all hit the same jobs: {finished_at}"

    process = start(tmp_path)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said
    undisturbed, before = whole
    assert numbers(tmp_path) == numbers(undisturbed)
    assert len(numbers(tmp_path)) == JOBS
    assert table(said) == table(before)
    assert len(table(said)) == JOBS
    for name in records(tmp_path):
        curves = [(folder / "sweep" / name / "metrics.csv").read_bytes() for folder in (undisturbed, tmp_path)]
        assert curves[0] == curves[1], name
    resumed = [log for log in tmp_path.glob("sweep/*/train.log") if went_on(log.read_text(errors="replace"))]
    assert len(resumed) >= 4, f"only {len(resumed)} jobs went on from a checkpoint"


def went_on(log: str) -> bool:
    """Whether a process after the first began with a later epoch than 1."""
    attempts = log.split("; loss ce; ")[1:]  # of each opening line
    firsts = [re.search(r"INFO epoch (\d+)/", attempt) for attempt in attempts]
    return any(first is not None and int(first[1]) > 1 for first in firsts[1:])


def test_one_killed_job_leaves_the_others_and_is_gone_on_with(whole, tmp_path) -> None:
    process = start(tmp_path)
    try:
        wait_for_lines(process, tmp_path, 8)
        os.kill(random.Random(3).choice(children(process)), signal.SIGKILL)
        said = process.communicate(timeout=400)[0]
    finally:
        kill_all(process)
    assert process.returncode == 1
    assert "1 of 12 jobs have no result (the same command again runs what is missing):" in said
    (lost,) = [name for name, record in records(tmp_path).items() if record["status"] != "finished"]
    assert records(tmp_path)[lost]["status"] == "interrupted"
    assert said.splitlines()[-1].endswith(": interrupted: killed by SIGKILL (out of memory?)")
    kept = {f: f.stat().st_mtime_ns for f in tmp_path.glob("sweep/*/result.json") if f.parent.name != lost}
    process = start(tmp_path)
    again = process.communicate(timeout=400)[0]
    assert process.returncode == 0, again
    assert {f: f.stat().st_mtime_ns for f in kept} == kept
    assert went_on((tmp_path / "sweep" / lost / "train.log").read_text())
    assert numbers(tmp_path) == numbers(whole[0])
    assert table(again) == table(whole[1])
