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


def seeded(loss: str, seed: int, value: float, test: float, teacher: float | None = 0.9) -> Outcome:
    """One of several seeds, beside a teacher or without one."""
    made = outcome(f"job loss={loss} seed={seed}", value)
    found = made.state.record
    found["student"]["selected"]["test"] = {"acc1": test, **({"agreement": 0.5} if teacher else {})}
    if teacher:
        found["teacher"] = {"checkpoint": "runs/t", "val": {"acc1": 0.95}, "test": {"acc1": teacher}}
    return made


def test_means_over_seeds_stand_beside_the_teacher(capsys) -> None:
    print_results(Path("sweep"), [seeded(*a) for a in (("ce", 0, 0.8, 0.7), ("ce", 1, 0.6, 0.72), ("kd", 0, 0.9, 0.8))])
    said = capsys.readouterr().out.split("means ± standard deviations over seeds, beside the teacher")[1]
    assert re.search(r"│ teacher +│ +│ +0.9500 │ +90.00 │ +│", said)
    assert re.search(r"│ job loss=kd +│ +1 │ +0.9000 │ +80.00 │ +10.00 │", said)
    assert re.search(r"│ job loss=ce +│ +2 │ 0.7000 ± 0.1414 │ 71.00 ± 1.41 │ +19.00 │", said)
    assert said.index("loss=kd") < said.index("loss=ce"), "in the order of the best job"


def test_without_a_teacher_there_is_no_column_of_it(capsys) -> None:
    print_results(Path("sweep"), [seeded("ce", 0, 0.8, 0.7, None), seeded("kd", 0, 0.9, 0.8, None)])
    said = capsys.readouterr().out
    assert "agreement" not in said
    assert "means" not in said, "one seed of each, and no teacher: the jobs say all"


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
