"""Every preset that begins from ``_cifar100`` or ``_imagenet``: recipe and numbers are the published ones; it trains.

The facts, apart from the presets, are in ``published_images.yaml``.
"""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from kd.config.compose import checked
from kd.config.composition import CONF

FACTS = yaml.safe_load((Path(__file__).parent / "published_images.yaml").read_text(encoding="utf-8"))
FOLDER = CONF / "experiment"
BASES = ("_cifar100", "_imagenet")
PRESETS = [
    file.stem
    for file in sorted(FOLDER.glob("*.yaml"))
    if any(f"\n  - {base}\n" in file.read_text(encoding="utf-8") for base in BASES)
]
TEACHERS = [name for name in PRESETS if "_teacher_" in name]
STUDENTS = [name for name in PRESETS if name not in TEACHERS]
PAIRS = {pair for paper in FACTS["accuracy"].values() for pair in paper}
TIMM = {  # networks of ImageNet by the name in a preset's, and which weights the published teachers have
    "resnet18": "resnet18",
    "mobilenetv1": "mobilenetv1_100",
    "resnet34": "resnet34.tv_in1k",
    "resnet50": "resnet50.tv_in1k",
}


@functools.cache
def preset(name: str) -> dict[str, Any]:
    """The composed and checked config."""
    return checked([f"experiment={name}"])


def header(name: str) -> str:
    """The comment at the top."""
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[1:]
    return "\n".join(line.removeprefix("# ") for line in lines[: lines.index("defaults:")])


def parts(name: str) -> tuple[str, str, str]:
    """DATA_METHOD_TEACHER_STUDENT → data, method, TEACHER_STUDENT."""
    pair = next(pair for pair in PAIRS if name.endswith(f"_{pair}"))
    data, _, method = name.removesuffix(f"_{pair}").partition("_")
    return data, method, pair


def unpublished(name: str) -> str:
    """What a header, or that of the file it begins from, says is not published."""
    shared = (FOLDER / f"_{name.partition('_')[0]}.yaml").read_text(encoding="utf-8")
    return "\n".join(line for line in [*header(name).splitlines(), *shared.splitlines()] if "Not published" in line)


# ---------------------------------------------------------------------- numbers


def test_there_are_presets_of_every_pair() -> None:
    assert {parts(name)[2] for name in STUDENTS} == PAIRS
    assert TEACHERS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_short(name: str) -> None:
    assert len((FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()) <= 25


@pytest.mark.parametrize("name", STUDENTS)
def test_the_numbers_of_a_header_are_the_published_ones(name: str) -> None:
    _, method, pair = parts(name)
    number = r"(0\.\d{4})"
    line = re.search(rf"^Published \((\w+)\): test/acc1 {number}(?: ± {number})?; alone {number}", header(name), re.M)
    assert line
    paper, *said = line.groups()
    facts = FACTS["accuracy"][paper][pair]
    value = facts[method]
    top, spread = value if isinstance(value, list) else (value, None)
    expected = [top, spread, facts["alone"]]
    assert said == [None if number is None else f"{number / 100:.4f}" for number in expected]


@pytest.mark.parametrize("name", TEACHERS)
def test_the_number_of_a_teacher_is_the_published_one(name: str) -> None:
    network = name.removeprefix("cifar100_teacher_")
    tables = FACTS["accuracy"]["crd2020"]
    (top,) = {facts["teacher"] for pair, facts in tables.items() if pair.startswith(f"{network}_")}
    assert f"Published (crd2020): test/acc1 {top / 100:.4f}" in header(name)
    assert preset(name)["student"]["model"] == checked([f"model@student={network}"])["student"]["model"]
    assert preset(name)["loss"].keys() == {"ce"}


@pytest.mark.parametrize("name", PRESETS)
def test_the_recipe_is_the_published_one(name: str) -> None:
    """What is not published is said."""
    data, method, pair = (name.partition("_")[0], "teacher", name) if name in TEACHERS else parts(name)
    facts = {**FACTS["recipes"][data], **FACTS["recipes"].get(f"{data}_{method}", {})}
    of_students = FACTS["recipes"]["lr_of_students"].items()
    facts["lr"] = next((lr for network, lr in of_students if pair.endswith(network)), facts["lr"])
    recipe = preset(name)["recipe"]
    optimizer, scheduler = recipe["optimizer"], recipe["scheduler"]
    assert optimizer["_target_"].endswith(".SGD")
    assert scheduler["_target_"].endswith(".MultiStepLR")
    found = {"epochs": recipe["epochs"], "batch": recipe["batch_size"] * recipe["accumulate"], **optimizer, **scheduler}
    for key, value in facts.items():
        assert found[key] == value or (value is None and key in unpublished(name)), key
    assert {recipe[key] for key in ("steps", "warmup", "ema", "no_decay", "gradient_clip")} == {None}


@pytest.mark.parametrize("name", STUDENTS)
def test_the_losses_are_the_published_ones(name: str) -> None:
    """Terms, weights, temperatures, warm-up; what is not published is said."""
    data, method, pair = parts(name)
    facts = FACTS["losses"].get(f"{data}_{method}") or FACTS["losses"][method]
    found = preset(name)["loss"]
    assert found.keys() == facts.keys()
    for term, settings in facts.items():
        settings = {**settings, **of_pair(term, method, pair)}
        warmup = settings.pop("warmup", 0)
        schedule = found[term]["schedule"]
        if warmup:
            assert schedule == {"_target_": "kd.distill.schedules.Linear", "start": 0, "end": 1, "epochs": warmup}
        else:
            assert schedule is None
            assert warmup == 0 or "warm-up" in unpublished(name)
        for key, value in settings.items():
            assert found[term][key] == value or (value is None and key in unpublished(name)), f"{term}.{key}"


def of_pair(term: str, method: str, pair: str) -> dict[str, float | None]:
    """The settings of a term that differ from pair to pair; that of kd is logit_std's."""
    if term == "kd" and method != "logit_std":
        return {}
    keys = [key for key in FACTS["per"] if key.startswith(f"{term}.")]
    return {key.partition(".")[2]: FACTS["per"][key][pair] for key in keys}


@pytest.mark.parametrize("name", STUDENTS)
def test_the_networks_are_those_of_the_name(name: str) -> None:
    data, _, pair = parts(name)
    student, teacher = (preset(name)[side]["model"] for side in ("student", "teacher"))
    if data == "imagenet":
        assert [TIMM[network] for network in pair.split("_")] == [teacher["name"], student["name"]]
        assert (teacher["pretrained"], student["pretrained"]) == (True, False)
        return
    network = next(file.stem for file in (CONF / "model").glob("*.yaml") if pair.endswith(f"_{file.stem}"))
    assert student == checked([f"model@student={network}"])["student"]["model"]
    assert teacher is None  # that of the run
    run = re.search(r"RUN: (cifar100_teacher_\w+)\.", header(name))
    assert run
    assert pair == f"{run[1].removeprefix('cifar100_teacher_')}_{network}"
    assert (FOLDER / f"{run[1]}.yaml").is_file()


# ---------------------------------------------------------------------- two steps


def scaled(name: str, folder: Path) -> list[str]:
    """The preset on few images, with a teacher of random weights; terms and networks stay what they are."""
    more = [f"experiment={name}", "data.val_fraction=0.4", "recipe.epochs=null", "recipe.steps=2"]
    more += ["recipe.batch_size=4", "recipe.scheduler=null", "hardware=cpu", "hardware.threads=1"]
    if name.startswith("imagenet"):
        made(folder)
        more += [f"data.folder={folder}", "data.image_size=64", "data.in_memory=false", "data.num_workers=0"]
        return [*more, "teacher.model.pretrained=false", "teacher.allow_random=true"]
    more += ["data=fake", "data.num_classes=100", "data.train_images=200", "data.test_images=100"]
    if name in TEACHERS:
        return more
    _, method, pair = parts(name)
    networks = [file.stem for file in (CONF / "model").glob("*.yaml") if pair.startswith(f"{file.stem}_")]
    more += ["loss.crd.negatives=16"] if "crd" in method else []
    return [*more, f"model@teacher={max(networks, key=len)}", "teacher.allow_random=true"]


def made(folder: Path) -> None:
    """Noise in the layout of ImageNet: ``train/CLASS`` and ``test/CLASS``, four classes."""
    random = np.random.default_rng(0)
    for place in (folder / split / name for split in ("train", "test") for name in "abcd"):
        place.mkdir(parents=True)
        for number in range(6):
            noise = random.integers(256, size=(72, 80, 3), dtype=np.uint8)
            Image.fromarray(noise).save(place / f"{number}.png")


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_two_steps_of_a_preset(name: str, tmp_path: Path) -> None:
    import torch

    from kd.run import build, trainer

    config = checked(scaled(name, tmp_path))
    trainer.begin(config)
    data = build.datamodule(config)
    module = build.distiller(config, data)
    before = [p.detach().clone() for p in module.student.parameters()]
    fit = trainer.make_trainer(config, None, [], [], module)
    fit.fit(module, datamodule=data)
    assert fit.global_step == 2
    assert list(module.objective.terms) == list(preset(name)["loss"])
    assert all(math.isfinite(module.epoch_means[f"train/{term}"]) for term in preset(name)["loss"])
    after = module.student.parameters()
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
