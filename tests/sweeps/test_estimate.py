"""The hours of a study: what finished runs say, what is timed, and how long the jobs take together."""

from __future__ import annotations

import math
from pathlib import Path

from kd.records.manifest import Job
from kd.records.state import state_of
from kd.sweeps import estimate


def jobs(**after: tuple[str, ...]) -> list[Job]:
    return [Job(name, name, (), needs) for name, needs in after.items()]


def test_jobs_wait_for_those_that_they_read() -> None:
    some = jobs(teacher=(), alone=(), student=("teacher",), other=("teacher",), late=("student",))
    seconds = {"teacher": 60.0, "alone": 10.0, "student": 20.0, "other": 5.0, "late": 1.0}
    assert estimate.makespan(some, seconds, 1) == 96
    assert estimate.makespan(some, seconds, 2) == estimate.makespan(some, seconds, 9) == 60 + 20 + 1
    del seconds["teacher"]  # it is there already
    assert estimate.makespan(some, seconds, 2) == 20 + 1  # student; alone and other in the other slot
    assert estimate.makespan(some, {}, 2) == 0


def log(run_dir: Path, *moments: str) -> None:
    run_dir.mkdir()
    lines = [f"2026-11-24 {m},000 INFO epoch {n + 1}/6  train/loss 1.0  (6.0 s)\n" for n, m in enumerate(moments)]
    (run_dir / "train.log").write_text(
        "epoch 1/6  on the console\n" + "".join(lines) + "2026-11-24 12:00:00,000 INFO end"
    )


def test_the_time_in_which_a_run_was_stopped_is_left_out(tmp_path: Path) -> None:
    found = {"wall_clock_s": 50.0, "protocol": {"epochs": 6}}
    log(tmp_path / "even", "10:00:06", "10:00:12", "10:00:18", "10:00:24", "10:00:30", "10:00:36")
    assert estimate.trained(tmp_path / "even", found) == 50
    log(tmp_path / "stopped", "10:00:06", "10:00:12", "12:00:18", "12:00:24", "12:00:30", "12:00:36")
    assert estimate.trained(tmp_path / "stopped", {**found, "wall_clock_s": 7250.0}) == 7250 - (7206 - 60)
    log(tmp_path / "resumed", "10:00:06", "10:00:12", "10:00:18", "10:00:24", "10:00:30", "10:00:36")
    assert estimate.trained(tmp_path / "resumed", {**found, "wall_clock_s": 12.0}) == 36
    (tmp_path / "bare").mkdir()
    assert estimate.trained(tmp_path / "bare", found) == 50


def test_rows_that_cost_the_same_are_timed_once(engine, monkeypatch) -> None:
    monkeypatch.setattr(estimate, "preload", lambda: None)
    asked = []
    monkeypatch.setattr(estimate, "run_in_subprocess", lambda call: asked.append(call.args) or (3, 0.1, 1.0))
    clock = estimate.Clock(2)

    def times(*overrides: str) -> int:
        distilled = ("loss=[ce,kd]", "teacher.allow_random=true", "model@teacher=mlp", *overrides)
        assert clock(engine.compose(Job("a", "a", distilled))) == (3, 0.1, 1.0)
        return len(asked)

    assert times() == 1
    assert times("loss.kd.temperature=9", "loss.ce.weight=0", "seed=4", "data.split_seed=4", "name=b") == 1
    assert times("recipe.epochs=7") == 1
    others = ["recipe.batch_size=32", "student.model.hidden=[3]", "data.drop_classes=[3]", "loss=[kd]"]
    assert [times(other) for other in [*others, "hardware=ddp_cpu"]] == [2, 3, 4, 5, 6]
    assert asked[0][1] == 2


def test_a_row_that_reads_a_folder_of_a_missing_run_is_not_timed(engine, tmp_path: Path) -> None:
    folder = tmp_path / "first" / "seed0" / "last"
    job = Job("second/seed0", "second", (f"notes={folder}",), ("first/seed0",))
    line = estimate.Line("second", [job], [state_of(tmp_path / job.name)])
    configs = {job.name: engine.compose(job)}
    times = []

    def clock(config: dict) -> tuple[int, float, float]:
        times.append(config)
        return 3, 0.1, 1.0

    found = estimate._timed(line, tmp_path, configs, clock)
    assert (found.how, math.isnan(found.seconds), times) == (estimate.TO_COME, True, [])
    folder.mkdir(parents=True)
    found = estimate._timed(line, tmp_path, configs, clock)
    assert len(times) == 1
    assert found.seconds > 1


def test_a_step_of_several_processes_is_the_part_of_one(engine) -> None:
    overrides = ["data=fake", "data.train_images=64", "recipe.batch_size=16", "hardware=ddp_cpu", "recipe.epochs=2"]
    config = engine.compose(Job("a", "a", tuple(overrides)))
    steps, seconds, start = estimate.run_in_subprocess(lambda: estimate.time_steps(config, 1))
    assert steps == 4
    assert 0 < seconds < start


def test_times_are_in_the_unit_that_fits() -> None:
    times = [0.0, 0.36, 9.9, 14.2, 89, 96, 5340, 5400, 180_000]
    said = ["0.0 s", "0.4 s", "9.9 s", "14 s", "89 s", "1.6 min", "89.0 min", "1.5 h", "50.0 h"]
    assert [estimate.duration(seconds) for seconds in times] == said
