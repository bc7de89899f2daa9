"""A grid is planned: every combination once, named by what differs; what cannot be a grid costs one sentence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kd.errors import KdError
from kd.sweeps.grid import LONGEST, directory_name, plan, short_names


@pytest.fixture
def planned(context: Any) -> Any:
    return lambda *arguments: plan(SimpleNamespace(context=context), list(arguments))  # type: ignore[arg-type]


def test_every_combination_is_a_job_named_by_what_differs(planned: Any) -> None:
    jobs = planned("loss=[ce],[ce,kd]", "seed=0,1", "recipe.epochs=2", "teacher.checkpoint=a/b")
    assert [job.name for job in jobs] == [
        "loss-ce_seed-0",
        "loss-ce_seed-1",
        "loss-ce+kd_seed-0",
        "loss-ce+kd_seed-1",
    ]
    assert [job.label for job in jobs][2] == "loss=[ce,kd] seed=0"
    assert jobs[2].overrides == ("loss=[ce,kd]", "seed=0", "recipe.epochs=2", "teacher.checkpoint=a/b")
    assert jobs[2].after == ()


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("seed=range(3)", ["0", "1", "2"]),
        ("seed=range(1,7,3)", ["1", "4"]),
        ("recipe.optimizer.lr=choice(0.1,1e-3)", ["0.1", "0.001"]),
        ("hardware=glob(d*)", ["ddp", "ddp_cpu"]),
        ("+recipe.x='a b',c", ["'a b'", "c"]),
    ],
)
def test_what_sweeps(planned: Any, argument: str, values: list[str]) -> None:
    key = argument.partition("=")[0]
    assert [job.overrides for job in planned(argument)] == [(f"{key}={value}",) for value in values]


def test_one_value_is_one_job(planned: Any) -> None:
    (job,) = planned("seed=3", "~recipe.gradient_clip", "hydra.launcher.n_jobs=2")
    assert (job.name, job.label) == ("job", "single job")
    assert job.overrides == ("seed=3", "~recipe.gradient_clip")  # Hydra's own is no setting of the job
    assert [job.overrides for job in planned()] == [()]


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["seed", "loss.kd.temperature"]) == {"seed": "seed", "loss.kd.temperature": "temperature"}
    assert short_names(["loss.kd.weight", "loss.at.weight", "+x.y"]) == {
        "loss.kd.weight": "kd.weight",
        "loss.at.weight": "at.weight",
        "+x.y": "y",
    }
    assert short_names(["seed", "data.seed"]) == {"seed": "seed", "data.seed": "data.seed"}


def test_directory_names_need_no_quotes_and_stay_short() -> None:
    assert directory_name({"loss": "[ce, kd]", "lr": "1e-3", "path": "'a/b c'"}) == "loss-ce+kd_lr-1e-3_path-a-b-c"
    long = [directory_name({"hidden": f"[{','.join(['800'] * 40)},{last}]"}) for last in (1, 2)]
    assert [len(name) for name in long] == [LONGEST, LONGEST]
    assert long[0] != long[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["seed=range(0,0)"], r"seed=range\(0,0\) is a sweep over nothing"),
        (["experiment=glob(nothing_*)"], r"experiment=glob\(nothing_\*\) is a sweep over nothing"),
        (["seed=0,1,0"], "seed=0,1,0 lists 0 twice"),
        (["recipe.optimizer.lr=interval(0,1)"], "an interval has no list of values.*optuna"),
        (["teacher.checkpoint=a/b,a-b"], "a/b and checkpoint=a-b would share the directory checkpoint-a-b"),
        (["seed=[0"], r"seed=\[0 cannot be read as KEY=VALUE"),
    ],
)
def test_what_is_no_grid_is_said(planned: Any, arguments: list[str], sentence: str) -> None:
    with pytest.raises(KdError, match=sentence):
        planned(*arguments)
