"""Image classification: an image is a row, its class the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics import Metric as TorchMetric
from torchmetrics.classification import BinaryCalibrationError

from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch, Output
from kd.tasks.base import Meter, Task
from kd.tasks.metrics import CLASSIFICATION, Metric


class Classification(Task):
    """Top-1 and top-5 accuracy, NLL, expected calibration error; beside a teacher agreement and KL to it.

    The answer is the class with the highest logit, the first of several (:func:`hits`), in every metric.
    ``ece_bins``: equal-width confidence bins (Guo 2017).
    """

    metrics: Sequence[Metric] = CLASSIFICATION
    counts: Sequence[str] = ("acc1", "acc5")
    summary = ("acc1", "nll", "ece", "agreement")
    samples = "images"  # how sentences call them, and what must be as it was in the training of a teacher
    as_trained = "the labels and the statistics of its input (teacher.mean, teacher.std)"

    def __init__(self, ece_bins: int = 15) -> None:
        if ece_bins < 1:
            raise ValueError(f"ece_bins = {ece_bins} is not allowed: it must be 1 or more")
        self.ece_bins = ece_bins

    def rows(self, batch: Batch) -> Batch:
        """Take a batch as it is: a sample is a row. ``KdError`` for targets of more than one class a sample."""
        targets = batch.targets
        if targets is not None and targets.ndim > 1 and not targets.is_floating_point():
            shape = ", ".join(["samples", *map(str, targets.shape[1:])])
            advice = ": set task=segmentation model@student=timm_unet" if targets.ndim == 3 else ""
            raise KdError(f"task = classification needs one class a sample, the data gives ({shape}){advice}")
        return batch

    def count(self, student: Output, batch: Batch) -> list[Tensor]:
        """Right answers among the labelled rows, top-1 and top-5; of a mixture its larger share is the label."""
        if batch.targets is None:
            return [torch.zeros((), device=student.logits.device) for _ in self.counts]
        targets = batch.targets.argmax(-1) if batch.targets.is_floating_point() else batch.targets
        labelled = targets != UNLABELLED
        found = hits(student.logits.detach(), targets.clamp(min=0))[: len(self.counts)]
        return [(hit & labelled).sum() for hit in found]

    def meter(self, classes: int | None) -> ClassificationMeter:
        """Make a fresh meter for one pass over a split of so many classes."""
        if classes is None:
            raise ValueError("task = classification needs to know the number of classes")
        return ClassificationMeter(classes, self.ece_bins, self.names)

    def doubt(self, measured: Mapping[str, float], recorded: Mapping[str, float], classes: int | None) -> str:
        """Say what is wrong with a teacher whose accuracy is near chance, or far below what its own run ``recorded``.

        Returns the end of a sentence, "" when nothing is: labels in another order, other images, other statistics.
        """
        found, before = measured["acc1"], recorded.get("acc1")
        if classes and found < 1.5 / classes:
            seen = f"is right on {found:.1%} of the validation {self.samples}"
            return f"{seen}, near chance (1 in {classes}): is it trained?"
        if before is not None and found < before - 0.05:
            return (
                f"is right on {found:.1%} of the validation {self.samples}, {before:.1%} in its own run: are the "
                f"{self.samples}, {self.as_trained} those that it was trained with?"
            )
        return ""


def hits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Tell whether the true class is the answer, and whether among five: (rows, classes), (rows,) → 2 × (rows,) bool.

    The answer is ``argmax``: of classes with equal logits the first one, in torch as in numpy and in what is deployed.
    To count ties against the true class took up to 0.14 points from the top-1 of half precision, where they are many,
    and left another accuracy beside those per class; in float32 no published row has one. In the top 5 ties do count
    against it. NaN is no answer. By counting, without a sort.
    """
    targets = targets.unsqueeze(1)
    own = logits.gather(1, targets)
    right = (logits.argmax(1, keepdim=True) == targets) & (own == own)
    below = (logits < own).sum(1, keepdim=True)
    return right.squeeze(1), (right | (below > logits.shape[1] - 6)).squeeze(1)


class ClassificationMeter(Meter):
    """The metrics of one pass, from logits (rows, classes) and targets (rows,) int64."""

    def __init__(self, num_classes: int, ece_bins: int, names: Callable[[bool], list[str]]) -> None:
        super().__init__()
        self.names = names
        self.acc1, self.acc5, self.nll, self.agreement, self.kl = (  # "disable": a NaN must show, not be dropped
            MeanMetric(nan_strategy="disable") for _ in range(5)
        )
        self.recalls = Recalls(num_classes)
        self.ece = BinaryCalibrationError(n_bins=ece_bins, validate_args=False)  # of "is the answer right?"

    def update(self, student: Output, batch: Batch, teacher: Output | None = None) -> None:
        """Add one batch, whose rows all have a label."""
        self.add(student.logits, batch.targets, teacher.logits if teacher is not None else None)

    def add(self, student: Tensor, targets: Tensor, teacher: Tensor | None = None) -> None:
        """Add the same, from logits."""
        student = student.float()
        answer, (right, near) = student.argmax(1), hits(student, targets)
        self.acc1.update(right.float())
        self.acc5.update(near.float())
        self.recalls.update(right, targets)
        self.ece.update(student.softmax(1).amax(1), right.float())
        self.nll.update(F.cross_entropy(student, targets, reduction="none"))
        if teacher is not None:
            teacher = teacher.float()
            self.agreement.update((answer == teacher.argmax(1)).float())
            log_s, log_t = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
            self.kl.update(F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1))

    def compute(self, with_teacher: bool) -> dict[str, float]:
        """Return ``acc1, acc5, nll, ece`` as fractions (0…1; NLL in nats), and ``agreement, kl`` beside a teacher."""
        return {name: float(getattr(self, name).compute()) for name in self.names(with_teacher)}

    def per_class(self) -> list[float]:
        """Recall of each class, 0…1 (0 for a class without rows)."""
        return [float(v) for v in torch.nan_to_num(self.recalls.compute())]


class Recalls(TorchMetric):
    """The share of right answers of each class (classes,), NaN for a class without rows.

    In place of torchmetrics' accuracy, which with deterministic algorithms compares each row with classes² numbers: a
    second for 4,500 rows of 150 classes.
    """

    right: Tensor
    rows: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        for name in ("right", "rows"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, right: Tensor, targets: Tensor) -> None:
        """Add rows: whether the answer is right (rows,) bool, and the class (rows,) int64."""
        self.right.index_add_(0, targets, right.double())
        self.rows.index_add_(0, targets, torch.ones_like(right, dtype=torch.float64))

    def compute(self) -> Tensor:
        """Return the share of each class."""
        return self.right / self.rows
