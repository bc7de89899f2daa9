"""Every option of every group composes and passes the checks; every experiment and every recipe builds."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object

from kd.config.compose import checked
from kd.config.composition import CONF
from kd.config.instantiate import make
from kd.config.signature import arguments
from tests.test_image_presets import PRESETS as OF_IMAGES
from tests.test_text_presets import PRESETS as OF_TEXT

OPTIONS = [(f.parent.name, f.stem) for f in sorted(CONF.glob("*/*.yaml")) if not f.name.startswith("_")]
OF_TRAINING = [(group, option) for group, option in OPTIONS if group != "cost"]  # that group is of kd cost
LISTS = ("loss", "logger", "callbacks")  # groups of which several options are chosen at once


@functools.cache
def config_of(*overrides: str) -> dict[str, Any]:
    """The composed and checked config; composing takes 0.2 s, and several tests ask for the same one."""
    return checked(overrides)


def options(group: str) -> list[str]:
    return [option for g, option in OPTIONS if g == group]


def choice(group: str, option: str) -> list[str]:
    """The overrides that choose an option."""
    if group == "model":
        roles = ("teacher",) if option == "none" else ("student", "teacher")
        return [f"model@{role}={option}" for role in roles]
    return [f"{group}=[{option}]" if group in LISTS else f"{group}={option}"]


@pytest.mark.slow
@pytest.mark.parametrize(("group", "option"), OF_TRAINING, ids=["/".join(o) for o in OF_TRAINING])
def test_every_option_composes_and_passes_the_checks(group: str, option: str) -> None:
    config_of(*choice(group, option))


def test_every_group_is_covered() -> None:
    groups = {group for group, _ in OPTIONS}
    assert groups == {folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra"}
    flat = [file.relative_to(CONF) for file in CONF.rglob("*.yaml") if "hydra" not in file.relative_to(CONF).parts]
    nested = [file for file in flat if len(file.parts) > 2]
    assert not nested, "groups are flat: experiment=glob(*) does not see folders inside"


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=["/".join(o) for o in OPTIONS])
def test_every_file_says_first_what_it_is(group: str, option: str) -> None:
    lines = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    first = lines[1] if lines[0] == "# @package _global_" else lines[0]
    assert re.match(r"# \w.{20,}", first)


@pytest.mark.parametrize("name", options("loss"))
def test_a_loss_file_holds_one_term_named_like_the_file(name: str) -> None:
    assert list(config_of(*choice("loss", name))["loss"]) == [name]


# ---------------------------------------------------------------------- data


def needed(name: str) -> list[str]:
    """What a data set must be told beside its name."""
    return ["data.folder=somewhere"] if name in ("imagefolder", "segmentation") else []


@pytest.mark.parametrize("name", options("data"))
def test_every_data_set_takes_the_keys_of_its_file(name: str) -> None:
    """Known from the source alone, so that a typo stops before torch; and the values are those it allows."""
    config = config_of(f"data={name}", *needed(name))
    known = arguments(config["data"]["_target_"])
    assert not known.any
    assert set(config["data"]) - {"_target_"} <= set(known.names)
    data = make(config["data"], "data")
    assert data.batch_size == config["recipe"]["batch_size"]


# ---------------------------------------------------------------------- experiments


def header(name: str) -> list[str]:
    """The comment lines at the top of an experiment, without the package directive and the signs."""
    lines = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("# ") for line in lines[1:end]]


@pytest.mark.parametrize("name", options("experiment"))
def test_an_experiment_opens_with_its_command_cost_and_expectation(name: str) -> None:
    command, *expectation = header(name)
    words, cost = re.fullmatch(r"(kd train .*?) {2,}(\S.*)", command).groups()
    assert re.search(r"\b(s|min|hours?)\b", cost)
    assert expectation
    overrides = shlex.split(words)[2:]
    assert overrides[0] == f"experiment={name}"
    assert config_of(*overrides)["name"] == name


def teacher_of(name: str) -> str:
    """The teacher in an experiment's name, ``DATA_METHOD_TEACHER_STUDENT``; the small MLPs are not spelt out."""
    return max((model for model in options("model") if f"_{model}_" in name), key=len, default="mlp_teacher")


def fake_data(config: dict[str, Any]) -> list[str]:
    """Made-up images of the same shape and classes as the set of a config."""
    data = make(config["data"], "data")
    shape = ",".join(str(edge) for edge in data.input_shape)
    classes = getattr(data, "num_classes", 10)  # a folder's are known only when it is read
    few = [f"data.train_images={4 * classes}", f"data.test_images={classes}"]
    return ["data=fake", f"data.shape=[{shape}]", f"data.num_classes={classes}", *few]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in options("experiment") if name not in {*OF_TEXT, *OF_IMAGES}])
def test_an_experiment_builds(name: str) -> None:
    from kd.run import build

    config = config_of(f"experiment={name}")
    overrides = [f"experiment={name}", *fake_data(config)]
    supplied = get_object(config["distiller"]["_target_"]).supplies_teacher
    taught = bool(build.objective(config).needs("teacher")) and not supplied
    if taught:
        overrides += [f"model@teacher={teacher_of(name)}", "teacher.allow_random=true"]
    config = config_of(*overrides)
    module = build.distiller(config, build.datamodule(config))
    assert list(module.objective.terms) == list(config["loss"])
    assert (module.teacher is None) == (not taught)


# ---------------------------------------------------------------------- recipes and terms


@pytest.mark.parametrize("name", options("recipe"))
def test_a_recipes_optimiser_and_scheduler_can_be_made(name: str) -> None:
    from kd.run import build

    config = config_of(f"recipe={name}")
    module = build.distiller(config, build.datamodule(config))
    made = module.configure_optimizers()
    optimizer = made["optimizer"]
    assert max(group["lr"] for group in optimizer.param_groups) == config["recipe"]["optimizer"]["lr"]
    assert ("lr_scheduler" in made) == (config["recipe"]["scheduler"] is not None)
    for _ in range(config["recipe"]["epochs"] or config["recipe"]["steps"]):
        optimizer.step()
        if "lr_scheduler" in made:
            made["lr_scheduler"]["scheduler"].step()
    assert 0 <= optimizer.param_groups[0]["lr"] <= config["recipe"]["optimizer"]["lr"]


@pytest.mark.parametrize("name", options("loss"))
def test_a_term_can_be_made_with_the_settings_of_its_file(name: str) -> None:
    from kd.run import build

    config = config_of(*choice("loss", name))
    assert list(build.objective(config).terms) == [name]


def test_files_of_the_checkout_are_the_ones_tested() -> None:
    assert Path(__file__).parents[1] / "conf" == CONF
