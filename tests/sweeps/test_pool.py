"""Forked children: exit codes, how many at once, and that none outlives its parent."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HEAD = "import json, os, signal, sys, time\nfrom pathlib import Path\nfrom kd.sweeps import pool\n\n"


def output(process) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie that nobody waited for has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(what, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.02)
    return False


def test_exit_codes_and_signals_by_position(script) -> None:
    code = """
def killed(slot): os.kill(os.getpid(), signal.SIGKILL)
def raising(slot): raise ValueError("in the log")
def interrupted(slot): raise KeyboardInterrupt
calls = [lambda slot: None, lambda slot: sys.exit(3), killed, raising, interrupted, lambda slot: os._exit(7)]
print(json.dumps(dict(pool.forked(calls, 2))))
"""
    found = json.loads(output(script(HEAD + code)))
    assert found == {"0": 0, "1": 3, "2": -9, "3": 1, "4": 130, "5": 7}


def test_never_more_at_once_and_each_slot_has_one(script, tmp_path) -> None:
    code = """
def call(slot):
    start = time.monotonic()
    time.sleep(0.1)
    Path(f"{os.getpid()}.json").write_text(json.dumps([slot, start, time.monotonic()]))
print([position for position, _ in pool.forked([call] * 9, 3)])
"""
    assert sorted(json.loads(output(script(HEAD + code)))) == list(range(9))
    spans = [json.loads(f.read_text()) for f in tmp_path.glob("*.json")]
    assert len(spans) == 9  # as many processes as calls
    together = [sum(start <= other[1] < end for other in spans) for _, start, end in spans]
    assert max(together) <= 3
    assert {slot for slot, *_ in spans} == {0, 1, 2}
    for slot in range(3):
        own = sorted((start, end) for s, start, end in spans if s == slot)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(own))


SLEEPERS = """
def call(slot):
    Path(f"{os.getpid()}.pid").touch()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        Path(f"{os.getpid()}.interrupted").touch()
        raise
for _ in pool.forked([call] * 5, 2): pass
"""


def pids(folder: Path) -> list[int]:
    return [int(f.stem) for f in folder.glob("*.pid")]


def test_children_die_with_a_killed_parent(script, tmp_path) -> None:
    parent = script(HEAD + SLEEPERS)
    assert wait_for(lambda: len(pids(tmp_path)) == 2)
    children = pids(tmp_path)
    assert not any(gone(pid) for pid in children)
    parent.kill()
    parent.communicate()
    assert wait_for(lambda: all(gone(pid) for pid in children))
    assert pids(tmp_path) == children  # the other three never began
    assert not list(tmp_path.glob("*.interrupted"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_parent_interrupts_its_children(script, tmp_path, number) -> None:
    parent = script(HEAD + SLEEPERS)
    assert wait_for(lambda: len(pids(tmp_path)) == 2)
    os.kill(parent.pid, number)
    _, err = parent.communicate(timeout=30)
    assert parent.returncode != 0
    assert "KeyboardInterrupt" in err
    assert len(list(tmp_path.glob("*.interrupted"))) == 2
    assert len(pids(tmp_path)) == 2
    assert all(gone(pid) for pid in pids(tmp_path))


def test_a_child_that_does_not_listen_is_killed(script, tmp_path) -> None:
    deaf = SLEEPERS.replace("    Path(", "    signal.signal(signal.SIGINT, signal.SIG_IGN)\n    Path(", 1)
    parent = script(HEAD + "pool._interrupt.__defaults__ = (0.3,)\n" + deaf)
    assert wait_for(lambda: len(pids(tmp_path)) == 2)
    os.kill(parent.pid, signal.SIGTERM)
    parent.communicate(timeout=20)
    assert all(gone(pid) for pid in pids(tmp_path))


def test_one_child_killed_leaves_the_others_alone(script, tmp_path) -> None:
    code = """
def call(slot):
    Path(f"{os.getpid()}.pid").touch()
    while not Path("go").exists(): time.sleep(0.02)
print(json.dumps(sorted(code for _, code in pool.forked([call] * 3, 2))))
"""
    parent = script(HEAD + code)
    assert wait_for(lambda: len(pids(tmp_path)) == 2)
    os.kill(pids(tmp_path)[0], signal.SIGKILL)
    assert wait_for(lambda: len(pids(tmp_path)) == 3)
    (tmp_path / "go").touch()
    assert json.loads(output(parent)) == [-9, 0, 0]
