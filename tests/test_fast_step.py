"""The teacher is folded and both networks run channels last: nobody sees it in a number, a tap or a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd.config.compose import checked
from kd.distill.distiller import Distiller
from kd.distill.objective import Objective
from kd.distill.teacher import Teacher
from kd.losses.base import Batch
from kd.losses.features.hint import Hint
from kd.losses.logits.ce import CrossEntropy
from kd.losses.logits.kd import KnowledgeDistillation
from kd.models.cifar_resnet import resnet
from kd.run import build

SHAPE = {"num_classes": 3, "input_shape": (3, 16, 16)}


def network(seed: int, widths: tuple[int, ...] = (16, 16, 16, 16)) -> nn.Module:
    torch.manual_seed(seed)
    made = resnet(8, widths, **SHAPE)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return made


def distiller(optimized: bool = True, **terms: nn.Module) -> Distiller:
    objective = Objective({"ce": CrossEntropy(), "kd": KnowledgeDistillation(4.0), **terms})
    return Distiller(network(0), Teacher([network(1)], optimized=optimized), objective)


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, 16, 16, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(12) % 3), batch_size=4)


def batch() -> Batch:
    return Batch(*next(iter(loader())))


QUIET = pytest.mark.filterwarnings(
    *("ignore:.*does not have many workers.*", "ignore:.*no `val_dataloader`.*", "ignore:.*LeafSpec.*is deprecated.*"),
    "ignore:.*module.* in eval mode at the start of training.*",  # the teacher
)


class Watch(L.Callback):
    """Sees in each step whether the weights are channels last, and what the teacher answers."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        weight = module.student.layer1[0].conv1.weight
        self.last = weight.is_contiguous(memory_format=torch.channels_last) and module.teacher.channels_last
        answers_alike(module)


def fit(module: Distiller, epochs: int, folder: Path, checkpoint: Path | None = None, **arguments) -> L.Trainer:
    trainer = L.Trainer(
        **{"max_epochs": epochs, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
        **{"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0, **arguments},
    )
    trainer.fit(module, loader(), ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return trainer


def answers_alike(module: Distiller) -> None:
    teacher = module.teacher
    assert teacher.answering[0] is not teacher.networks[0]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in teacher.answering[0].modules())
    with torch.no_grad():
        expected = network(1).eval()(batch().inputs)
    torch.testing.assert_close(teacher(batch().inputs).logits, expected, rtol=1e-5, atol=1e-5)


@QUIET
def test_the_teacher_answers_the_same_also_after_a_resume(tmp_path) -> None:
    one, watch = distiller(), Watch()
    fit(one, 1, tmp_path, callbacks=[watch])
    assert watch.last
    resumed, whole = distiller(), distiller()
    fit(resumed, 2, tmp_path, tmp_path / "1.ckpt", callbacks=[Watch()])
    fit(whole, 2, tmp_path)
    assert whole.teacher.answering == list(whole.teacher.networks)  # as it came, once the fit is over
    torch.testing.assert_close(resumed.student.state_dict(), whole.student.state_dict(), rtol=0, atol=0)
    state = torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"]
    assert not any(name.startswith("teacher.") for name in state)
    assert all(p.is_contiguous() for p in whole.parameters())  # as others save them
    torch.testing.assert_close(whole.teacher.networks[0].state_dict(), network(1).state_dict(), rtol=0, atol=0)


@QUIET
def test_a_student_trains_as_without(tmp_path) -> None:
    fast, plain = distiller(), distiller(optimized=False)
    plain.prepare(batch(), channels_last=False)
    assert plain.teacher.answering == list(plain.teacher.networks)
    for module in (fast, plain):
        fit(module, 2, tmp_path)
    assert not plain.teacher.channels_last
    torch.testing.assert_close(fast.student.state_dict(), plain.student.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("tap", "left"),
    [("conv1", 1), ("bn1:input", 1), ("bn1", 0), ("layer1.0", 0), ("layer2.0.bn2", 0), ("layer2.0.conv2@NCHW", 1)],
)
def test_what_is_tapped_between_is_not_folded(tap: str, left: int) -> None:
    module = distiller(hint=Hint([tap], [tap], adapter="identity"))
    module.prepare(batch())
    norms = [m for m in module.teacher.answering[0].modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == left
    kept, given = {}, network(1).eval()
    name, _, port = tap.partition("@")[0].partition(":")
    hooked = given.get_submodule(name)
    hooked.register_forward_hook(lambda m, a, out: kept.update(input=a[0].clone(), output=out.clone()))
    given(batch().inputs)
    features = module.teacher.answer(batch(), module._want).features
    torch.testing.assert_close(features[tap], kept[port or "output"], rtol=1e-4, atol=1e-5)


def test_a_teacher_that_changes_is_followed() -> None:
    module = distiller()
    module.prepare(batch())
    other = network(2).eval()
    with torch.no_grad():
        for mine, new in zip(module.teacher.networks[0].parameters(), other.parameters(), strict=True):
            mine.copy_(new)
        for mine, new in zip(module.teacher.networks[0].buffers(), other.buffers(), strict=True):
            mine.copy_(new)
        expected = other(batch().inputs)
    torch.testing.assert_close(module.teacher(batch().inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_that_is_trained_along_is_left_as_it_is() -> None:
    module = distiller()
    module.teacher.networks[0].requires_grad_(True)
    module.prepare(batch())
    assert module.teacher.answering == list(module.teacher.networks)


def test_several_teachers_are_folded_together() -> None:
    teacher = Teacher([network(1), network(2)])
    module = Distiller(network(0), teacher, Objective({"kd": KnowledgeDistillation(4.0)}))
    before = teacher(batch().inputs).logits
    module.prepare(batch())
    assert not any(isinstance(m, nn.BatchNorm2d) for part in teacher.answering for m in part.modules())
    torch.testing.assert_close(teacher(batch().inputs).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("options", "folded", "last"), [([], True, True), (["teacher.optimize=false"], False, False)])
def test_it_is_switched_off_by_an_option(options: list[str], folded: bool, last: bool) -> None:
    given = ["data=fake", "data.shape=[3,16,16]", "model@student=resnet8", "model@teacher=resnet8"]
    config = checked([*given, "teacher.allow_random=true", "loss=[ce,kd]", *options])
    module = build.distiller(config, build.datamodule(config))
    assert (module.teacher.answering[0] is not module.teacher.networks[0]) == folded
    assert module.teacher.channels_last == last
    assert module.channels_last
    config = checked([*given, "teacher.allow_random=true", "loss=[ce,kd]", "hardware.channels_last=false"])
    module = build.distiller(config, build.datamodule(config))
    assert not module.channels_last
    assert not module.teacher.channels_last


class Statistics(KnowledgeDistillation):
    """Reads the teacher's batch norms, with hooks of its own."""

    def prepare(self, setup) -> None:
        self.fired = 0
        for module in setup.networks["teacher"].modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self.note)

    def note(self, *_) -> None:
        self.fired += 1


def test_a_network_in_which_a_term_has_hooks_is_not_folded(caplog) -> None:
    caplog.set_level("INFO", "kd")
    term = Statistics(4.0)
    module = Distiller(network(0), Teacher([network(1)]), Objective({"statistics": term}))
    module.prepare(batch())
    before = term.fired
    module.answer_both(batch())
    assert term.fired == before + 9
    assert "somebody else has hooks" in caplog.text


class Reading(nn.Module):
    """Reads its own batch norm, which a folded copy has not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.bn(self.conv(x)).mean((2, 3)) * self.bn.weight)


def test_a_network_that_reads_its_norms_is_left_as_it_is(caplog) -> None:
    caplog.set_level("INFO", "kd")
    module = Distiller(network(0), Teacher([Reading()]), Objective({"kd": KnowledgeDistillation(4.0)}))
    module.prepare(batch())
    assert module.teacher.answering == list(module.teacher.networks)
    assert "AttributeError: 'Identity' object has no attribute 'weight'" in caplog.text


@QUIET
def test_a_teacher_that_a_callback_moves_is_no_copy(tmp_path) -> None:
    """Through .data, as moving averages are often written; seen at the next validation."""

    class Move(L.Callback):
        def on_train_epoch_end(self, trainer, module) -> None:
            for weight in module.teacher.networks[0].parameters():
                weight.data = weight.data + 0.01

    module = distiller()
    arguments = {"callbacks": [Move()], "limit_val_batches": 1.0}
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, **arguments)
    trainer.fit(module, loader(), loader())
    assert module.teacher_trained
    assert module.teacher.answering == list(module.teacher.networks)


@QUIET
def test_a_plain_trainer_needs_no_validation_set(tmp_path) -> None:
    fit(distiller(), 1, tmp_path, limit_val_batches=1.0)


@pytest.mark.slow
def test_a_run_is_the_same_whether_its_teacher_is_optimised_or_not(kd, monkeypatch) -> None:
    """A teacher of timm with batch norms and convolutions: one epoch, its numbers, and those of ``kd eval``."""
    common = [
        "data=fake",
        "data.shape=[3,32,32]",
        "model@student=timm",
        "student.model.name=test_resnet",
        "hardware=cpu",
    ]
    common += ["model@teacher=timm", "teacher.model.name=test_resnet", "teacher.allow_random=true", "recipe.epochs=1"]
    folded, fold = [], Teacher._fold

    def seen(self: Teacher, *arguments: Any) -> None:
        fold(self, *arguments)
        folded.append(self._folded is not None)

    monkeypatch.setattr(Teacher, "_fold", seen)
    records = {}
    for choice in ("true", "false"):
        said = kd("train", *common, "loss=[ce,kd]", f"teacher.optimize={choice}", f"hydra.run.dir=optimize_{choice}")
        assert said.code == 0, said.err
        records[choice] = json.loads(Path(f"optimize_{choice}/result.json").read_text())
    assert folded == [True]
    fast, given = records["true"], records["false"]
    assert fast["config_hash"] == given["config_hash"]  # the same experiment
    for role, part in (("student", "last"), ("student", "selected"), ("teacher", None)):
        for split in ("val", "test"):
            mine, theirs = (r[role][part][split] if part else r[role][split] for r in (fast, given))
            assert mine == pytest.approx(theirs, abs=2e-4), (role, part, split)
    assert fast["student"]["last"]["train"] == pytest.approx(given["student"]["last"]["train"], abs=2e-4)
    assert kd("eval", "optimize_true", "split=test", "out=measured.json").code == 0
    measured = json.loads(Path("measured.json").read_text())["metrics"]
    recorded = fast["student"]["selected"]["test"]
    assert measured == pytest.approx({name: recorded[name] for name in measured}, abs=1e-5)
    assert "acc1" in measured
