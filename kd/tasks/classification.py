"""Image classification: an image is a row, its class the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from kd.losses.base import UNLABELLED


class Classification:
    """Top-1 and top-5 accuracy, NLL, expected calibration error; beside a teacher agreement and KL to it.

    ``ece_bins``: equal-width confidence bins (Guo 2017).
    """

    def __init__(self, ece_bins: int = 15) -> None:
        if ece_bins < 1:
            raise ValueError(f"ece_bins = {ece_bins} is not allowed: it must be 1 or more")
        self.ece_bins = ece_bins

    counts = ("acc1", "acc5")
    """Names of the values of :meth:`count`, as logged in training."""

    def count(self, logits: Tensor, targets: Tensor) -> tuple[list[Tensor], Tensor]:
        """Correct answers among the labelled rows (top-1, top-5) and the number of labelled rows, all 0-d.

        The lean form of a metric for the training step: a few kernels, no synchronisation.
        """
        labelled = targets != UNLABELLED
        ahead = rank(logits.detach(), targets.clamp(min=0))
        return [((ahead < k) & labelled).sum() for k in (1, 5)], labelled.sum()

    def metric_names(self, with_teacher: bool) -> list[str]:
        """The names of the metrics of a split."""
        return ["acc1", "acc5", "nll", "ece", *(["agreement", "kl"] if with_teacher else [])]

    def doubt(self, measured: Mapping[str, float], recorded: Mapping[str, float], num_classes: int) -> str:
        """Say what is wrong with a teacher whose accuracy is near chance, or far below what its own run ``recorded``.

        Returns the end of a sentence, "" when nothing is: labels in another order, other images, other statistics.
        """
        found, before = measured["acc1"], recorded.get("acc1")
        if found < 1.5 / num_classes:
            return f"is right on {found:.1%} of the validation images, near chance (1 in {num_classes}): is it trained?"
        if before is not None and found < before - 0.05:
            return (
                f"is right on {found:.1%} of the validation images, {before:.1%} in its own run: are the images, the "
                "labels and the statistics of its input (teacher.mean, teacher.std) those that it was trained with?"
            )
        return ""

    def metrics(self, num_classes: int) -> ClassificationMetrics:
        """A fresh metric object for one pass over a split."""
        return ClassificationMetrics(num_classes, self.ece_bins, self.metric_names)


def rank(logits: Tensor, targets: Tensor) -> Tensor:
    """How many classes are ahead of the true one: (rows, classes), (rows,) → (rows,) int64, 0 for a right answer.

    By counting, without a sort. Ties and NaN count against the true class, so that a dead network scores 0.
    """
    own = logits.gather(1, targets.unsqueeze(1))
    return (~(logits < own)).sum(1) - 1


class ClassificationMetrics(nn.Module):
    """Metrics of one pass: ``update`` with logits (rows, classes), then ``compute``."""

    def __init__(self, num_classes: int, ece_bins: int, names: Callable[[bool], list[str]]) -> None:
        super().__init__()
        self.names = names
        self.acc1, self.acc5, self.nll, self.agreement, self.kl = (  # "disable": a NaN must show, not be dropped
            MeanMetric(nan_strategy="disable") for _ in range(5)
        )
        self.per_class = MulticlassAccuracy(num_classes, average="none")
        self.ece = MulticlassCalibrationError(num_classes, n_bins=ece_bins)

    def update(self, student: Tensor, targets: Tensor, teacher: Tensor | None = None) -> None:
        """Logits (rows, classes) of the measured network, targets (rows,), logits of its teacher if there is one."""
        student = student.float()
        ahead = rank(student, targets)
        self.acc1.update((ahead < 1).float())
        self.acc5.update((ahead < 5).float())
        self.per_class.update(student, targets)
        self.ece.update(student.softmax(1), targets)
        self.nll.update(F.cross_entropy(student, targets, reduction="none"))
        if teacher is not None:
            teacher = teacher.float()
            self.agreement.update((student.argmax(1) == teacher.argmax(1)).float())
            log_s, log_t = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
            self.kl.update(F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1))

    def compute(self, with_teacher: bool) -> dict[str, float]:
        """``acc1, acc5, nll, ece`` as fractions (0…1; NLL in nats), and ``agreement, kl`` beside a teacher."""
        return {name: float(getattr(self, name).compute()) for name in self.names(with_teacher)}

    def accuracy_per_class(self) -> list[float]:
        """Recall of each class, 0…1 (0 for a class without rows)."""
        return [float(v) for v in torch.nan_to_num(self.per_class.compute())]
