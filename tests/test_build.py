"""Building teachers and students: pretrained statistics and heads, early exit, prepared taps."""

from __future__ import annotations

import json
import logging
import shutil
from typing import Any

import lightning
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kd.config.compose import checked
from kd.errors import KdError
from kd.losses.base import Term
from kd.models import timm_model
from kd.records import record, weight_files
from kd.run import build, networks, weights
from kd.run.data_facts import facts as facts_of
from kd.run.data_facts import same_data
from kd.tasks.classification import Classification

FAKE = ["data=fake", "data.train_images=64", "data.test_images=16", "hardware=cpu", "recipe.batch_size=8"]


@pytest.fixture
def offline_timm(monkeypatch) -> None:
    """timm's networks without their weights: ``pretrained=True`` then still carries the pretrained configuration."""
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm_model, "online", lambda: True)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kw: create(name, pretrained=False, **kw))


def module(*overrides: str):
    config = checked([*FAKE, *overrides])
    data = build.datamodule(config)
    return build.distiller(config, data), data


def test_a_pretrained_teacher_is_fed_with_its_own_statistics(offline_timm) -> None:
    teacher = ["model@teacher=timm_resnet18", "teacher.model.pretrained=true", "teacher.resize=false"]
    distiller, _ = module(*teacher, "teacher.allow_random=true", "loss=[ce,kd]", "data.mean=[0.5]", "data.std=[0.25]")
    raw = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    wanted = (raw - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(distiller.teacher.input_maps[0]((raw - 0.5) / 0.25), wanted)


def test_a_pretrained_teacher_of_other_classes_is_refused(offline_timm) -> None:
    with pytest.raises(
        KdError, match="was pretrained on 1000 classes, the data has 10: its classifier would be random"
    ):
        module("model@teacher=timm_resnet18", "teacher.model.pretrained=true", "loss=[ce,kd]")


def test_a_pretrained_teacher_of_another_size_is_refused(offline_timm) -> None:
    with pytest.raises(KdError, match="the teacher expects 224×224 images, the data gives 32×32"):
        module("model@teacher=timm_resnet18", "teacher.model.pretrained=true", "teacher.allow_random=true", "loss=[kd]")


def test_a_pretrained_student_of_other_statistics_is_told(offline_timm, caplog) -> None:
    logging.getLogger("kd").propagate = True
    module("model@student=timm_resnet18", "student.model.pretrained=true")
    assert "the student was pretrained on inputs of mean (0.485, 0.456, 0.406)" in caplog.text


def test_a_set_is_known_by_its_content_not_its_name() -> None:
    data = build.datamodule(checked(["data=digits"]))
    facts = data.split_facts
    same_data({"split": {**facts, "set": facts["set"].replace("Digits", "Optdigits")}}, data, "teacher")
    same_data({"split": {**facts, "set": "Digits 000000000000", "test_fraction": 0.9}}, data, "teacher")
    renamed = {**facts, "set": facts["set"].replace("Digits", "Optdigits"), "test_fraction": 0.9}
    with pytest.raises(KdError, match=r"on this run's test samples: data\.test_fraction 0\.9 there and 0\.4 here"):
        same_data({"split": renamed}, data, "teacher")


def test_weights_that_saw_test_images_are_refused_and_other_images_are_said(caplog) -> None:
    logging.getLogger("kd").propagate = True
    data = build.datamodule(checked(["data=digits"]))
    other = build.datamodule(checked(["data=digits", "data.split_seed=1"]))
    facts = facts_of(data)
    same_data(facts, data, "teacher")
    same_data({**facts, "content": None}, data, "teacher")
    assert "trained on" not in caplog.text
    changed = {**facts, "content": "0" * 12}
    same_data(changed, data, "teacher.checkpoint = t")
    assert "teacher.checkpoint = t was trained on other samples than this run's data, or files of" in caplog.text
    assert f"content {'0' * 12} there, {data.content} here" in caplog.text
    with pytest.raises(KdError, match=r"t has seen samples .* are test samples now \(at least \d+: number \d+, "):
        same_data({**changed, "seen": facts_of(other)["seen"]}, data, "teacher.checkpoint = t")


def test_a_run_goes_on_with_the_images_and_the_split_that_it_began_with() -> None:
    distiller, data = module("loss=[ce]")
    distiller.about = {"data": facts_of(data)}
    checkpoint: dict = {}
    checkpoint["state_dict"] = dict(distiller.state_dict())
    distiller.on_save_checkpoint(checkpoint)
    distiller.on_load_checkpoint(checkpoint)
    for key, value in {"content": "0" * 12, "split": {"set": "Fake 0"}}.items():
        about = {"data": {**facts_of(data), key: value}}
        with pytest.raises(KdError, match=rf"is not what it was when the run began: .*data\.{key} .* then"):
            distiller.on_load_checkpoint({**checkpoint, "kd": {**checkpoint["kd"], "about": about}})


@pytest.mark.parametrize(
    ("measured", "recorded", "words"),
    [
        (0.95, {"acc1": 0.96}, ""),
        (0.95, {}, ""),
        (0.12, {}, "near chance (1 in 10)"),
        (0.48, {"acc1": 0.96}, "48.0% of the validation images, 96.0% in its own run"),
    ],
)
def test_a_teacher_that_is_not_what_it_was_is_doubted(measured, recorded, words) -> None:
    doubt = Classification().doubt({"acc1": measured}, recorded, 10)
    assert words in doubt
    assert bool(doubt) == bool(words)


def test_the_last_epoch_teaches_when_it_is_asked_to(tmp_path, teacher_run) -> None:
    run = tmp_path / "run"
    shutil.copytree(teacher_run, run)
    state = {name: tensor + 1 for name, tensor in load_file(run / "student_last.safetensors").items()}
    save_file(state, run / "student_last.safetensors", metadata=safe_open(run / "student.safetensors", "pt").metadata())
    found = record.read(run)
    found["student"]["last"]["digest"] = weights.digest(state)
    record.write(run, found)
    built, read = {}, {}
    for epoch in (None, "selected", "last"):
        config = checked([f"teacher.checkpoint={run}", *([f"teacher.epoch={epoch}"] if epoch else []), "hardware=cpu"])
        built[epoch] = networks.teacher(config, build.datamodule(config), build.task(config))
        read[epoch] = weight_files.read_by(config)["teacher.checkpoint"]
    assert read[None] == read["selected"] != read["last"]
    weight = {epoch: next(teacher.parameters()) for epoch, teacher in built.items()}
    assert torch.equal(weight[None], weight["selected"])
    torch.testing.assert_close(weight["last"], state[next(iter(built["last"].networks[0].state_dict()))])
    assert {epoch: teacher.sources[0]["weights"] for epoch, teacher in built.items()} == {
        None: "selected", "selected": "selected", "last": "last"
    }  # fmt: skip
    assert built["last"].sources[0]["epoch"] == 3
    with pytest.raises(KdError, match="the last epoch can be chosen of a run directory only"):
        weight_files.locate(run / "student.safetensors", "last")
    with pytest.raises(KdError, match=r"teacher\.epoch = best is not allowed: it must be selected, last or null"):
        checked([f"teacher.checkpoint={run}", "teacher.epoch=best"])
    with pytest.raises(KdError, match=r"student\.epoch = last needs student\.checkpoint"):
        checked(["student.epoch=last"])


def test_weights_without_recorded_statistics_are_told(tmp_path, caplog) -> None:
    from kd.models.cifar_resnet import resnet

    logging.getLogger("kd").propagate = True
    torch.save(resnet(8, num_classes=10, input_shape=(3, 32, 32)).state_dict(), tmp_path / "bare.pt")
    module("model@teacher=resnet8", f"teacher.checkpoint={tmp_path / 'bare.pt'}", "loss=[kd]")
    assert "does not record the statistics of its input" in caplog.text


def test_the_teacher_stops_after_the_last_tap() -> None:
    distiller, data = module(
        "model@student=resnet8", "model@teacher=resnet8", "teacher.allow_random=true", "loss=[ce,hint]"
    )
    ran = []
    for name in ("layer2", "layer3", "fc"):
        distiller.teacher.answering[0].get_submodule(name).register_forward_pre_hook(
            lambda *a, name=name: ran.append(name)
        )
    batch = next(iter(data.train_dataloader()))
    teacher, student = distiller.answer_both(batch)
    assert ran == ["layer2"]
    assert not teacher.has_logits
    assert list(teacher.features) == ["layer2"]
    assert student.has_logits
    assert distiller.teacher(batch.inputs).logits.shape == (8, 10)  # validation still gets its logits


class Overwriting(torch.nn.Module):
    """A ReLU that works in place overwrites what was tapped before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = torch.nn.Conv2d(3, 10, 3, padding=1), torch.nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv(x)).mean((2, 3))


def test_a_tap_before_an_in_place_layer_keeps_its_value() -> None:
    node = "student.model={_target_:tests.test_build.Overwriting}"
    taps = [
        "loss.hint.student_taps=[conv]",
        "loss.hint.teacher_taps=[layer1]",
        "loss.hint.adapter=conv_bn_relu",
        "model@teacher=resnet8",
    ]
    distiller, data = module("model@student=none", node, *taps, "teacher.allow_random=true", "loss=[ce,hint]")
    batch = next(iter(data.train_dataloader()))
    _, student = distiller.answer_both(batch)
    assert torch.equal(student.features["conv"], distiller.student.conv(batch.inputs))
    assert (student.features["conv"] < 0).any()


class Undeclared(Term):
    """Reads the teacher's logits without saying so."""

    needs_teacher_logits = False

    def forward(self, student, teacher, batch):
        return teacher.logits.mean()


class Broken(Term):
    """Cannot match the shapes."""

    def forward(self, student, teacher, batch):
        return student.logits @ teacher.logits


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "Undeclared",
            "loss.mine: there are no logits: the network gives none, or this term reads them without declaring it",
        ),
        ("Broken", "loss.mine: mat1 and mat2 shapes"),
    ],
)
def test_a_term_is_tried_before_the_first_batch(name, sentence) -> None:
    arguments = [f"+loss.mine={{_target_:tests.test_build.{name}}}", "model@student=resnet8", "model@teacher=resnet8"]
    with pytest.raises(KdError, match=sentence):
        module(*arguments, "teacher.allow_random=true")


def test_preparing_leaves_the_student_and_the_random_state_alone() -> None:
    config = checked(
        [*FAKE, "model@student=resnet8", "model@teacher=resnet8", "teacher.allow_random=true", "loss=[ce,at]"]
    )
    data = build.datamodule(config)
    torch.manual_seed(0)
    distiller = build.distiller(config, data)
    state = torch.random.get_rng_state()
    before = {k: v.clone() for k, v in distiller.student.state_dict().items()}
    distiller.prepare(next(iter(data.train_dataloader())))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in distiller.student.state_dict().items())
    assert distiller.student.training
    assert distiller.objective.training


def test_adapters_are_trained_and_the_teacher_is_not() -> None:
    distiller, _ = module(
        "model@student=resnet8", "model@teacher=resnet8x4", "teacher.allow_random=true", "loss=[ce,hint]"
    )
    wanted = {id(p) for p in distiller.trainable()}
    assert {id(p) for p in distiller.objective.parameters()} <= wanted
    assert not {id(p) for p in distiller.teacher.parameters()} & wanted
    optimizer = distiller.configure_optimizers()["optimizer"]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == wanted


class Foreign(lightning.LightningDataModule):
    """A data module as one writes it for Lightning alone."""

    num_classes, input_shape = 10, (1, 8, 8)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(8, 1, 8, 8), torch.arange(8)), 4)

    val_dataloader = train_dataloader


class Whole(Foreign):
    """The same with a test split, which it makes when it is asked for one."""

    def setup(self, stage):
        if stage == "test":
            self.tested = torch.utils.data.TensorDataset(torch.zeros(6, 1, 8, 8), torch.arange(6))

    def test_dataloader(self):
        return torch.utils.data.DataLoader(self.tested, 4)


class Bare(Foreign):
    """Gives lists of images."""

    def train_dataloader(self):
        return [[[1.0]]]

    test_dataloader = val_dataloader = train_dataloader


def elsewhere(target: str) -> Any:
    """The data module of a config without a teacher."""
    teacher = {"model": None, "checkpoint": None}
    return build.datamodule({"data": {"_target_": target}, "teacher": teacher})


def test_a_data_module_from_elsewhere_is_told_all_that_it_lacks() -> None:
    with pytest.raises(KdError) as refused:
        elsewhere("tests.test_build.Foreign")
    said = str(refused.value)
    assert "\n" not in said
    assert said.startswith("data._target_ = tests.test_build.Foreign lacks test_dataloader: ")
    for given in ("train_dataloader", "val_dataloader", "num_classes", "mean"):
        assert given not in said
    with pytest.raises(KdError) as refused:
        elsewhere("lightning.LightningDataModule")
    assert "LightningDataModule lacks train_dataloader, val_dataloader, test_dataloader: " in str(refused.value)
    with pytest.raises(KdError, match=r"data\._target_ = torch\.nn\.Flatten makes a Flatten, not a Lightning"):
        elsewhere("torch.nn.Flatten")


def test_batches_that_are_none_are_told_what_they_may_be() -> None:
    with pytest.raises(KdError) as refused:
        elsewhere("tests.test_build.Bare")
    said = str(refused.value)
    assert "\n" not in said
    for word in ("data._target_ = tests.test_build.Bare gives batches of type list: ", "Batch(inputs, targets, index)"):
        assert word in said


def test_a_data_module_from_elsewhere_trains(kd, tmp_path) -> None:
    """What it does not say is found out, or left open; a split may be made when it is asked for."""
    data = elsewhere("tests.test_build.Whole")
    assert data.sizes == {"train": 8, "val": 8, "test": 6, "labelled": 8}
    assert (data.num_classes, data.input_shape, data.mean, data.mixup) == (10, (1, 8, 8), [], None)
    assert data.class_names == [str(number) for number in range(10)]
    assert data.example().shape == (1, 1, 8, 8)
    (tmp_path / "own" / "data").mkdir(parents=True)
    (tmp_path / "own" / "data" / "whole.yaml").write_text("_target_: tests.test_build.Whole\n")
    said = kd("train", "--config-dir", "own", "data=whole", "recipe.epochs=1", "hardware=cpu")
    assert said.code == 0, said.err
    (file,) = tmp_path.rglob("result.json")
    result = json.loads(file.read_text())
    assert result["status"] == "finished"
    assert result["data"]["sizes"] == data.sizes
    assert result["student"]["last"]["test"]["acc1"] == pytest.approx(1 / 6)  # all images are black
    said = kd("eval", f"run={file.parent}")
    assert said.code == 0, said.err


def test_a_network_of_images_takes_no_texts() -> None:
    with pytest.raises(
        KdError, match=r"^student\.model\._target_ = kd\.models\.mlp\.mlp takes no texts: give a network of"
    ):
        networks.network({"_target_": "kd.models.mlp.mlp"}, "student.model", 3, (12,), tokenizer=object())
