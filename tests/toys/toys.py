"""Ten kinds of work that a method or a task may need, each as small as it can be, all from outside the package."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from kd.distill.answers import Answers
from kd.distill.distiller import Distiller, Step
from kd.losses.base import UNLABELLED, Batch, Output, Setup, Term, TopK
from kd.losses.logits.kd import kl_divergence
from kd.tasks.base import Meter, Metric, Task, Want

# ---------------------------------------------------------------------- data


class Rows(L.LightningDataModule):
    """``samples`` inputs of fixed random numbers in three splits; batches come in a fixed order, with their index."""

    def __init__(self, samples: int = 48, batch_size: int = 8) -> None:
        super().__init__()
        self.samples, self.batch_size = samples, batch_size
        self.train_index = torch.arange(samples)

    def drawn(self, split: str) -> tuple[Any, Tensor]:
        """Inputs and targets of a split."""
        raise NotImplementedError

    @property
    def train_targets(self) -> Tensor:
        return self.drawn("train")[1]

    def batches(self, split: str) -> list[Batch]:
        """All batches of a split."""
        whole = Batch(*self.drawn(split), torch.arange(self.samples))
        starts = range(0, self.samples, self.batch_size)
        return [whole.map(lambda t, s=start: t[s : s + self.batch_size]) for start in starts]

    def train_dataloader(self) -> list[Batch]:
        return self.batches("train")

    def val_dataloader(self) -> list[Batch]:
        return self.batches("val")

    def test_dataloader(self) -> list[Batch]:
        return self.batches("test")

    def random(self, split: str, *shape: int) -> Tensor:
        """Numbers that depend on the split and the shape alone."""
        seed = {"train": 1, "val": 2, "test": 3}[split]
        return torch.randn(self.samples, *shape, generator=torch.Generator().manual_seed(seed))


class Plane(Rows):
    """Points (3,) and a linear number of them: regression."""

    def drawn(self, split: str) -> tuple[Tensor, Tensor]:
        points = self.random(split, 3)
        return points, points @ torch.tensor([1.0, -2.0, 0.5])


class Sentences(Rows):
    """Token ids (10,) of which the last few are padding; each token is the one before it plus one, mostly."""

    num_classes = 11

    def drawn(self, split: str) -> tuple[dict[str, Tensor], Tensor]:
        start = (self.random(split, 1) * 7).long() % 11
        ids = (start + torch.arange(10)) % 11
        lengths = 6 + torch.arange(self.samples) % 5
        mask = (torch.arange(10) < lengths.unsqueeze(1)).long()
        return {"input_ids": ids * mask, "attention_mask": mask}, torch.where(mask.bool(), ids, -100)


class Maps(Rows):
    """Images (1, 6, 6) and a class of each pixel, the sign of its value; a border is to be ignored (255)."""

    num_classes, input_shape = 2, (1, 6, 6)

    def drawn(self, split: str) -> tuple[Tensor, Tensor]:
        images = self.random(split, 1, 6, 6)
        targets = (images[:, 0] > 0).long()
        targets[:, 0], targets[:, :, -1] = 255, 255
        return images, targets


class Blobs(Rows):
    """Points (4,) of three classes."""

    num_classes, input_shape = 3, (4,)

    def drawn(self, split: str) -> tuple[Tensor, Tensor]:
        targets = torch.arange(self.samples) % 3
        return self.random(split, 4) + 2 * F.one_hot(targets, 4), targets


class TwoViews(Blobs):
    """The same, with a second view of each training point, and labels that are shares of the classes."""

    def batches(self, split: str) -> list[Batch]:
        found = super().batches(split)
        if split != "train":
            return found
        soft = [0.9 * F.one_hot(batch.targets, 3) + 0.1 / 3 for batch in found]
        return [
            Batch(batch.inputs, targets, batch.index, views={"strong": batch.inputs * 1.1})
            for batch, targets in zip(found, soft, strict=True)
        ]


# ---------------------------------------------------------------------- tasks


class Errors(Meter):
    """Mean squared and absolute error."""

    def __init__(self) -> None:
        super().__init__()
        self.mse, self.mae = MeanMetric(), MeanMetric()

    def update(self, student: Output, batch: Batch, teacher: Output | None = None) -> None:
        error = student.logits.squeeze(1) - batch.targets
        self.mse.update(error.square())
        self.mae.update(error.abs())

    def compute(self, with_teacher: bool) -> dict[str, float]:
        return {"mse": float(self.mse.compute()), "mae": float(self.mae.compute())}


class Regression(Task):
    """A number for each sample; the less the error, the better."""

    metrics = (Metric("mse", "squared error", "min", digits=3), Metric("mae", "absolute error", "min", unit="m"))
    counts = ("squares",)

    def count(self, student: Output, batch: Batch) -> list[Tensor]:
        return [(student.logits.detach().squeeze(1) - batch.targets).square().sum()]

    def meter(self, classes: int | None) -> Errors:
        return Errors()


class Loss(Meter):
    """Mean cross-entropy of the rows, and how often both networks choose alike."""

    def __init__(self) -> None:
        super().__init__()
        self.nll, self.alike = MeanMetric(), MeanMetric()

    def update(self, student: Output, batch: Batch, teacher: Output | None = None) -> None:
        keep = batch.targets != UNLABELLED
        self.nll.update(F.cross_entropy(student.logits[keep], batch.targets[keep], reduction="none"))
        if teacher is not None:
            self.alike.update((student.logits.argmax(1) == teacher.logits.argmax(1)).float())

    def compute(self, with_teacher: bool) -> dict[str, float]:
        found = {"loss": float(self.nll.compute())}
        return {**found, "alike": float(self.alike.compute())} if with_teacher else found


class NextToken(Task):
    """A row is a position whose next token is supervised; hidden rows are chosen before the output projection."""

    metrics = (Metric("loss", "loss", "min", digits=3), Metric("alike", "alike", share=True, beside_teacher=True))

    def rows(self, batch: Batch) -> Batch:
        if batch.targets is None:  # inputs alone, to count operations: every position
            return batch
        following = batch.targets[:, 1:]
        kept = following != -100
        extra = {**batch.extra, "kept": kept}
        return Batch(batch.inputs, following[kept], batch.index, batch.inputs["attention_mask"].bool(), {}, extra)

    def answer(self, network: nn.Module, inputs: Any, batch: Batch, want: Want) -> Output:
        hidden = network.body(**inputs)
        if "kept" not in batch.extra:  # latency and operations: every position
            return Output(hidden=hidden.flatten(0, 1), head=network.head, raw=hidden)
        return Output(hidden=hidden[:, :-1][batch.extra["kept"]], head=network.head, raw=hidden)

    def meter(self, classes: int | None) -> Loss:
        return Loss()


class Pixels(Task):
    """A row is a pixel that is not to be ignored."""

    metrics = (Metric("loss", "loss", "min", digits=3), Metric("alike", "alike", share=True, beside_teacher=True))

    def rows(self, batch: Batch) -> Batch:
        if batch.targets is None:
            return batch
        kept = batch.targets != 255
        return Batch(batch.inputs, batch.targets[kept], batch.index, extra={**batch.extra, "kept": kept})

    def answer(self, network: nn.Module, inputs: Any, batch: Batch, want: Want) -> Output:
        maps = network(inputs)
        kept = batch.extra.get("kept", torch.ones_like(maps[:, 0], dtype=torch.bool))
        return Output(maps.movedim(1, -1)[kept], raw=maps)

    def meter(self, classes: int | None) -> Loss:
        return Loss()


# ---------------------------------------------------------------------- networks


def points(width: int, inputs: int = 4, outputs: int = 3) -> nn.Sequential:
    """Points to logits; its stage is the output of the hidden layer."""
    network = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))
    network.stages = ("1",)
    return network


def headless(width: int = 5) -> nn.Sequential:
    """Points to features (width,), as a foundation model without a classifier."""
    network = nn.Sequential(nn.Linear(4, width), nn.Tanh())
    network.stages = ("1",)
    return network


class Language(nn.Module):
    """Token ids to logits of the next token, by the present one and whether there is one."""

    def __init__(self, width: int = 8, num_classes: int = 11) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(num_classes, width), nn.Linear(width, num_classes)

    def body(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.table(input_ids).tanh() * attention_mask.unsqueeze(-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.body(input_ids, attention_mask))


def maps(width: int = 4) -> nn.Sequential:
    """Images (1, H, W) to a logit map (2, H, W)."""
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2, 1))


# ---------------------------------------------------------------------- terms


class SquaredError(Term):
    """Distance to the number that is to be found."""

    needs_teacher = needs_teacher_logits = False
    needs_labels, over = True, "labelled"

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return F.mse_loss(student.logits.squeeze(1), batch.targets)


class Imitate(Term):
    """Distance of the two networks' outputs."""

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return F.mse_loss(student.logits, teacher.logits)


class Bank(Term):
    """Pull each feature to the mean of what the bank remembers of its class: a table over the training set."""

    needs_student_logits = needs_teacher_logits = needs_teacher = False
    needs_labels, over, student_taps = True, "batch", ("1",)
    features: Tensor
    targets: Tensor

    def prepare(self, setup: Setup) -> None:
        (tap,) = self.student_taps
        assert setup.train_targets is not None
        self.register_buffer("features", torch.zeros(setup.size, setup.student.features[tap].shape[1]))
        self.register_buffer("targets", setup.train_targets.clone())

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        feature = student.features["1"]
        of_class = F.one_hot(self.targets, 3).float()
        means = (of_class.T @ self.features) / of_class.sum(0).unsqueeze(1)
        if self.training:
            self.features.index_copy_(0, batch.index, feature.detach().float())
        return (feature - means[batch.targets]).square().mean()


class SameFeature(Term):
    """Match the teacher's feature through a linear map; no logits at all."""

    needs_student_logits = needs_teacher_logits = False
    over, student_taps, teacher_taps = "samples", ("1",), ("1",)

    def prepare(self, setup: Setup) -> None:
        ((student, teacher),) = self.pairs(setup.student, setup.teacher)
        self.map = nn.Linear(student.shape[1], teacher.shape[1])

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        ((own, other),) = self.pairs(student, teacher)
        return F.mse_loss(self.map(own), other)


class ReusedClassifier(Term):
    """Project the student's feature to the teacher's width and put the teacher's own classifier behind it; it stays."""

    needs_student_logits = needs_teacher_logits = False
    over, student_taps, teacher_taps = "samples", ("1",), ("1",)

    def prepare(self, setup: Setup) -> None:
        ((student, teacher),) = self.pairs(setup.student, setup.teacher)
        self.projector = nn.Linear(student.shape[1], teacher.shape[1])
        head = setup.networks["teacher"][-1]
        self.head = nn.Linear(head.in_features, head.out_features).requires_grad_(False)
        self.head.load_state_dict(head.state_dict())

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        ((own, other),) = self.pairs(student, teacher)
        return F.mse_loss(self.projector(own), other)

    def deployed(self, student: nn.Module) -> nn.Module:
        return nn.Sequential(student[:-1], self.projector, self.head)


class Jacobian(Term):
    """Match the gradients of the summed logits by the input."""

    needs_input_gradient = True
    over = "samples"

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        own, other = (self.gradient(output, batch.inputs) for output in (student, teacher))
        return F.mse_loss(own, other.detach())

    @staticmethod
    def gradient(output: Output, inputs: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(output.logits.sum(), inputs, create_graph=True)
        return found


class Consistent(Term):
    """The student answers its strong view as the teacher answers it."""

    needs_views = ("strong",)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return kl_divergence(student.views["strong"].logits, teacher.views["strong"].logits, 1.0)


# ---------------------------------------------------------------------- set-ups, answers


class Mutual(Distiller):
    """Two networks teach one another: each with an optimiser of its own."""

    supplies_teacher = True
    own_optimizers = ("peer",)

    def answer_of_teacher(self, batch: Batch) -> Output:
        return self.task.answer(self.peers["peer"], batch.inputs, batch, Want())

    def losses(self, batch: Batch) -> Step:
        student, peer = self.answer_of_student(batch), self.answer_of_teacher(batch)
        step = self.score(student, peer.detach(), batch)
        return step.beside(self.score(peer, student.detach(), batch), "peer")


class KeptTopK(Answers):
    """The two likeliest classes of each training sample, as a cache on the disk would give them."""

    def __init__(self, teacher: Any, data: Any) -> None:
        super().__init__()
        batches = [data.own.drawn("train")[0].split(16)]
        with torch.no_grad():
            log_probs = torch.cat([teacher(part).logits for part in batches[0]]).log_softmax(1)
        self.kept = log_probs.topk(2)

    def answer(self, batch: Batch, want: Want) -> Output:
        return Output(topk=TopK(self.kept.indices[batch.index], self.kept.values[batch.index], 3))
