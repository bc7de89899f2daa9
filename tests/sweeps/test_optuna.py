"""A search by Optuna chooses, trains, prunes, survives a kill, and says what is wrong in one sentence."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from bare_records import write
from hydra.core.override_parser.overrides_parser import OverridesParser

from kd.cli.main import main
from kd.errors import KdError
from kd.records import manifest, record, sources, trials
from kd.report import gather
from kd.run.pruning import StopWhenPruned, Trial, callback
from kd.sweeps import options
from kd.sweeps.options import Settings
from kd.sweeps.optuna import Search
from kd.sweeps.space import Space, space
from kd.sweeps.terms import Terms

pytestmark = pytest.mark.slow

TINY = ["data=fake", "data.train_images=64", "recipe.epochs=3", "protocol.val_every=1", "hardware=cpu"]
LR = "recipe.optimizer.lr=tag(log,interval(1e-4,1e-1))"
SEARCH = [
    *("hydra/sweeper=optuna", *TINY, "student.model.hidden=[8]", LR, "hydra.sweeper.n_trials=4"),
    "hydra.sweeper.objectives=val/nll",
    # two by chance, then by what was measured; the launcher runs one at a time, so that it is easy to kill in between
    "hydra.sweeper.sampler={_target_: optuna.samplers.TPESampler, n_startup_trials: 2}",
    "hydra.sweeper.pruner={_target_: optuna.pruners.MedianPruner, n_startup_trials: 1}",
    "hydra.sweeper.batch=2",
]
TWO = [
    *("hydra/sweeper=optuna", *TINY, "recipe.epochs=1", "student.model.hidden=[4],[8]", "recipe.optimizer.lr=0.1,-1"),
    *("hydra.sweeper.objectives={val/acc1: maximize, macs: minimize}", "hydra.sweeper.sampler=nsga2"),
    *("hydra.sweeper.seed=2", "hydra.sweep.dir=two"),
]
BAD = {
    "": "a search needs something to search over",
    f"{LR} hydra.sweeper.n_trials=0": "n_trials = 0 is not allowed: it must be a whole number, 1 or more",
    f"{LR} hydra.sweeper.objectives=[val/acc]": r"there is no measure val/acc \(near: .*val/acc1.*; measures: .*macs",
    f"{LR} hydra.sweeper.objectives=[test/acc1]": "test/acc1 is not allowed: .* choose by val/acc1",
    f"{LR} hydra.sweeper.objectives={{val/acc1:minimize}}": "val/acc1 = minimize is not allowed: .* maximize",
    f"{LR} hydra.sweeper.objectives=[]": "objectives is empty",
    f"{LR} hydra.sweeper.objectives=[val/acc1,macs] hydra.sweeper.pruner=median": "a pruner compares one metric",
    f"{LR} hydra.sweeper.storage=sqlite:////nowhere/o.db": "sqlite:////nowhere/o.db cannot be used: .*unable to open",
    f"{LR} hydra.sweeper.sampler={{_target_:optuna.samplers.TPESampler,sed:1}}": "sampler: .*unexpected.* 'sed'",
    "loss=[ce],[kd]": "loss.kd needs a teacher",
    "recipe.epochs=interval(1,5)": r"write int\(interval\(…\)\) for whole numbers",
    "recipe.optimizer.lr=0.1,0.1": "lists 0.1 twice",
    f"hydra/sweeper=resumable {LR}": "an interval has no list of values: .* hydra/sweeper=optuna",
}
DRIVER = """
import contextlib, io, json, os, random, signal, sys, time
from pathlib import Path
from kd.cli.main import main

def said(arguments):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = main(["train", "-m", *arguments])
    return code, text.getvalue()

def killed(arguments, sign, seed):
    child = os.fork()  # this process has imported everything, and no torch operation has run in it
    if child == 0:
        said(arguments)
        os._exit(0)
    limit = time.monotonic() + 200
    while not Path(sign).exists() and time.monotonic() < limit:
        time.sleep(0.02)
    time.sleep(random.Random(seed).uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1], Path(sign).exists()

commands, victim = json.load(sys.stdin)
answers = [said(commands[0]), killed(*victim), *(said(arguments) for arguments in commands[1:])]
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """One process, many commands. Their directory, and exit codes and words: first of the undisturbed search, then of
    one that was killed (its wait status), gone on with, of two objectives, gone on with, changed, and all bad ones.
    """
    folder = tmp_path_factory.mktemp("searches")
    bad = [["hydra/sweeper=optuna", *TINY, "hydra.sweep.dir=bad", *words.split()] for words in BAD]
    undisturbed = [*SEARCH, "hydra.sweep.dir=undisturbed", "hydra.sweeper.storage=sqlite:///optuna.db"]
    interrupted = [*SEARCH, "hydra.sweep.dir=killed"]
    two = [[*TWO, "hydra.sweeper.n_trials=4"], [*TWO, "hydra.sweeper.n_trials=5"], [*TWO, "data.batch_size=16"]]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([[undisturbed, interrupted, *two, *bad], [interrupted, "killed/trial-0002/config.yaml", 7]]),
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def kept_trials(folder: Path, name: str, url: str | None = None) -> list[Any]:
    store = trials.open_storage(folder / name, url and f"sqlite:///{folder / url}")
    return optuna.load_study(study_name=name, storage=store).get_trials()


def jobs(found: list[Any]) -> list[tuple[Any, ...]]:
    """What a search has found, whatever the numbers of the trials."""
    return [(trials.job_of(t), t.params, t.state.name, t.values, t.intermediate_values) for t in found]


# ---------------------------------------------------------------------- what is searched


def parsed(*arguments: str) -> Space:
    return space(OverridesParser.create(), arguments)


def test_the_grammar_becomes_distributions() -> None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    cases = {
        "a=interval(1,8)": FloatDistribution(1.0, 8.0),
        "a=int(interval(1,8))": IntDistribution(1, 8),
        "a=tag(log,interval(1e-4,1e-1))": FloatDistribution(1e-4, 1e-1, log=True),
        "a=tag(log,int(interval(1,64)))": IntDistribution(1, 64, log=True),
        "a=range(0,10,3)": IntDistribution(0, 9, step=3),
        "a=range(10,0,-3)": IntDistribution(1, 10, step=3),
        "a=range(0,1,0.3)": FloatDistribution(0.0, 0.9, step=0.3),
        "a=choice([ce],[ce,kd])": CategoricalDistribution(("[ce]", "[ce,kd]")),
    }
    for line, distribution in cases.items():
        assert parsed(line).axes == {"a": distribution}, line


def test_a_trial_is_a_complete_command_and_a_short_label() -> None:
    found = parsed("loss=[ce]", "recipe.optimizer.lr=tag(log,interval(1e-5,1e-1))", "+x.n=int(interval(1,8))")
    values = {"recipe.optimizer.lr": 0.1 / 3, "+x.n": 4}
    assert found.overrides(values) == ("loss=[ce]", f"recipe.optimizer.lr={0.1 / 3!r}", "+x.n=4")
    assert found.label(values) == "lr=0.03333 n=4"
    assert found.corners() == [
        {"recipe.optimizer.lr": 1e-5, "+x.n": 1},
        {"recipe.optimizer.lr": 0.1, "+x.n": 1},
        {"recipe.optimizer.lr": 1e-5, "+x.n": 8},
    ]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("a=1", "needs something to search over"),
        ("a=tag(lag,interval(1,2))", r"there is no tag lag \(near: log\)"),
        ("a=tag(log,choice(1,2))", "the tag log goes with an interval"),
        ("a=tag(log,interval(0,1))", "must begin above 0"),
        ("a=interval(2,1)", "must be below the second"),
        ("a=interval(0,inf)", "both finite"),
        ("a=range(1,1)", "is a sweep over nothing"),
    ],
)
def test_an_axis_that_holds_nothing_is_refused(line: str, sentence: str) -> None:
    with pytest.raises(KdError, match=sentence):
        parsed(line)


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("n_trials", None, "n_trials = null is not allowed"),
        ("batch", 0, "batch = 0 is not allowed: it must be a whole number, 1 or more, or null"),
        ("seed", -1, "seed = -1"),
        ("sampler", None, "sampler = None is not allowed: it must be tpe, random, nsga2 or a node"),
        ("pruner", "medain", r"pruner = medain is not allowed \(near: median\)"),
        ("storage", "o.db", "it must be a URL, for that file sqlite:///o.db"),
    ],
)
def test_an_option_that_is_not_allowed(option: str, value: Any, sentence: str) -> None:
    with pytest.raises(KdError, match=sentence):
        Settings(**{"n_trials": 1, option: value})


def test_a_trial_draws_the_same_numbers_whenever_it_is_asked() -> None:
    def drawn(number: int, seed: int | None, node: Any = "random") -> float:
        study = optuna.create_study(sampler=options.sampler(node, seed, number))
        return study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}).params["x"]

    assert drawn(3, 0) == drawn(3, 0)
    assert len({drawn(3, 0), drawn(4, 0), drawn(3, 1), drawn(3, None), drawn(3, None)}) == 5
    assert drawn(3, 9, {"_target_": "optuna.samplers.RandomSampler", "seed": 0}) == drawn(3, 0)


def test_without_optuna_one_sentence_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["train", "-m", "hydra/sweeper=optuna", LR, f"hydra.sweep.dir={tmp_path / 'none'}"]) == 1
    assert "pip install 'kd[optuna]'" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------------- what is kept


def test_a_journal_cut_in_a_line_is_mended(tmp_path: Path) -> None:
    study = optuna.create_study(study_name="s", storage=trials.open_storage(tmp_path, None))
    study.ask()
    journal = tmp_path / trials.JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole[:20])
    trials.truncate_torn_line(journal)
    assert journal.read_bytes() == whole
    trials.truncate_torn_line(tmp_path / "none")
    assert len(optuna.load_study(study_name="s", storage=trials.open_storage(tmp_path, None)).trials) == 1


def test_a_storage_that_is_away_stops_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = trials.open_storage(tmp_path, None)
    study = optuna.create_study(study_name="s", storage=store)
    trial = Trial(study, store, study.ask()._trial_id + 99)
    assert trial.report(1, 0.5) is False
    assert "not reported to the search" in caplog.text


def test_a_run_of_its_own_has_no_callback(tmp_path: Path) -> None:
    assert callback(tmp_path / "run") is None


def test_a_search_of_other_code_is_refused(make_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its first trial does not run that code."""
    monkeypatch.syspath_prepend(Path.cwd())
    Path("own_term.py").write_text("def own(): return 1.0\n")
    engine, where = make_engine(), parsed("recipe.epochs=1,2")
    engine.directory.mkdir()

    def search() -> Search:
        chooses = options.sampler("tpe", 0, 0)
        return Search(engine, where, {"val/acc1": "maximize"}, Settings(2), chooses)

    study = search().study
    for number, code in enumerate(({}, {"own_term.own": sources.code_of("own_term.own")})):
        job = {"job": f"trial-{number:04d}"}
        epochs = {"params": {"recipe.epochs": str(number + 1)}, "distributions": dict(where.axes)}
        study.add_trial(optuna.trial.create_trial(value=0.5, user_attrs=job, **epochs))
        write(engine.directory / job["job"], "finished", code_read=code)
    search()
    Path("own_term.py").write_text("def own(): return 0.01\n")
    sentence = r"_target_ = own_term.own is other code than when the run began \(changed: own_term.py\): choose another"
    with pytest.raises(KdError, match=sentence):
        search()


# ---------------------------------------------------------------------- searches


def test_a_search_ends_with_its_table_and_the_command_of_the_best(said: tuple[Path, Any]) -> None:
    folder, ((code, text), *_) = said
    found = kept_trials(folder, "undisturbed", "optuna.db")
    assert code == 0, text
    assert [trials.job_of(t) for t in found] == [f"trial-{i:04d}" for i in range(4)]
    for trial in found:
        result = record.read(folder / "undisturbed" / str(trials.job_of(trial)))
        assert result["overrides"][-1] == f"recipe.optimizer.lr={trial.params['recipe.optimizer.lr']!r}"
        if trial.state.name == "COMPLETE":
            assert trial.value == result["student"]["selected"]["val"]["nll"]
    best = min((t for t in found if t.state.name == "COMPLETE"), key=lambda t: t.value)
    command = rf"best: {trials.job_of(best)}  val/nll .*\n  kd train .*recipe.optimizer.lr={best.params.popitem()[1]}"
    assert re.search(command, text)


def test_pruning_stops_a_run_and_the_report_says_so(said: tuple[Path, Any]) -> None:
    folder, ((_, text), *_) = said
    pruned = [t for t in kept_trials(folder, "undisturbed", "optuna.db") if t.state.name == "PRUNED"]
    assert pruned
    study, frame = gather.read_sweep(folder / "undisturbed")
    for trial in pruned:
        run_dir = folder / "undisturbed" / str(trials.job_of(trial))
        result = record.read(run_dir)
        epochs = result["pruned"]["epoch"] + 1
        assert epochs < 3
        assert list(trial.intermediate_values) == list(range(1, epochs + 1))
        assert result["pruned"]["val"]["nll"] == pytest.approx(trial.intermediate_values[epochs])
        assert "student" not in result
        assert not (run_dir / "student_last.safetensors").exists()
        with (run_dir / "metrics.csv").open() as handle:
            assert max(int(row["epoch"]) for row in csv.DictReader(handle)) == epochs - 1
        label = f"lr={trial.params['recipe.optimizer.lr']:.4g}"
        assert re.search(rf"{label}.*pruned at epoch {epochs}", text)
        assert list(frame[frame["row"] == label]["status"]) == ["pruned"]
        assert study.rows[label].values["lr"] == pytest.approx(trial.params["recipe.optimizer.lr"], rel=1e-3)
    assert (frame["status"] == "finished").sum() == 4 - len(pruned)


def test_a_killed_search_goes_on_to_the_same_trials(said: tuple[Path, Any]) -> None:
    folder, (_, (status, began), (code, text), *_) = said
    assert (os.WTERMSIG(status), began) == (signal.SIGKILL, True)
    # the first batch was told before the kill and is not run again; the second was not
    assert code == 0, text
    assert re.findall(r"^  (./.)  lr=", text, re.MULTILINE) == ["3/4", "4/4"]
    assert jobs(kept_trials(folder, "killed")) == jobs(kept_trials(folder, "undisturbed", "optuna.db"))


def test_two_objectives_and_failures(said: tuple[Path, Any]) -> None:
    folder, (_, _, _, (first_code, first), (again_code, again), (changed_code, changed), *_) = said
    found = kept_trials(folder, "two")
    failed = [t for t in found if t.state.name == "FAIL"]
    complete = [t for t in found if t.state.name == "COMPLETE"]
    assert failed
    assert complete
    assert {t.params["recipe.optimizer.lr"] for t in failed} == {"-1"}
    for trial in complete:
        student = record.read(folder / "two" / str(trials.job_of(trial)))["student"]
        assert trial.values == [student["selected"]["val"]["acc1"], student["macs"]]
    assert first_code == again_code == 1
    assert "Invalid learning rate: -1" in first
    assert "jobs have no result (the same command again runs what is missing)" in first
    assert "Pareto front" in first
    assert "drew the values of an earlier one" in first
    # what failed was tried once more, in its own directory; the fifth trial is new
    assert len([t for t in found if "retries" not in t.user_attrs]) == 5
    retried = {t.user_attrs["retries"]: trials.job_of(t) for t in found if "retries" in t.user_attrs}
    assert retried == {t.number: trials.job_of(t) for t in failed if t.number < 4}
    assert re.findall(r"^  (./.)  ", again, re.MULTILINE)[-1] == "5/5"
    assert changed_code == 1
    assert re.search("two holds another search .*data.batch_size=16 only here", changed)


def test_the_keys_of_a_term_belong_to_the_trials_that_have_it(engine) -> None:
    where = parsed("loss=[ce],[ce,kd]", "loss.kd.temperature=interval(1,8)", "seed=0")
    where = replace(where, applying=Terms(engine, [where.overrides(c) for c in where.corners()]).applying)
    without, other, having = (
        {"loss": loss, "loss.kd.temperature": t} for loss, t in (("[ce]", 2.0), ("[ce]", 3.0), ("[ce,kd]", 2.0))
    )
    assert where.overrides(without) == where.overrides(other) == ("seed=0", "loss=[ce]")
    assert where.overrides(having) == ("seed=0", "loss=[ce,kd]", "loss.kd.temperature=2.0")
    assert [where.label(p) for p in (without, having)] == ["loss=[ce]", "loss=[ce,kd] temperature=2"]


def test_a_report_lists_a_trial_that_could_not_begin(tmp_path: Path) -> None:
    from kd.sweeps.job import ensure_record

    listed = {
        "trial-0000": manifest.Job("trial-0000", "seed=3 T=2", ("seed=3", "loss.kd.temperature=2")),
        "trial-0001": manifest.Job("trial-0001", "teacher=a", ("seed=3", "teacher.checkpoint=a")),
        "trial-0002": manifest.Job("trial-0002", "teacher=b", ("seed=3", "teacher.checkpoint=b")),
    }
    manifest.write(tmp_path, manifest.Manifest("optuna", "s", listed))
    ensure_record(tmp_path / "trial-0000", listed["trial-0000"].overrides, "failed", "there is no teacher")
    _, frame = gather.read_sweep(tmp_path)
    assert frame.iloc[0][["row", "seed", "status", "error"]].tolist() == ["T=2", 3, "failed", "there is no teacher"]
    assert list(frame["row"]) == ["T=2", "teacher=a", "teacher=b"]


def test_bad_input_is_one_sentence_and_nothing_is_written(said: tuple[Path, Any]) -> None:
    folder, answers = said
    for sentence, (code, text) in zip(BAD.values(), answers[-len(BAD) :], strict=True):
        assert code == 1, text
        assert re.fullmatch(rf"kd: .*{sentence}.*\n", text), f"{sentence}: {text}"
    assert not (folder / "bad").exists()


def test_the_last_validation_is_reported_but_stops_nothing() -> None:
    class Always(Trial):
        def __init__(self) -> None:
            self.seen: list[tuple[int, float]] = []

        def report(self, step: int, value: float) -> bool:
            self.seen.append((step, value))
            return True

    class Trainer:
        callback_metrics: dict[str, float] = {"val/acc1": 0.25}  # noqa: RUF012
        state = type("State", (), {"fn": "fit"})
        max_epochs, current_epoch, should_stop = 3, 2, False

    trial, trainer = Always(), Trainer()
    stopper = StopWhenPruned("val/acc1", trial)
    stopper.on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert (trial.seen, trainer.should_stop, stopper.epoch) == ([(3, 0.25)], False, None)
    trainer.current_epoch = 1
    stopper.on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert (trainer.should_stop, stopper.epoch) == (True, 1)
