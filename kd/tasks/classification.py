"""Image classification: an image is a row, its class the target."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from kd.losses.base import UNLABELLED


class Classification:
    """Top-1 and top-k accuracy, NLL, expected calibration error; beside a teacher agreement and KL to it.

    ``topk``: the k of ``acc5`` (the name stays; capped at the number of classes).
    ``ece_bins``: equal-width confidence bins (Guo 2017).
    """

    def __init__(self, topk: int = 5, ece_bins: int = 15) -> None:
        if topk < 1 or ece_bins < 1:
            raise ValueError(f"topk = {topk}, ece_bins = {ece_bins} is not allowed: both must be 1 or more")
        self.topk, self.ece_bins = topk, ece_bins

    counts = ("acc1", "acc5")
    """Names of the values of :meth:`count`, as logged in training."""

    def count(self, logits: Tensor, targets: Tensor) -> tuple[list[Tensor], Tensor]:
        """Correct answers among the labelled rows (top-1, top-k) and the number of labelled rows, all 0-d.

        The lean form of a metric for the training step: a few kernels, no synchronisation.
        """
        labelled = targets != UNLABELLED
        k = min(self.topk, logits.shape[1])
        # the rank of the true class by counting: no sort. Ties and NaN count against it, so a dead network scores 0
        own = logits.detach().gather(1, targets.clamp(min=0).unsqueeze(1))
        ahead = (~(logits.detach() < own)).sum(1) - 1
        return [((ahead < n) & labelled).sum() for n in (1, k)], labelled.sum()

    def metrics(self, num_classes: int) -> ClassificationMetrics:
        """A fresh metric object for one pass over a split."""
        return ClassificationMetrics(num_classes, min(self.topk, num_classes), self.ece_bins)


class ClassificationMetrics(nn.Module):
    """Metrics of one pass: ``update`` with logits (rows, classes), then ``compute``."""

    def __init__(self, num_classes: int, topk: int, ece_bins: int) -> None:
        super().__init__()
        self.acc1 = MulticlassAccuracy(num_classes, average="micro")
        self.acc5 = MulticlassAccuracy(num_classes, average="micro", top_k=topk)
        self.per_class = MulticlassAccuracy(num_classes, average="none")
        self.ece = MulticlassCalibrationError(num_classes, n_bins=ece_bins)
        self.nll, self.agreement, self.kl = MeanMetric(), MeanMetric(), MeanMetric()
        self.rows = 0

    def update(self, student: Tensor, targets: Tensor, teacher: Tensor | None = None) -> None:
        """Logits (rows, classes) of the measured network, targets (rows,), logits of its teacher if there is one."""
        student = student.float()
        for metric in (self.acc1, self.acc5, self.per_class):
            metric.update(student, targets)
        self.ece.update(student.softmax(1), targets)
        self.nll.update(F.cross_entropy(student, targets, reduction="none"))
        if teacher is not None:
            teacher = teacher.float()
            self.agreement.update((student.argmax(1) == teacher.argmax(1)).float())
            log_s, log_t = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
            self.kl.update(F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1))
        self.rows += len(targets)

    def compute(self, with_teacher: bool) -> dict[str, float]:
        """``acc1, acc5, nll, ece`` as fractions (0…1; NLL in nats), and ``agreement, kl`` beside a teacher."""
        names = ["acc1", "acc5", "nll", "ece", *(["agreement", "kl"] if with_teacher else [])]
        return {name: float(getattr(self, name).compute()) for name in names}

    def accuracy_per_class(self) -> list[float]:
        """Recall of each class, 0…1 (0 for a class without rows)."""
        return [float(v) for v in torch.nan_to_num(self.per_class.compute())]
