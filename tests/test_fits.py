"""The teacher's own view in training, answers that are kept, hint stages; and what does not fit together."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kd.config.compose import checked
from kd.distill.distiller import Distiller
from kd.distill.teacher import Teacher
from kd.errors import KdError
from kd.losses.base import Batch
from kd.losses.logits.kd import KnowledgeDistillation
from kd.records.record import config_hash
from kd.run import build, networks
from kd.tasks.base import Want

FAST = ["recipe.epochs=2", "hardware=cpu", "hardware.threads=1"]


def module(*overrides: str) -> tuple[Distiller, object]:
    config = checked(["hardware=cpu", "model@teacher=mlp", "teacher.allow_random=true", "loss=[kd]", *overrides])
    data = build.datamodule(config)
    return build.distiller(config, data), data


def record(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def students(*folders: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / "student_last.safetensors") for folder in folders]


# ---------------------------------------------------------------------- views


@pytest.mark.parametrize("view", ["clean", "independent"])
def test_the_teacher_is_fed_its_own_view(view: str) -> None:
    distiller, data = module("data.augment.pad=1", f"data.teacher_view={view}")
    batch = next(iter(data.train_dataloader()))
    teacher, student = distiller.answer_both(batch)
    assert not torch.equal(batch.views["teacher"], batch.inputs)
    assert torch.equal(teacher.logits, distiller.teacher(batch.views["teacher"]).logits)
    assert torch.equal(student.logits, distiller.student(batch.inputs))


def test_both_networks_see_the_same_mixture() -> None:
    distiller, data = module("data.augment.pad=1", "data.mixup=1.0")
    batch = next(iter(data.train_dataloader()))
    teacher, _ = distiller.answer_both(batch)
    assert torch.equal(teacher.logits, distiller.teacher(batch.inputs).logits)


def test_a_teacher_that_no_term_reads_does_not_run(monkeypatch) -> None:
    distiller, data = module("loss=[ce]")
    monkeypatch.setattr(Teacher, "forward", lambda *a, **k: pytest.fail("the teacher ran"))
    teacher, student = distiller.answer_both(next(iter(data.train_dataloader())))
    assert not teacher.has_logits
    assert student.has_logits


@pytest.mark.parametrize("option", ["data.mixup=1.0", "data.teacher_view=clean", "data.teacher_view=independent"])
def test_a_run_trains_evaluates_and_says_nothing_of_labels_it_has_not(kd, tmp_path, teacher_run, option) -> None:
    arguments = [f"teacher.checkpoint={teacher_run}", "loss=[kd]", "data.augment.pad=1", option]
    said = kd("train", *FAST, *arguments, "hydra.run.dir=run")
    assert said.code == 0, said.err
    last = record(tmp_path / "run")["student"]["last"]
    assert ("acc1" in last["train"]) == ("mixup" not in option)
    assert 0 < last["test"]["acc1"] <= 1


def test_options_that_are_null_change_no_hash() -> None:
    config = checked(["loss=[kd]", "model@teacher=mlp"])
    before = config_hash(config)
    for section, key in (("data", "teacher_view"), ("data", "mixup"), ("teacher", "cache")):
        assert config[section].pop(key) is None
    assert config_hash(config) == before
    assert config_hash(checked(["loss=[kd]", "model@teacher=mlp", "teacher.cache=true"])) == before
    assert config_hash(checked(["loss=[kd]", "model@teacher=mlp", "data.mixup=1.0"])) != before


# ---------------------------------------------------------------------- answers that are kept


@pytest.mark.slow
@pytest.mark.parametrize("views", [[], ["data.augment.pad=1", "data.teacher_view=clean"]], ids=["plain", "clean"])
def test_kept_answers_train_the_same_student(kd, tmp_path, teacher_run, views) -> None:
    """Two teachers, once answering each batch and once before the first epoch."""
    arguments = [f"teacher.checkpoint=[{teacher_run},{teacher_run}]", "teacher.combine=logits", "loss=[ce,kd]", *views]
    for name, cache in (("live", "null"), ("kept", "true")):
        said = kd("train", *FAST, *arguments, f"teacher.cache={cache}", f"hydra.run.dir={name}")
        assert said.code == 0, said.err
    live, kept = students(tmp_path / "live", tmp_path / "kept")
    for name in live:
        torch.testing.assert_close(live[name], kept[name], rtol=1e-4, atol=1e-5)
    a, b = record(tmp_path / "live"), record(tmp_path / "kept")
    assert a["config_hash"] == b["config_hash"]
    assert a["student"]["last"]["train"]["kd"] == pytest.approx(b["student"]["last"]["train"]["kd"], rel=1e-4)


def test_kept_answers_replace_the_forward_pass_in_training(kd, teacher_run, monkeypatch) -> None:
    seen = []
    original = Teacher.forward
    monkeypatch.setattr(
        Teacher, "forward", lambda self, x, *a, **k: (seen.append(len(x)), original(self, x, *a, **k))[1]
    )
    said = kd("train", *FAST, f"teacher.checkpoint={teacher_run}", "loss=[kd]", "teacher.cache=true")
    assert said.code == 0, said.err
    # beside the dry passes: val; the training images once; val for the agreement, and test; none in the steps
    assert [count for count in seen if count > 2] == [270, 512, 296, 270, 512, 207]


def test_a_resumed_run_with_kept_answers_is_bit_equal(kd, tmp_path, teacher_run, monkeypatch) -> None:
    arguments = [f"teacher.checkpoint={teacher_run}", "loss=[kd]", "teacher.cache=true", "data.augment.pad=1"]
    arguments += ["data.teacher_view=clean", "recipe.epochs=4", "hardware=cpu", "hardware.threads=1"]
    assert kd("train", *arguments, "hydra.run.dir=whole").code == 0
    original, calls = KnowledgeDistillation.forward, []

    def breaking(self, *inputs):
        calls.append(1)
        if len(calls) == 1 + 2 * 13 + 5:  # the dry pass, two epochs, and five steps
            raise KdError("broken")
        return original(self, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(KnowledgeDistillation, "forward", breaking)
        assert kd("train", *arguments, "hydra.run.dir=broken").code == 1
    said = kd("train", "resume=broken")
    assert said.code == 0, said.err
    assert "epoch 2/" not in said.out
    whole, resumed = students(tmp_path / "whole", tmp_path / "broken")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_table_is_by_index_and_empty_elsewhere() -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    teacher = Teacher([network], [torch.nn.Identity()], cache=True)
    images, none = torch.randn(5, 1, 2, 2), torch.zeros(5, dtype=torch.long)
    index = torch.tensor([7, 0, 3, 9, 1])
    own_view = Batch(images[:2], none, index[3:], views={"teacher": images[3:]})
    teacher.begin([Batch(images[:3], none, index[:3]), own_view], images.device)
    kept = teacher.answer(Batch(images[:2], none, torch.tensor([9, 7])), Want())
    torch.testing.assert_close(kept.logits, teacher(images[[3, 0]]).logits)
    assert teacher.remembered.shape == (10, 3)
    assert teacher.remembered.isnan().any(1).nonzero().flatten().tolist() == [2, 4, 5, 6, 8]
    assert not any("remembered" in name for name in teacher.state_dict())


# ---------------------------------------------------------------------- two stages


def test_a_hint_stage_then_soft_targets_by_overrides_alone(kd, tmp_path, teacher_run) -> None:
    """FitNets: the hint alone moves what lies below its tap; the second stage starts from there, without an adapter."""
    hint = [f"teacher.checkpoint={teacher_run}", "loss=[hint]", "loss.hint.student_taps=[relu1]"]
    said = kd("train", *FAST, *hint, "recipe.epochs=3", "hydra.run.dir=first")
    assert said.code == 0, said.err
    assert "no term reads the logits: val/acc1 picks no checkpoint, the last epoch is the selected one" in said.out
    first = record(tmp_path / "first")
    assert first["student"]["selected"]["epoch"] == first["student"]["last"]["epoch"] == 2
    assert first["protocol"]["monitor"] is None
    selected, last = (load_file(tmp_path / "first" / f"student{which}.safetensors") for which in ("", "_last"))
    assert all(torch.equal(selected[name], last[name]) for name in last)

    config = checked(["seed=0", *FAST])
    torch.manual_seed(0)
    fresh = networks.student(config, build.datamodule(config), build.task(config)).state_dict()
    trained = {name for name in fresh if not torch.equal(fresh[name], selected[name])}
    assert {"fc1.weight", "fc1.bias"} <= trained

    second = [f"teacher.checkpoint={teacher_run}", "loss=[ce,kd]", "student.checkpoint=first"]
    said = kd("train", *FAST, *second, "recipe.optimizer.lr=1e-12", "hydra.run.dir=second")
    assert said.code == 0, said.err
    (start,) = students(tmp_path / "second")
    for name in selected:  # a rate of almost 0: where the second stage began
        torch.testing.assert_close(start[name], selected[name], rtol=0, atol=1e-8)
    assert record(tmp_path / "second")["protocol"]["monitor"] == "val/acc1"
    assert record(tmp_path / "second")["student"]["adapter_parameters"] == 0


def test_the_layers_above_a_hint_stay_as_they_were() -> None:
    distiller, data = module("loss=[hint]", "loss.hint.student_taps=[relu1]", "+recipe.optimizer.weight_decay=0.1")
    before = {name: p.clone() for name, p in distiller.student.named_parameters()}
    optimizer = distiller.configure_optimizers()["optimizer"]
    batch = next(iter(data.train_dataloader()))
    teacher, student = distiller.answer_both(batch)
    distiller.objective(student, teacher, batch)[1].backward()
    optimizer.step()
    moved = {name for name, p in distiller.student.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"fc1.weight", "fc1.bias"}


def test_a_selection_by_val_stays_where_logits_are_read(kd, tmp_path, teacher_run, caplog) -> None:
    logging.getLogger("kd").propagate = True
    assert kd("train", *FAST, f"teacher.checkpoint={teacher_run}", "loss=[hint,kd]", "hydra.run.dir=run").code == 0
    assert "picks no checkpoint" not in caplog.text
    assert record(tmp_path / "run")["protocol"]["monitor"] == "val/acc1"


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["teacher.cache=true", "data.augment.pad=1"],
            "teacher.cache = true needs a teacher that sees the same sample in every epoch, data.augment changes it: "
            "set teacher.cache=null or data.teacher_view=clean",
        ),
        (
            ["teacher.cache=true", "data.mixup=1.0"],
            "teacher.cache = true needs a teacher that sees the same sample in every epoch, data.mixup changes it: set "
            "teacher.cache=null",
        ),
        (
            ["teacher.cache=true", "loss=[kd,hint]"],
            "teacher.cache = true keeps the teacher's logits only, loss.hint reads its intermediate tensors: set "
            "teacher.cache=null",
        ),
        (
            ["teacher.cache=true", "loss=[ce]", "model@teacher=none"],
            "teacher.cache = true needs a teacher: give teacher.checkpoint=RUN or model@teacher=NAME",
        ),
        *(
            (
                ["data.mixup=1.0", f"loss=[kd,{name}]"],
                f"loss.{name} needs labels, and data.mixup = 1.0 mixes images of two labels: leave the term out "
                "(loss=[kd]), or set data.mixup=null",
            )
            for name in ("ce", "cwtm")
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(KdError) as caught:
        module(*overrides)
    assert str(caught.value) == sentence
