"""The plan of a sweep: which jobs, their names, and what is refused before anything is written."""

from __future__ import annotations

import pytest

from kd.errors import KdError
from kd.sweeps.grid import LONGEST, directory_name, plan, short_names


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
