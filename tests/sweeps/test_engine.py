"""The engine composes and checks all jobs, runs what is missing in order, and overwrites nothing it does not know."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kd import record
from kd.errors import KdError
from kd.sweeps import manifest
from kd.sweeps.engine import LOCK, refuse_twins, refuse_unbuildable, waves
from kd.sweeps.manifest import Job, Manifest
from kd.sweeps.state import FAILED, FINISHED, INTERRUPTED, MISSING


def job(name: str, *overrides: str, after: Sequence[str] = ()) -> Job:
    return Job(name, f"label of {name}", ("recipe.epochs=1", *overrides), tuple(after))


A, B, C = job("a", "seed=0"), job("b", "seed=1", after=["a"]), job("c", "seed=2")


def files(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


# ---------------------------------------------------------------------- order


def test_jobs_come_after_those_that_they_read() -> None:
    d = job("d", after=["b", "c"])
    assert [[j.name for j in wave] for wave in waves([d, B, A, C])] == [["a", "c"], ["b"], ["d"]]
    assert [[j.name for j in wave] for wave in waves([B])] == [["b"]]  # what it reads is not among these jobs
    assert list(waves([])) == []


def test_a_circle_is_refused() -> None:
    with pytest.raises(KdError, match="wait for one another: x, y"):
        list(waves([job("x", after=["y"]), C, job("y", after=["x"])]))


# ---------------------------------------------------------------------- run, and run again


def test_what_is_finished_does_not_run_again(make_engine: Any) -> None:
    engine = make_engine()
    outcomes = engine.run("sweep", "s", [B, A, C])
    assert [(o.job.name, o.state.status) for o in outcomes] == [("b", FINISHED), ("a", FINISHED), ("c", FINISHED)]
    assert engine.launcher.launched == [["a", "c"], ["b"]]
    before = files(engine.directory)

    again = make_engine()
    assert [o.state.status for o in again.run("sweep", "s", [B, A, C])] == [FINISHED] * 3
    assert again.launcher.launched == []
    assert files(engine.directory) == before


def test_a_failed_job_keeps_back_those_that_read_it_alone(make_engine: Any) -> None:
    engine = make_engine(fails=["a"])
    b, a, c = engine.run("sweep", "s", [B, A, C])
    assert (a.state.status, a.state.reason) == (FAILED, "it could not")
    assert (b.state.status, b.state.reason) == (MISSING, "not started: a did not finish")
    assert c.state.status == FINISHED
    assert not (engine.directory / "b").exists()

    again = make_engine()
    assert [o.state.status for o in again.run("sweep", "s", [B, A, C])] == [FINISHED] * 3
    assert again.launcher.launched == [["a"], ["b"]]


def test_a_launcher_that_gives_up_leaves_a_record_with_its_reason(make_engine: Any, monkeypatch: Any) -> None:
    engine = make_engine()

    def gives_up(jobs: Any, initial_job_idx: int) -> None:
        raise RuntimeError("first line\nthe queue is closed")

    monkeypatch.setattr(engine.launcher, "launch", gives_up)
    (outcome,) = engine.run("sweep", "s", [A])
    assert (outcome.state.status, outcome.state.reason) == (FAILED, "the launcher says: the queue is closed")

    monkeypatch.setattr(engine.launcher, "launch", lambda jobs, initial_job_idx: None)
    (outcome,) = engine.run("sweep", "s", [C])
    assert (outcome.state.status, outcome.state.reason) == (FAILED, "the launcher did not run it")


def test_a_record_that_still_says_running_is_of_a_killed_job(make_engine: Any, pretend: Any) -> None:
    engine = make_engine()
    engine.run("sweep", "s", [A])
    config = record.read_config(engine.directory / "a")
    pretend(engine.directory / "a", config, status="running")
    engine.launcher.launch = lambda jobs, initial_job_idx: None
    (outcome,) = engine.run("sweep", "s", [A])
    assert (outcome.state.status, outcome.state.reason) == (INTERRUPTED, "it stopped without a word")


def test_more_jobs_join_the_manifest(make_engine: Any) -> None:
    make_engine().run("study", "s", [A])
    engine = make_engine()
    engine.run("study", "s", [C])
    assert manifest.read(engine.directory) == Manifest("study", "s", {"a": A, "c": C})
    assert manifest.find(engine.directory / "c") == (manifest.read(engine.directory), C)
    assert manifest.find(engine.directory / "b") is None


# ---------------------------------------------------------------------- what is refused, before anything is written


def test_twins_are_refused(make_engine: Any) -> None:
    engine = make_engine()
    twin = job("twin", "recipe.optimizer.lr=1e-2", "name=other")
    with pytest.raises(KdError, match="the jobs one and twin are the same run: list each value once"):
        engine.run("sweep", "s", [job("one", "recipe.optimizer.lr=0.01"), twin])
    assert not engine.directory.exists()
    same: dict[str, Any] = {"seed": 0, "name": "x", "tags": []}
    refuse_twins({"a": same, "b": {**same, "seed": 1}})
    with pytest.raises(KdError, match="a and b are the same run"):
        refuse_twins({"a": same, "b": {**same, "name": "y", "tags": ["t"]}})


def test_a_job_that_does_not_compose_names_the_mistake(make_engine: Any) -> None:
    engine = make_engine()
    with pytest.raises(KdError, match=r"there is no option recipe.epoch.*recipe.epochs"):
        engine.run("sweep", "s", [A, job("x", "recipe.epoch=3")])
    with pytest.raises(KdError, match=r"recipe.epochs = 0"):
        engine.run("sweep", "s", [A, job("x", "recipe.epochs=0")])
    assert not engine.directory.exists()


def test_weights_that_are_nowhere_start_nothing(make_engine: Any, tmp_path: Path) -> None:
    config = make_engine().compose(job("x", f"teacher.checkpoint={tmp_path}/gone"))
    with pytest.raises(KdError, match=f"x: teacher.checkpoint = {tmp_path}/gone does not exist"):
        refuse_unbuildable({"x": config}, tmp_path / "sweep")


def test_the_directory_of_something_else_is_refused(make_engine: Any, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "thesis.tex").write_text("mine")
    with pytest.raises(KdError, match="is not empty and not the directory of a sweep"):
        make_engine().run("sweep", "s", [A])
    assert files(tmp_path / "sweep") == {"thesis.tex": b"mine"}


@pytest.mark.parametrize(("kind", "name"), [("study", "s"), ("sweep", "other")])
def test_the_directory_of_another_sweep_is_refused(make_engine: Any, kind: str, name: str) -> None:
    engine = make_engine()
    engine.run("sweep", "s", [A])
    before = files(engine.directory)
    with pytest.raises(KdError, match=f"belongs to the sweep s, not to the {kind} {name}"):
        make_engine().run(kind, name, [C])
    assert files(engine.directory) == before


def test_a_run_of_another_configuration_is_refused(make_engine: Any) -> None:
    engine = make_engine()
    engine.run("sweep", "s", [A])
    before = files(engine.directory)
    with pytest.raises(KdError, match=r"of another configuration \(recipe.epochs = 1 there and 2 here; "):
        make_engine().run("sweep", "s", [job("a", "seed=0", "recipe.epochs=2"), C])
    with pytest.raises(KdError, match="; seed = 0 there and 5 here"):
        make_engine().run("sweep", "s", [job("a", "seed=5")])
    assert files(engine.directory) == before
    assert make_engine().run("sweep", "s", [job("a", "seed=0", "name=x")])[0].state.status == FINISHED  # only a name


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[]", "it is not what kd writes"),
        (b'{"schema": 99, "status": "finished"}', r"written by a newer version of kd \(schema 99, known: 1\)"),
    ],
)
def test_a_record_that_cannot_be_read_stays_as_it_is(make_engine: Any, content: bytes, sentence: str) -> None:
    engine = make_engine()
    engine.run("sweep", "s", [A, C])
    (engine.directory / "a" / "result.json").write_bytes(content)
    before = files(engine.directory)
    with pytest.raises(KdError, match=sentence) as refused:
        make_engine().run("sweep", "s", [A, C])
    assert len(str(refused.value).splitlines()) == 1
    assert str(engine.directory / "a" / "result.json") in str(refused.value)
    assert files(engine.directory) == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda good: good[:40], "cannot be read: it is not what kd writes"),
        (lambda good: b"[]", "cannot be read: it is not what kd writes"),
        (lambda good: good.replace(b'"jobs"', b'"runs"'), "cannot be read: it is not what kd writes"),
        (
            lambda good: json.dumps({**json.loads(good), "schema": 2}).encode(),
            r"written by a newer version of kd \(schema 2, known: 1\)",
        ),
    ],
)
def test_a_manifest_that_cannot_be_read_stays_as_it_is(make_engine: Any, change: Any, sentence: str) -> None:
    engine = make_engine()
    engine.run("sweep", "s", [A])
    file = engine.directory / manifest.FILE
    file.write_bytes(change(file.read_bytes()))
    before = files(engine.directory)
    with pytest.raises(KdError, match=sentence):
        make_engine().run("sweep", "s", [A, C])
    assert files(engine.directory) == before


def test_a_second_process_is_refused_while_the_first_runs(make_engine: Any) -> None:
    engine = make_engine()
    engine.directory.mkdir()
    with (engine.directory / LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(KdError, match="is in use: another process runs this sweep"):
            engine.run("sweep", "s", [A])
        assert list(files(engine.directory)) == [LOCK]
    assert engine.run("sweep", "s", [A])[0].state.status == FINISHED  # the lock fell with its holder
