"""What the engine refuses, in which order it runs, and what it makes of launchers that lose jobs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from bare_records import write

from kd.errors import KdError
from kd.records import inputs, lock, manifest
from kd.records.manifest import Job
from kd.sweeps import study
from kd.sweeps.engine import waves
from kd.sweeps.grid import plan


def jobs(**after: tuple[str, ...]) -> list[Job]:
    """Jobs that differ in their seed; each keyword is a name and the jobs before it."""
    return [Job(name, name, (f"seed={seed}",), needs) for seed, (name, needs) in enumerate(after.items())]


def statuses(outcomes) -> dict[str, str]:
    return {o.job.name: o.state.status for o in outcomes}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def refuses(engine, sentence: str, some: list[Job]) -> None:
    """One sentence; nothing is launched, and no byte differs afterwards (the lock is an empty file)."""
    before = everything(Path.cwd())
    with pytest.raises(KdError) as raised:
        engine.run("sweep", "sweep", some)
    assert sentence in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert everything(Path.cwd()) == before
    assert engine.launcher.launched == []


# ---------------------------------------------------------------------- order


def test_jobs_run_after_those_that_they_read(engine) -> None:
    outcomes = engine.run("sweep", "sweep", jobs(student=("teacher",), teacher=(), other=(), chain=("student",)))
    assert engine.launcher.launched == [["teacher", "other"], ["student"], ["chain"]]
    assert statuses(outcomes) == dict.fromkeys(("student", "teacher", "other", "chain"), "finished")


def test_jobs_that_wait_for_one_another_are_an_error(engine) -> None:
    refuses(engine, "the jobs wait for one another: a, b", jobs(a=("b",), b=("a",), c=()))


def test_waves_ignore_jobs_that_are_not_among_them() -> None:
    (wave,) = waves(jobs(a=("elsewhere",)))
    assert [job.name for job in wave] == ["a"]


def test_what_reads_a_failed_job_is_not_started(engine) -> None:
    engine.launcher.ends["teacher"] = "failed"
    outcomes = engine.run("sweep", "sweep", jobs(teacher=(), student=("teacher",), chain=("student",), other=()))
    assert statuses(outcomes) == {"teacher": "failed", "student": "missing", "chain": "missing", "other": "finished"}
    assert outcomes[1].state.reason == "not started: teacher did not finish"
    engine.launcher.ends.clear()
    assert set(statuses(engine.run("sweep", "sweep", [o.job for o in outcomes])).values()) == {"finished"}
    assert engine.launcher.launched == [["teacher", "other"], ["teacher"], ["student"], ["chain"]]


def test_room_for_a_later_wave_is_looked_for_before_the_first(make_engine, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    engine = make_engine("hydra.launcher.n_jobs=2")
    monkeypatch.setattr(engine.launcher, "launch", lambda *_, **__: pytest.fail("launched"))
    student = Job("student", "student", ("seed=1", "hardware.devices=2"), ("teacher",))
    with pytest.raises(KdError, match=r"n_jobs = 2 is not allowed: there are 2 GPUs, and a job takes 2"):
        engine.run("sweep", "sweep", [*jobs(teacher=()), student])
    assert not engine.directory.exists()


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("arguments", [["recipe.optimizer.lr=1,1.0"], ["seed=0", "name=a,b"]])
def test_two_jobs_that_are_the_same_run(engine, tmp_path, arguments) -> None:
    with pytest.raises(KdError, match="are the same run: list each value once"):
        engine.run("sweep", "sweep", plan(engine, arguments))
    assert not list(tmp_path.iterdir())


def test_rows_of_a_study_that_are_the_same_experiment(engine, tmp_path) -> None:
    same = [Job(f"{row}/seed1", row, ("seed=1", "recipe.epochs=3", f"name={row}")) for row in ("a", "b")]
    sentence = r"^rows a and b are the same experiment \(seed 1\): change the overrides of one, or leave it out$"
    with pytest.raises(KdError, match=sentence):
        engine.run("study", "tiny", same)
    fixed = [Job(f"a/seed{n}", "a", (f"seed={n}", "seed=7", "name=a")) for n in (0, 1)]
    with pytest.raises(KdError, match=r"^row a: its seeds 0 and 1 are the same run \(seed = 7\): an override sets"):
        engine.run("study", "tiny", fixed)
    assert not list(tmp_path.iterdir())


def test_a_sweep_says_what_it_will_do(engine, capsys) -> None:
    engine.run("sweep", "sweep", jobs(a=(), b=()))
    assert capsys.readouterr().out == ""  # a search, which comes back for each batch
    engine.run("sweep", "sweep", jobs(a=(), b=(), c=()), "sweep of 3 jobs")
    assert capsys.readouterr().out == f"sweep of 3 jobs in {Path('sweep').resolve()}: 2 finished, 1 to run\n"


def test_a_job_that_does_not_compose_stops_all(engine, tmp_path) -> None:
    bad = Job("b", "b", ("recipe.epochs=0",))
    refuses(engine, "recipe.epochs = 0 is not allowed", [*jobs(a=()), bad])
    refuses(engine, "loss=kdd does not exist (near: kd, ", [*jobs(a=()), Job("b", "b", ("loss=[kdd]",))])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_complaint_says_of_which_jobs_once(engine) -> None:
    swept = plan(engine, ["recipe.epochs=1,0", "seed=0,1,2"])
    refuses(engine, "epochs=0 seed=0 and 2 more: recipe.epochs = 0 is not allowed", swept)
    with pytest.raises(KdError, match=r"^recipe.epochs = 0 is not allowed"):  # of all of them
        engine.run("sweep", "sweep", swept[3:])
    rows = [Job(f"{row}/seed{n}", row, (f"seed={n}", "recipe.epochs=0")) for row in "abcd" for n in (0, 1)]
    for some, said in ((rows, "rows a, b, c and 1 more: recipe"), (rows[:4], "rows a, b: "), (rows[:2], "row a: ")):
        with pytest.raises(KdError, match=f"^{said}"):
            engine.run("study", "tiny", some)


def test_a_directory_of_something_else(engine) -> None:
    Path("sweep").mkdir()
    Path("sweep/thesis.tex").write_text("years of work")
    refuses(engine, "sweep is not empty and not the directory of a sweep: choose another hydra.sweep.dir", jobs(a=()))


def test_a_sweep_killed_before_its_manifest_was_there_begins_again(engine) -> None:
    Path("sweep").mkdir()
    Path("sweep/sweep.lock").touch()
    Path("sweep/.sweep.json.4711.tmp").write_text('{"sche')
    assert statuses(engine.run("sweep", "sweep", jobs(a=()))) == {"a": "finished"}


def test_a_directory_of_another_sweep(engine) -> None:
    Path("sweep").mkdir()
    manifest.write(Path("sweep"), manifest.Manifest("study", "hinton", {}))
    refuses(engine, "sweep belongs to the study hinton, not to the sweep sweep: choose another", jobs(a=()))


def test_a_directory_of_another_study_of_the_same_name(engine, tmp_path) -> None:
    for place in ("here", "there"):
        (tmp_path / place / "tiny").mkdir(parents=True)
        (tmp_path / place / "tiny" / "study.yaml").write_text(f"question: {place}?")
    engine.run("study", "tiny", jobs(a=()), folder=str(tmp_path / "here" / "tiny"))
    there = str(tmp_path / "there" / "tiny")
    with pytest.raises(KdError, match=r"belongs to the study in .*here/tiny, not to the one in .*there/tiny: choose"):
        engine.run("study", "tiny", jobs(a=()), folder=there)
    (tmp_path / "here" / "tiny").rename(tmp_path / "moved")
    assert statuses(engine.run("study", "tiny", jobs(a=()), folder=there)) == {"a": "finished"}
    assert manifest.read(Path("sweep")).folder == there


def test_a_sweep_that_grows_keeps_its_jobs(engine) -> None:
    engine.run("sweep", "sweep", jobs(a=()))
    outcomes = engine.run("sweep", "sweep", jobs(a=(), b=()))
    assert engine.launcher.launched == [["a"], ["b"]]
    assert statuses(outcomes) == {"a": "finished", "b": "finished"}
    engine.run("sweep", "sweep", jobs(a=()))
    assert list(manifest.read(Path("sweep")).jobs) == ["a", "b"]


NOT_READ = [
    (
        "a/result.json",
        '{"status": "fin',
        "a/result.json cannot be read: it is not valid JSON; move that directory away",
    ),
    ("a/result.json", "[1, 2]", "a/result.json cannot be read: it is not what kd writes"),
    ("a/result.json", "{}", "a/result.json cannot be read: it is not what kd writes"),
    ("a/result.json", "\x00\x01", "a/result.json cannot be read"),
    ("a/result.json", '{"schema": 99, "status": "finished"}', "was written by a newer version of kd (schema 99"),
    ("sweep.json", '{"schema": 1', "sweep.json cannot be read: it is not what kd writes"),
    ("sweep.json", '{"schema": 1, "jobs": {"a": 3}}', "sweep.json cannot be read: it is not what kd writes"),
    ("sweep.json", '{"schema": 99}', "sweep.json was written by a newer version of kd (schema 99, known: 1)"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "text", "sentence"), NOT_READ, ids=[f"{f} {t}" for f, t, _ in NOT_READ])
def test_what_cannot_be_read_is_left_as_it_is(engine, file, text, sentence) -> None:
    engine.run("sweep", "sweep", jobs(a=(), b=()))
    engine.launcher.launched.clear()
    Path("sweep", file).write_text(text)
    refuses(engine, sentence, jobs(a=(), b=()))


def test_a_directory_with_a_run_of_another_configuration(engine) -> None:
    engine.run("sweep", "sweep", jobs(a=()))
    engine.launcher.launched.clear()
    config = engine.compose(Job("a", "a", ("recipe.epochs=7",)))
    Path("sweep/a/config.yaml").write_text(yaml.safe_dump(config))
    sentence = "sweep/a holds a run of another configuration (recipe.epochs = 7 there and 30 here; "
    refuses(engine, sentence, jobs(a=()))
    config = engine.compose(Job("a", "a", ("seed=5", "data.split_seed=0")))
    Path("sweep/a/config.yaml").write_text(yaml.safe_dump(config))
    refuses(engine, "; seed = 5 there and 0 here): remove it, or choose another hydra.sweep.dir", jobs(a=()))
    write(Path("sweep/a"), "failed")  # this is started anew anyway
    assert statuses(engine.run("sweep", "sweep", jobs(a=()))) == {"a": "finished"}


@pytest.mark.slow
def test_a_sweep_of_other_code_is_not_finished(engine, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    term = Path("own_term.py")
    term.write_text(
        "from kd.losses.logits.ce import CrossEntropy\n\n"
        "class Own(CrossEntropy):\n    def forward(self, *a): return 1.0 * super().forward(*a)\n"
    )
    own = ("loss=[ce]", "+loss.own={_target_: own_term.Own, weight: 1}")
    some = [Job("a", "a", ("seed=0", *own)), Job("b", "b", ("seed=1", *own)), Job("c", "c", ("seed=2",))]
    engine.run("sweep", "sweep", some)
    for job in some:
        config = engine.compose(job)
        Path("sweep", job.name, "config.yaml").write_text(yaml.safe_dump(config))
        write(Path("sweep", job.name), "finished", **inputs.read_by(config))
    engine.launcher.launched.clear()
    capsys.readouterr()
    engine.run("sweep", "sweep", some, opening="sweep")
    assert "3 finished, 0 to run" in capsys.readouterr().out
    term.write_text(term.read_text().replace("1.0", "0.01"))
    refuses(engine, "_target_ = own_term.Own is other code than when the run began (changed: own_term.py)", some)
    with pytest.raises(KdError, match=r"^2 of 3 runs cannot go on: "):
        engine.run("sweep", "sweep", some, opening="sweep")
    assert "finished" not in capsys.readouterr().out


def test_how_many_runs_differ_and_what_helps_in_a_study(engine) -> None:
    rows = [Job(f"{name}/seed0", name, ("seed=0", f"recipe.batch_size={size}")) for name, size in (("a", 8), ("b", 16))]
    engine.run("study", "tiny", rows)
    for job in rows:
        config = engine.compose(Job(job.name, job.label, (*job.overrides, "recipe.epochs=7")))
        Path("sweep", job.name, "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(KdError) as raised:
        engine.run("study", "tiny", rows)
    assert re.match(r"2 of 2 runs cannot go on: \S+/a/seed0 holds a run of another configuration", str(raised.value))
    assert str(raised.value).endswith("choose another hydra.sweep.dir (an argument of kd study: hydra.sweep.dir=DIR)")


def test_names_and_places_do_not_make_another_configuration(engine) -> None:
    engine.run("sweep", "sweep", jobs(a=()))
    config = engine.compose(Job("a", "a", ("name=other", "hardware.threads=1", "tags=[x]", "notes=later")))
    Path("sweep/a/config.yaml").write_text(yaml.safe_dump(config))
    engine.launcher.launched.clear()
    assert statuses(engine.run("sweep", "sweep", jobs(a=()))) == {"a": "finished"}
    assert engine.launcher.launched == []


def test_a_second_process_is_told(engine, script) -> None:
    engine.run("sweep", "sweep", jobs(a=()))
    engine.launcher.launched.clear()
    first = script(
        "import sys; from pathlib import Path; from kd.sweeps.engine import _locked\n"
        "with _locked(Path('sweep')):\n    print('locked', flush=True)\n    sys.stdin.readline()"
    )
    try:
        assert first.stdout.readline() == "locked\n"
        refuses(engine, "sweep is in use: another process runs this sweep", jobs(a=(), b=()))
    finally:
        first.kill()
        first.communicate()
    assert statuses(engine.run("sweep", "sweep", jobs(a=(), b=()))) == {"a": "finished", "b": "finished"}


def test_a_directory_that_cannot_be_made(engine) -> None:
    Path("sweep").write_text("a file")
    refuses(engine, "the sweep's directory cannot be written", jobs(a=()))


def test_a_read_only_place_is_found_out_before_anything_is_said(engine, capsys, monkeypatch, tmp_path) -> None:
    (tmp_path / "study.yaml").write_text("rows: {a: {overrides: [recipe.epochs=1, protocol.val_every=1]}}\n")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    sentence = f"directory cannot be written: {tmp_path}: no permission, or a read-only disk"
    with pytest.raises(KdError, match=sentence):
        engine.run("sweep", "sweep", jobs(a=()), "sweep of 1 job")
    with pytest.raises(KdError, match=sentence):  # --dry-run
        study.sweep(engine, str(tmp_path), (), None, True, ())
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------- launchers


def test_a_launcher_that_raises_loses_no_result(engine) -> None:
    def lost(overrides, initial_job_idx):
        write(Path("sweep/a"), "finished")
        write(Path("sweep/b"), "running")
        raise RuntimeError("log\nsubmitit: job 3 has no output")

    engine.launcher.launch = lost
    outcomes = engine.run("sweep", "sweep", jobs(a=(), b=(), c=()))
    reason = "the launcher says: submitit: job 3 has no output"
    assert [(o.state.status, o.state.reason) for o in outcomes] == [
        ("finished", ""),
        ("interrupted", reason),  # it goes on from its checkpoint
        ("failed", reason),
    ]
    assert json.loads(Path("sweep/c/result.json").read_text())["overrides"] == ["seed=2"]


def test_a_launcher_that_says_nothing(engine) -> None:
    engine.launcher.launch = lambda overrides, initial_job_idx: write(Path("sweep/a"), "running")
    outcomes = engine.run("sweep", "sweep", jobs(a=(), b=()))
    assert [(o.state.status, o.state.reason) for o in outcomes] == [
        ("interrupted", "it stopped without a record"),
        ("failed", "the launcher did not run it"),
    ]


def test_bad_input_to_the_launcher_is_said_as_it_is(make_engine) -> None:
    engine = make_engine(f"hydra.launcher.n_jobs={os.cpu_count() + 1}", "hardware=cpu")
    with pytest.raises(KdError, match=r"hydra.launcher.n_jobs = \d+ is not allowed: there are \d+ cores"):
        engine.run("sweep", "sweep", jobs(a=(), b=()))
    assert not Path("sweep/a").exists()


def test_a_run_of_another_process_is_left_alone(engine) -> None:
    write(Path("sweep/a"), "running")
    before = Path("sweep/a/result.json").read_bytes()
    engine.launcher.launch = lambda overrides, initial_job_idx: write(Path("sweep/b"), "finished")
    (Path("sweep") / manifest.FILE).unlink(missing_ok=True)
    manifest.write(Path("sweep"), manifest.Manifest("sweep", "sweep", {}))
    with lock.held(Path("sweep/a") / lock.RUN):
        outcomes = engine.run("sweep", "sweep", jobs(a=(), b=()))
    assert [(o.state.status, o.state.reason) for o in outcomes] == [
        ("running", "another process trains in it"),
        ("finished", ""),
    ]
    assert Path("sweep/a/result.json").read_bytes() == before
