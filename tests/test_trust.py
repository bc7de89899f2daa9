"""Numbers that would be another's without a word: answers of other data, runs of other networks, frozen batch norms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kd as api
from kd.data.base import AdaptedData, Loaders, as_batch
from kd.distill.distiller import Distiller
from kd.distill.evaluation import measure
from kd.distill.objective import Objective
from kd.distill.schedules import Linear
from kd.distill.teacher import Teacher
from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch, Output
from kd.losses.logits.ce import CrossEntropy
from kd.losses.logits.kd import KnowledgeDistillation
from kd.tasks.base import Want
from kd.tasks.classification import Classification
from kd.tasks.embedding import Embedding
from kd.tasks.tokens import CausalLM

QUIET: dict[str, Any] = {
    **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
    "enable_model_summary": False,
}


def points(seed: int = 0, count: int = 32, shift: float = 0.0) -> TensorDataset:
    drawn = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=drawn)
    return TensorDataset(inputs + shift, (inputs[:, 0] > 0).long(), torch.arange(count))


def network(width: int = 8) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))


# of a plain trainer: that it validates nothing, that its loaders have no workers, and what it uses of torch
pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning", "ignore:.*LeafSpec.*is deprecated.*"
)


def distiller(**options: Any) -> Distiller:
    terms = {"ce": CrossEntropy(), "kd": KnowledgeDistillation(4.0)}
    return Distiller(
        network(), options.pop("teacher", network(16)), options.pop("objective", Objective(terms)), **options
    )


def test_a_frozen_teacher_answers_other_data_anew() -> None:
    """With the same indices, in the same places of the loader."""
    module, trainer = distiller(), L.Trainer(max_epochs=1, **QUIET)
    clean, moved = (DataLoader(points(shift=shift), batch_size=16) for shift in (0.0, 2.0))
    trainer.fit(module, clean, clean)
    found = []
    for loader in (clean, moved):
        trainer.test(module, loader, verbose=False)
        found.append(module.teacher_tested["test"]["nll"])
    teacher = network(16).eval()
    with torch.no_grad():
        due = [float(nn.functional.cross_entropy(teacher(x), y)) for x, y, _ in (clean.dataset[:], moved.dataset[:])]
    assert found == pytest.approx(due, rel=1e-4)


def run(where: Path, width: int = 8, temperature: float = 2.0, samples: int = 32, seed: int = 0) -> dict[str, Any]:
    loaders = [DataLoader(points(split, samples), batch_size=16) for split in range(3)]
    loss = {"kd": KnowledgeDistillation(temperature)}

    def optimizer(parameters: Any) -> torch.optim.Optimizer:  # another object in each call
        return torch.optim.SGD(parameters, lr=0.1)

    given = {"loss": loss, "optimizer": optimizer, "epochs": 1, "seed": seed, "run_dir": where}
    api.distill(network(width), network(16), *loaders, accelerator="cpu", verbose=False, **given)
    return json.loads((where / "result.json").read_text())


@pytest.mark.parametrize("other", [{"width": 64}, {"temperature": 8.0}, {"samples": 48}])
def test_runs_from_python_share_a_hash_where_they_are_one_experiment(tmp_path: Path, other: dict[str, Any]) -> None:
    first, second = (run(tmp_path / str(seed), seed=seed)["config_hash"] for seed in (0, 1))
    assert first == second
    assert run(tmp_path / "other", **other)["config_hash"] != first


def test_batch_norms_that_a_user_has_frozen_stay_frozen() -> None:
    student = network()
    student[1].eval()
    before = student[1].running_mean.clone()
    loaders = [DataLoader(points(split, shift=1.0), batch_size=16) for split in range(3)]
    api.distill(student, network(16), *loaders, epochs=1, accelerator="cpu", verbose=False)
    assert torch.equal(student[1].running_mean, before)


@pytest.mark.parametrize("name", ["loss", "acc1", "labelled"])
def test_a_term_has_no_name_of_another_curve(name: str) -> None:
    module = distiller(objective=Objective({name: CrossEntropy(), "kd": KnowledgeDistillation(4.0)}))
    with pytest.raises(KdError, match=rf"^loss\.{name} is no name for a term: train/{name} is another curve"):
        module.prepare(Batch(*points()[:8]))


def test_padding_of_a_mapping_is_no_position() -> None:
    attended = torch.tensor([[1, 1, 0, 0]])
    batch = as_batch({"input_ids": torch.arange(4)[None], "attention_mask": attended, "labels": torch.tensor([0])})
    assert torch.equal(batch.mask, attended.bool())

    class Places(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return input_ids.unsqueeze(-1).float()

    assert float(Embedding().answer(Places(), batch.inputs, batch, Want()).logits) == 0.5


def test_a_distiller_draws_by_the_seed_of_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert distiller().seed == 0
    L.seed_everything(7, verbose=False)
    assert (distiller().seed, distiller(seed=3).seed) == (7, 3)


def test_validation_that_is_off_reads_nothing() -> None:
    class TrainAlone(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(points(), batch_size=16)

    L.Trainer(max_epochs=1, **QUIET).fit(distiller(), datamodule=TrainAlone())

    read: list[int] = []

    class Watched(TrainAlone):
        def val_dataloader(self) -> list[Any]:
            read.append(1)
            return [points()[:4]]

    L.Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(module := distiller(), datamodule=Watched())
    assert not read
    assert not module.teacher_metrics


def test_answers_that_are_kept_refuse_what_reads_more_without_a_config() -> None:
    class Composing(Distiller):
        def compose(self, batch: Batch) -> Batch:
            return batch

    terms = Objective({"kd": KnowledgeDistillation(4.0)})
    module = Composing(network(), Teacher([network(16)], cache=True), terms)
    with pytest.raises(KdError, match=r"^teacher\.cache = true keeps answers to the samples as they are, Composing"):
        module.prepare(Batch(*points()[:8]))


def test_a_mean_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="combine = mean_logits is not allowed: it must be probabilities or logits"):
        Teacher([network(), network()], combine="mean_logits")


def test_labels_below_no_label_are_refused() -> None:
    inputs, targets, index = points()[:8]
    targets[3] = -100
    with pytest.raises(KdError, match=rf"^the labels go down to -100: they must be 0 … 1, or {UNLABELLED} for none"):
        distiller().prepare(Batch(inputs, targets, index))


def test_a_run_without_an_end_stays_at_the_beginning_of_its_schedules() -> None:
    class Places(L.Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[float, float]] = []

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(module.place())
            trainer.should_stop = len(self.seen) > 5

    schedule = Linear(start=1.0, end=0.0, epochs=None)
    module = distiller(objective=Objective({"kd": KnowledgeDistillation(4.0)}, schedules={"kd": schedule}))
    places = Places()
    L.Trainer(max_epochs=-1, callbacks=[places], **QUIET).fit(module, DataLoader(points(), batch_size=16))
    assert set(places.seen) == {(0.0, 1)}


def test_a_batch_with_more_than_a_network_takes_is_one_sentence() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    inputs, targets, _ = points()[:8]
    module = Distiller(Sum(), None, Objective({"ce": CrossEntropy()}))
    with pytest.raises(KdError, match=r"^a network cannot take inputs of .*x \(4,\), more \(4,\).*argument 'more'"):
        module.prepare(Batch({"x": inputs, "more": inputs}, targets))


@pytest.mark.parametrize("name", ["mean", "std", "class_names", "split_facts", "mixup", "input_shape"])
def test_what_a_data_module_leaves_open_may_be_none(name: str) -> None:
    loaders = Loaders(*[DataLoader(points(), batch_size=16)] * 3, num_classes=2)
    setattr(loaders, name, False if name == "mixup" else None)
    data = AdaptedData(loaders)
    assert not data.mean
    assert data.mixup is None
    assert data.class_names == ["0", "1"]
    assert data.input_shape == (4,)


def test_padding_on_the_left_predicts_nothing() -> None:
    ids = torch.tensor([[0, 5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1, 1]])}
    targets = torch.where(inputs["attention_mask"].bool(), ids, UNLABELLED)
    rows = CausalLM().rows(as_batch({**inputs, "labels": targets}))
    assert rows.extra["positions"].tolist() == [1, 2]
    assert rows.targets.tolist() == [6, 7]


def test_predictions_of_data_without_an_index_are_counted_as_they_come() -> None:
    inputs, targets, _ = points(count=20)[:]
    kept: dict[str, list[Tensor]] = {}
    batches = DataLoader(TensorDataset(inputs, targets), batch_size=8)
    student = network().eval()
    with torch.no_grad():
        measure(Classification(), 2, lambda b: Output(student(b.inputs)), batches, torch.device("cpu"), keep=kept)
    assert torch.cat(kept["index"]).tolist() == list(range(20))
    assert torch.equal(torch.cat(kept["target"]), targets)


def test_masks_need_another_task() -> None:
    with pytest.raises(KdError, match=r"needs one class a sample, the data gives \(samples, 4, 4\): set task=segm"):
        Classification().rows(Batch(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)))
