"""The plan of a sweep: which jobs, their names, and what is refused before anything is written."""

from __future__ import annotations

import pytest

from kd.errors import KdError
from kd.sweeps import grid
from kd.sweeps.grid import LONGEST, directory_name, plan, short_names, sweep


def test_every_combination_is_a_job_named_by_what_differs(engine) -> None:
    jobs = plan(engine, ["loss=[ce],[ce,kd]", "recipe.epochs=3", "seed=0,1", "hydra.launcher.n_jobs=2"])
    assert [(job.name, job.label) for job in jobs] == [
        ("loss-ce_seed-0", "loss=[ce] seed=0"),
        ("loss-ce_seed-1", "loss=[ce] seed=1"),
        ("loss-ce+kd_seed-0", "loss=[ce,kd] seed=0"),
        ("loss-ce+kd_seed-1", "loss=[ce,kd] seed=1"),
    ]
    assert jobs[2].overrides == ("loss=[ce,kd]", "recipe.epochs=3", "seed=0")
    assert {job.after for job in jobs} == {()}


def test_a_range_and_a_glob_are_lists(engine) -> None:
    assert [job.name for job in plan(engine, ["seed=range(1,4)"])] == ["seed-1", "seed-2", "seed-3"]
    assert {job.name for job in plan(engine, ["experiment=glob(digits_*)"])} == {
        "experiment-digits-alone",
        "experiment-digits-kd",
        "experiment-digits-teacher",
    }


def test_nothing_swept_is_one_job(engine) -> None:
    (job,) = plan(engine, ["recipe.epochs=3", "~loss.ce", "+tags=[a]"])
    assert (job.name, job.label) == ("job", "single job")
    assert job.overrides == ("recipe.epochs=3", "~loss.ce", "+tags=[a]")


def test_the_keys_of_a_term_belong_to_the_jobs_that_have_it(engine, capsys, monkeypatch) -> None:
    every = plan(engine, ["loss=[ce],[ce,kd]", "loss.kd.temperature=1,4", "loss.kd.weight=0.5", "seed=0"])
    assert [(job.name, job.label, job.overrides) for job in dict.fromkeys(every)] == [
        ("loss-ce", "loss=[ce]", ("loss=[ce]", "seed=0")),
        *(
            (
                f"loss-ce+kd_temperature-{t}",
                f"loss=[ce,kd] temperature={t}",
                ("loss=[ce,kd]", f"loss.kd.temperature={t}", "loss.kd.weight=0.5", "seed=0"),
            )
            for t in (1, 4)
        ),
    ]
    assert len(every) == 4
    teacher = ["model@teacher=mlp", "teacher.allow_random=true"]
    monkeypatch.setattr(grid, "print_results", lambda *_: None)  # the records are bare
    sweep(engine, ["loss=[ce],[ce,kd]", "loss.kd.temperature=1,4", *teacher])
    assert "sweep of 3 jobs (4 combinations: " in capsys.readouterr().out
    assert engine.launcher.launched == [["loss-ce", "loss-ce+kd_temperature-1", "loss-ce+kd_temperature-4"]]


def test_an_experiment_chooses_terms_as_well(engine) -> None:
    every = plan(engine, ["experiment=digits_alone,digits_kd", "loss.kd.temperature=1,4", "seed=0,1"])
    assert [job.label for job in dict.fromkeys(every)] == [
        *("experiment=digits_alone seed=0", "experiment=digits_alone seed=1"),
        *(f"experiment=digits_kd temperature={t} seed={s}" for t in (1, 4) for s in (0, 1)),
    ]
    named = plan(engine, ["experiment=digits_kd", "loss=[ce],[ce,kd]"])
    assert [list(engine.compose(job)["loss"]) for job in named] == [["ce"], ["ce", "kd"]]


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("loss.hint.weight=1,2", "loss.hint.weight=1 cannot be set: hint is not among the chosen loss terms (ce)"),
        ("loss.kdd.weight=1,2", "loss.kdd.weight=1: there is no option loss.kdd (near: loss.kd"),
        (
            "loss.kd.temprature=1,2",
            "loss.kd.temprature is not an argument of kd.losses.logits.kd.KnowledgeDistillation",
        ),
    ],
)
def test_a_key_of_a_term_that_no_job_has_is_a_mistake(engine, tmp_path, key, sentence) -> None:
    with pytest.raises(KdError) as raised:
        sweep(engine, ["loss=[ce],[ce,kd]", key, "model@teacher=mlp", "teacher.allow_random=true"])
    assert sentence in str(raised.value)
    assert not list(tmp_path.iterdir())


BAD = [
    (["seed=range(0,0)"], "seed=range(0,0) is a sweep over nothing"),
    (["experiment=glob(nothing*)"], "experiment=glob(nothing*) is a sweep over nothing"),
    (["seed=1,2,1"], "seed=1,2,1 lists 1 twice"),
    (["name=a/b,a-b"], "the jobs name=a/b and name=a-b would share the directory name-a-b"),
    (["loss.ce.weight=interval(0,1)"], "loss.ce.weight=interval(0,1): an interval has no list of values"),
    (["seed=[1,2"], "seed=[1,2 cannot be read as KEY=VALUE"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[a[0] for a, _ in BAD])
def test_bad_sweeps_are_refused(engine, tmp_path, arguments, sentence) -> None:
    with pytest.raises(KdError) as raised:
        plan(engine, arguments)
    assert str(raised.value).startswith(sentence)
    assert not list(tmp_path.iterdir())


def test_a_name_is_as_short_as_it_is_clear() -> None:
    assert short_names(["loss.kd.temperature", "seed"]) == {"loss.kd.temperature": "temperature", "seed": "seed"}
    assert short_names(["loss.kd.weight", "loss.ce.weight", "+student.model.weight_scale"]) == {
        "loss.kd.weight": "kd.weight",
        "loss.ce.weight": "ce.weight",
        "+student.model.weight_scale": "weight_scale",
    }


def test_a_directory_needs_no_quotes_and_is_not_too_long() -> None:
    assert directory_name({"loss": "[ce, kd]", "name": "'a b/c'"}) == "loss-ce+kd_name-a-b-c"
    assert directory_name({"lr": "-1e-3"}) != directory_name({"lr": "1e-3"})
    a, b = (directory_name({"name": "x" * 200 + end}) for end in "ab")
    assert len(a) == len(b) == LONGEST
    assert a != b
