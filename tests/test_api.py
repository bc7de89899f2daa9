"""The Python API: kd.distill, the Distiller in a plain trainer, a data module and networks of one's own."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import kd as api
from kd.config.compose import checked
from kd.data.base import refuse_unsharded
from kd.distill.answers import Answers
from kd.distill.schedules import Linear
from kd.errors import KdError
from kd.losses.base import Batch, Output, Setup, Term
from kd.losses.logits.ce import CrossEntropy
from kd.losses.logits.kd import KnowledgeDistillation
from kd.models.base import classifier, with_module
from kd.run import build, loss_nodes, networks
from kd.run.train import train

TOYS = Path(__file__).parent / "toys"
ADAM = functools.partial(torch.optim.Adam, lr=0.01)


def network(width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def blobs(split: int, samples: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(split)
    targets = torch.arange(samples) % 3
    points = torch.randn(samples, 4, generator=generator) + 3 * nn.functional.one_hot(targets, 4)
    return TensorDataset(points, targets)


def loaders() -> list[DataLoader]:
    return [DataLoader(blobs(split), batch_size=16, shuffle=split == 0) for split in range(3)]


def distilled(student: nn.Module, teacher: Any, *, epochs: int = 2, **options: Any) -> Any:
    return api.distill(student, teacher, *loaders(), epochs=epochs, accelerator="cpu", **options)


quiet = pytest.mark.filterwarnings("ignore")  # what a plain trainer says about itself


def plain(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet, **options)


# ---------------------------------------------------------------------- kd.distill


@pytest.mark.slow
def test_importing_kd_imports_no_torch_and_the_package_is_a_function() -> None:
    code = "import sys, kd; assert 'torch' not in sys.modules; import kd.distill.distiller; print(callable(kd.distill))"
    code += "; print(kd.Distiller.__name__, kd.Teacher.__name__, kd.Objective.__name__, kd.functional.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "Distiller", "Teacher", "Objective", "kd.losses.functional"]
    with pytest.raises(AttributeError, match="has no attribute 'Distller'"):
        api.Distller  # noqa: B018


def test_the_numbers_are_those_of_kd_train(tmp_path, teacher_run) -> None:
    """Same networks, loaders, recipe and seed: the same numbers, to the bit. Terms with adapters start elsewhere:
    their random numbers follow on those that made the student."""
    overrides = ["loss=[ce,kd]", "loss.ce.weight=0.1", "loss.kd.weight=0.9", f"teacher.checkpoint={teacher_run}"]
    overrides += ["recipe.epochs=3", "hardware=cpu", "seed=3"]
    config = checked(overrides)
    (tmp_path / "run").mkdir()
    record = train(config, tmp_path / "run", overrides)

    L.seed_everything(3, verbose=False)
    data = build.datamodule(config)
    student = networks.student(config, data, build.task(config))
    teacher = networks.teacher(config, data, build.task(config))
    result = api.distill(
        *(student, teacher, data.train_dataloader(), data.val_dataloader(), data.test_dataloader()),
        loss={"ce": 0.1, "kd": {"weight": 0.9, "temperature": 4}},
        epochs=3,
        optimizer=ADAM,
        seed=3,
        accelerator="cpu",
    )
    for part in ("last", "selected"):
        mine, theirs = (dict(r["student"][part]) for r in (result.record, record))
        assert mine.pop("digest", None) in (None, theirs.pop("digest"))  # of what is kept in memory: the selected one
        assert mine == theirs
    weights = load_file(tmp_path / "run" / "student.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in result.student.state_dict().items())
    same = ("parameters", "macs", "adapter_parameters")
    assert [result.record["student"][k] for k in same] == [record["student"][k] for k in same]
    assert result.record["teacher"]["test"] == record["teacher"]["test"]


def test_nothing_is_written_without_a_run_directory(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = distilled(network(9), None, optimizer=ADAM).student
    result = distilled(network(), teacher, log_every=1)
    assert not list(tmp_path.iterdir())
    assert not result.student.training
    assert [row["epoch"] for row in result.history] == [0, 1]
    assert {"train/loss", "train/ce", "train/kd", "val/acc1", "val/agreement"} <= set(result.history[0])
    assert result.metrics == result.record["student"]["selected"]["test"]
    assert "retention" in str(result)
    assert result.record["data"]["sizes"] == {"train": 48, "val": 48, "test": 48, "labelled": 48}


def test_the_files_are_those_of_a_run(kd, tmp_path) -> None:
    result = distilled(network(), None, run_dir=tmp_path / "run")
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["status"] == "finished"
    assert record["student"]["selected"]["test"] == result.metrics
    files = {file.name for file in (tmp_path / "run").iterdir()}
    own = {"result.json", "config.yaml", "metrics.csv", "train.log", "run.lock"}
    assert files == own | {"student.safetensors", "student_last.safetensors"}
    weights = load_file(tmp_path / "run" / "student.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in result.student.state_dict().items())
    with pytest.raises(KdError, match="holds a run already"):
        distilled(network(), None, run_dir=tmp_path / "run")
    assert kd("report", str(tmp_path / "run")).code == 0
    said = kd("eval", str(tmp_path / "run"))
    assert "that run was started by kd.distill" in said.err


def test_the_selected_epoch_is_kept_in_memory() -> None:
    """The learning rate explodes after the first epoch: the selected student is that of the first one."""

    def worse(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch == 0 else 1e4)

    result = distilled(network(), None, optimizer=functools.partial(torch.optim.SGD, lr=0.5), scheduler=worse)
    student = result.record["student"]
    assert (student["selected"]["epoch"], student["last"]["epoch"]) == (0, 1)
    assert student["selected"]["test"] != student["last"]["test"]
    points, targets = blobs(2).tensors
    right = (result.student(points).argmax(1) == targets).float().mean()
    assert float(right) == pytest.approx(result.metrics["acc1"])


def test_a_teacher_in_any_state_is_frozen() -> None:
    """Its dropout is off and its weights stay, whatever mode it is given in; afterwards it is in that mode again."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.drop = network(5), nn.Dropout(0.9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            modes.append(self.drop.training or any(p.requires_grad for p in self.parameters()))
            return self.drop(self.inner(x))

    modes: list[bool] = []
    teacher = Twice().train().requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    distilled(network(), teacher)
    assert modes
    assert not any(modes)
    assert teacher.drop.training
    assert all(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


class Sentences(Dataset):
    """Token ids and labels as a data set of transformers gives them."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(place, place + 5) % 7
        return {"input_ids": ids, "attention_mask": torch.ones(5), "labels": torch.tensor(place % 2)}


class Reader(nn.Module):
    """Answers like a model of transformers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, width), nn.Linear(width, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        hidden = self.table(input_ids) * attention_mask.unsqueeze(-1)
        return SimpleNamespace(logits=self.head(hidden.mean(1)))


def test_batches_that_are_mappings() -> None:
    sets = [DataLoader(Sentences(), batch_size=8) for _ in range(3)]
    result = api.distill(Reader(3), Reader(9), *sets, epochs=1, loss={"ce": 1, "kd": 1}, accelerator="cpu")
    assert result.record["data"]["num_classes"] == 2
    assert set(result.metrics) == {"acc1", "acc5", "nll", "ece", "agreement", "kl"}


def test_batches_of_kd_with_their_index_reach_a_bank(monkeypatch) -> None:
    monkeypatch.syspath_prepend(TOYS)
    import toys

    data = toys.Blobs()
    sets = (data.batches("train"), data.batches("val"), data.batches("test"))
    bank = toys.Bank()
    facts = {"train_index": data.train_index, "train_targets": data.train_targets}
    api.distill(toys.points(6), None, *sets, epochs=1, loss={"ce": 1, "bank": bank}, accelerator="cpu", **facts)
    assert (bank.features != 0).any(1).all()


def test_a_distiller_that_owns_the_loop_with_a_peer(monkeypatch) -> None:
    monkeypatch.syspath_prepend(TOYS)
    import toys

    peer = network(7)
    before = peer[0].weight.detach().clone()
    result = distilled(
        *(network(), None),
        loss={"ce": 1, "kd": {"temperature": 1}},
        distiller=toys.Mutual,
        peers={"peer": peer},
        gradient_clip=1.0,
        accumulate=2,
    )
    assert "train/peer/kd" in result.history[-1]
    assert not torch.equal(before, peer[0].weight)


# ---------------------------------------------------------------------- losses in short


def test_a_loss_is_a_number_a_mapping_or_a_term() -> None:
    mine = KnowledgeDistillation(temperature=2.0)
    nodes = loss_nodes.complete(
        {
            "ce": 0.1,
            "kd": {"weight": 0.9, "temperature": 3, "schedule": Linear(start=0, end=1)},
            "mine": mine,
            "smooth": {"term": CrossEntropy(), "weight": 0.5},
            "named": {"_target_": "kd.losses.logits.kd.KnowledgeDistillation", "temperature": 5.0},
        }
    )
    objective = build.objective({"loss": nodes})
    assert objective.weights == {"ce": 0.1, "kd": 0.9, "mine": 1.0, "smooth": 0.5, "named": 1.0}
    terms = dict(objective.items())
    assert terms["mine"] is mine
    assert (terms["kd"].temperature, terms["named"].temperature) == (3.0, 5.0)
    assert objective.weight("kd", 1, 2) == pytest.approx(0.45)
    assert loss_nodes.described(nodes)["mine"]["_target_"] == "kd.losses.logits.kd.KnowledgeDistillation"


WRONG = [
    ({"kdd": 1.0}, r"loss\.kdd does not exist \(near: kd"),
    ({"kd": {"temprature": 4}}, r"there is no option loss\.kd\.temprature \(near: temperature"),
    ({"kd": {"T": 4}}, r"there is no option loss\.kd\.T \(near: temperature"),
    ({"mine": {"term": CrossEntropy(), "wieght": 1}}, r"there is no option loss\.mine\.wieght \(near: weight"),
    ({"kd": "4"}, r"loss\.kd = '4' is not allowed"),
    ({"kd": {"temperature": -1}}, r"loss\.kd: temperature = -1 is not allowed"),
    ({"kd": -1}, r"loss\.kd\.weight = -1.0 is not allowed"),
    ({"mine": {"_target_": "kd.losses.logits.kd.Nothing"}}, r"loss\.mine\._target_ = kd\.losses\.logits\.kd\.Nothing"),
    ({"half": CrossEntropy()}, "loss.half is no name for a term"),
    ({}, "it must be a mapping of names to weights"),
]


@pytest.mark.parametrize(("loss", "said"), WRONG, ids=[said[:30] for _, said in WRONG])
def test_a_loss_that_is_wrong_is_a_sentence(loss, said) -> None:
    with pytest.raises(KdError, match=said):
        distilled(network(), network(9), loss=loss)


OPTIONS = [
    ({"epochs": 0}, "epochs = 0 is not allowed"),
    ({"epochs": 3, "val_every": 2}, "val_every = 2 is not allowed"),
    ({"scheduler": "cosin"}, "scheduler = cosin is not allowed"),
    ({"monitor": "val/acc"}, "val/acc is not measured; measured: val/acc1"),
    ({"num_classes": 4}, "the student answers 3 classes, the data has 4"),
    ({"run_directory": "here"}, r"there is no option run_directory \(near: run_dir"),
]


@pytest.mark.parametrize(("options", "said"), OPTIONS, ids=[next(iter(o)) for o, _ in OPTIONS])
def test_an_option_that_is_wrong_is_a_sentence(options, said) -> None:
    with pytest.raises(KdError, match=said):
        distilled(network(), network(9), **options)


# ---------------------------------------------------------------------- a plain trainer


def objective() -> Any:
    return api.Objective({"ce": CrossEntropy(), "kd": KnowledgeDistillation(4.0)}, {"ce": 0.1, "kd": 0.9})


@quiet
def test_the_distiller_in_a_plain_trainer() -> None:
    module = api.Distiller(network(), network(9).train(), objective(), optimizer=ADAM)
    trainer, (train_loader, val_loader, test_loader) = plain(), loaders()
    trainer.fit(module, train_loader, val_loader)
    assert {"val/acc1", "val/nll", "val/agreement"} <= set(trainer.callback_metrics)
    assert set(module.history) == {0, 1}  # not the sanity check before
    assert module.num_classes == 3
    (tested,) = trainer.test(module, test_loader, verbose=False)
    assert 0 <= tested["test/acc1"] <= 1


@quiet
def test_a_plain_trainer_prepares_taps_and_adapters() -> None:
    class Features(Term):
        student_taps, teacher_taps, over = ("1",), ("1",), "samples"
        needs_student_logits = needs_teacher_logits = False

        def prepare(self, setup: Setup) -> None:
            ((student, teacher),) = self.pairs(setup.student, setup.teacher)
            assert len(student) == 2
            assert not self.training
            assert (setup.epochs, setup.classes) == (2, 3)
            self.adapter = nn.Linear(student.shape[1], teacher.shape[1])

        def forward(self, student: Output, teacher: Output, batch: Batch) -> torch.Tensor:
            ((own, other),) = self.pairs(student, teacher)
            return nn.functional.mse_loss(self.adapter(own), other)

    term = Features()
    module = api.Distiller(network(), network(9), api.Objective({"ce": CrossEntropy(), "features": term}))
    trainer = plain()
    trainer.fit(module, *loaders()[:2])
    assert any(p is term.adapter.weight for p in trainer.optimizers[0].param_groups[0]["params"])


@quiet
def test_a_plain_trainer_tests_a_student_that_was_never_trained() -> None:
    module = api.Distiller(network(), None, api.Objective({"ce": CrossEntropy()}))
    (tested,) = plain().test(module, loaders()[2], verbose=False)
    assert 0 <= tested["test/acc1"] <= 1


@quiet
def test_a_plain_trainer_goes_on_from_its_checkpoint(tmp_path) -> None:
    module = api.Distiller(network(), network(9), objective())
    trainer = plain()
    trainer.fit(module, *loaders()[:2])
    trainer.save_checkpoint(tmp_path / "there.ckpt")
    again = api.Distiller(network(), network(9), objective())
    longer = L.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False)
    longer.fit(again, *loaders()[:2], ckpt_path=tmp_path / "there.ckpt")
    assert set(again.history) == {0, 1, 2}


def test_loaders_that_are_not_shared_out_are_refused_on_several_processes() -> None:
    loader = loaders()[0]
    with pytest.raises(KdError, match="the train loader gives each of the 2 processes the whole set"):
        refuse_unsharded(loader, "train", 2)
    refuse_unsharded(loader, "train", 1)
    sampler = torch.utils.data.DistributedSampler(loader.dataset, num_replicas=2, rank=0)
    refuse_unsharded(DataLoader(loader.dataset, sampler=sampler), "train", 2)


@quiet
def test_what_cannot_be_asked_in_a_plain_trainer_is_a_sentence() -> None:
    teacher = api.Teacher([network(9)], cache=True)
    module = api.Distiller(network(), teacher, objective())
    with pytest.raises(KdError, match="a teacher with cache = True answers the whole training set"):
        plain().fit(module, *loaders()[:2])


# ---------------------------------------------------------------------- a data module of one's own

MODULE = '''
import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset


class Three(lightning.LightningDataModule):
    """The three loaders, nothing else."""

    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.batch_size = batch_size

    def made(self, seed):
        targets = torch.arange(48) % 3
        points = torch.randn(48, 4, generator=torch.Generator().manual_seed(seed))
        return DataLoader(TensorDataset(points + 3 * torch.eye(4)[targets], targets), self.batch_size)

    def train_dataloader(self):
        return self.made(0)

    def val_dataloader(self):
        return self.made(1)

    def test_dataloader(self):
        return self.made(2)


class Two(lightning.LightningDataModule):
    train_dataloader = val_dataloader = Three.train_dataloader


def network(width: int, num_classes: int):
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, num_classes))
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that choose a data module and a network of a module in the working directory."""
    (tmp_path / "ownmodule.py").write_text(MODULE)
    for name, text in {"data/own": "_target_: ownmodule.Three\n", "model/net": NET}.items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / f"{name}.yaml").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ownmodule", raising=False)
    return ["--config-dir", "conf", "data=own", "model@student=net", "recipe.epochs=1", "hardware=cpu"]


NET = "model:\n  _target_: ownmodule.network\n  width: 6\n"


def test_a_data_module_with_three_loaders_trains(kd, own, tmp_path) -> None:
    said = kd("train", *own, "student.model.num_classes=3", "hydra.run.dir=run")
    assert said.code == 0, said.err
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["data"]["sizes"]["train"] == 48
    assert 0 <= record["student"]["selected"]["test"]["acc1"] <= 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "takes num_classes, which the data does not tell: give the data module an attribute num_classes"),
        (["data._target_=ownmodule.Two"], "data._target_ = ownmodule.Two lacks test_dataloader"),
    ],
)
def test_what_a_data_module_lacks_is_one_sentence(kd, own, more, said) -> None:
    answer = kd("train", *own, *more)
    assert answer.code == 1
    assert said in answer.err
    assert "Traceback" not in answer.err


# ---------------------------------------------------------------------- handed on, and heads that stay


def test_a_peer_teaches_the_next_run_and_a_term_goes_on(kd, monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(TOYS)
    common = ["--config-dir", str(TOYS / "conf"), "data=blobs", "model@student=points", "recipe.epochs=2"]
    common += ["recipe.batch_size=8", "hardware=cpu"]
    mutual = ["distiller._target_=toys.Mutual", "networks.peer={_target_:toys.points,width:7}", "loss=[ce,kd]"]
    assert kd("train", *common, *mutual, "hydra.run.dir=mutual").code == 0
    taught = ["teacher.checkpoint=mutual/peer.safetensors", "teacher.trust=true", "loss=[ce,feature]"]
    said = kd("train", *common, *taught, "hydra.run.dir=taught")
    assert said.code == 0, said.err
    record = json.loads(Path("taught/result.json").read_text())
    assert record["teacher"]["parameters"] == 4 * 7 + 7 + 7 * 3 + 3

    on = ["student.checkpoint=taught", "loss.feature.checkpoint=taught", "recipe.optimizer.lr=1e-12"]
    said = kd("train", *common, *taught, *on, "hydra.run.dir=on")
    assert said.code == 0, said.err
    before, after = (load_file(Path(run) / "terms.safetensors") for run in ("taught", "on"))
    torch.testing.assert_close(after["feature.map.weight"], before["feature.map.weight"], rtol=0, atol=1e-6)


def test_a_network_with_another_module_shares_the_rest() -> None:
    inner = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5))
    whole = nn.Sequential()
    whole.add_module("body", inner)
    whole.add_module("fc", nn.Linear(5, 3))
    assert classifier(whole).name == "fc"
    other = with_module(whole, "fc", nn.Linear(5, 9))
    deep = with_module(whole, "body.0", nn.Linear(4, 5))
    assert whole(torch.zeros(2, 4)).shape == (2, 3)
    assert other(torch.zeros(2, 4)).shape == (2, 9)
    assert other.body[0].weight is whole.body[0].weight
    assert deep.body[0] is not inner[0]
    assert deep.body[1] is inner[1]
    with pytest.raises(ValueError, match="has no linear layer"):
        classifier(nn.ReLU())


def test_a_teacher_may_be_answers_of_ones_own() -> None:
    class Noise(Answers):
        def answer(self, batch: Batch, want: Any) -> Output:
            return Output(torch.zeros(len(batch), 3))

    result = distilled(network(), Noise())
    assert "agreement" not in result.metrics
