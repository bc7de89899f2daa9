"""The table at the end of a sweep: best first, and why the others have no result."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kd.errors import KdError
from kd.records.manifest import Job
from kd.records.state import State
from kd.sweeps.outcome import Outcome
from kd.sweeps.table import print_results
from kd.tasks.metrics import CLASSIFICATION


def outcome(name: str, value: float, monitor: str = "val/acc1", status: str = "finished", reason: str = "") -> Outcome:
    selected = {"val": {monitor.partition("/")[2]: value}, "test": {"acc1": 0.5, "agreement": 0.25}}
    metrics = [metric.describe() for metric in CLASSIFICATION]
    found = {
        "protocol": {"monitor": monitor},
        "metrics": metrics,
        "student": {"selected": selected},
        "wall_clock_s": 1.25,
    }
    return Outcome(Job(name, name, ()), Path(name), State(status, reason, found if status == "finished" else None))


def names(text: str) -> list[str]:
    return re.findall(r"│ (job\w+)", text)


def test_the_best_comes_first(capsys) -> None:
    print_results(Path("sweep"), [outcome("job_b", 0.5), outcome("job_a", 0.9), outcome("job_c", 0.7)])
    said = capsys.readouterr().out
    assert names(said) == ["job_a", "job_c", "job_b"]
    assert re.search(r"job_a │\s+0.9000 │\s+50.00 │\s+0.2500 │\s+1.2 ", said)
    assert "kd report sweep" in said


def test_jobs_of_different_code_are_told(capsys) -> None:
    some = [outcome("job_a", 0.9), outcome("job_b", 0.7), outcome("job_c", 0.5)]
    for job, code in zip(some, ("aaaa", "aaaa", None), strict=True):
        job.state.record.update({"code_read": {"own.Term": {"own": code}}} if code else {})
    print_results(Path("sweep"), some)
    assert "own.Term" not in capsys.readouterr().out
    some[1].state.record["code_read"]["own.Term"]["own"] = "bbbb"
    print_results(Path("sweep"), some)
    assert "_target_ = own.Term was changed while the jobs ran" in capsys.readouterr().out


def test_the_best_loss_is_the_smallest(capsys) -> None:
    print_results(Path("sweep"), [outcome("job_b", 0.5, "val/nll"), outcome("job_a", 0.9, "val/nll")])
    assert names(capsys.readouterr().out) == ["job_b", "job_a"]


def test_ties_keep_an_order_and_other_monitors_stand_apart(capsys) -> None:
    both = [outcome("job_b", 0.5), outcome("job_n", 0.1, "val/nll"), outcome("job_a", 0.5)]
    print_results(Path("sweep"), both)
    assert names(capsys.readouterr().out) == ["job_a", "job_b", "job_n"]


def test_failures_come_last_with_their_reason(capsys) -> None:
    lost = outcome("job_x", 0, status="failed", reason="the loss is not finite")
    killed = outcome("job_y", 0, status="interrupted", reason="killed by SIGKILL")
    with pytest.raises(KdError) as raised:
        print_results(Path("sweep"), [lost, outcome("job_a", 0.9), killed])
    assert names(capsys.readouterr().out) == ["job_a", "job_x", "job_y"]
    assert str(raised.value).splitlines() == [
        "2 of 3 jobs have no result (the same command again runs what is missing):",
        "job_x: failed: the loss is not finite",
        "job_y: interrupted: killed by SIGKILL",
    ]


def test_a_sweep_of_failures_is_a_table_too(capsys) -> None:
    with pytest.raises(KdError, match="1 of 1 jobs have no result"):
        print_results(Path("sweep"), [outcome("job_x", 0, status="failed", reason="why")])
    assert names(capsys.readouterr().out) == ["job_x"]
