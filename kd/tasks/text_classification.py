"""Classification of sentences and pairs of sentences: a sentence is a row, its class the target."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchmetrics.classification import BinaryF1Score, MulticlassF1Score, MulticlassMatthewsCorrCoef

from kd.tasks.classification import Classification, ClassificationMeter
from kd.tasks.metrics import CLASSIFICATION, Metric

KEPT = {metric.name: metric for metric in CLASSIFICATION}


class TextClassification(Classification):
    """Accuracy, macro-F1, Matthews' correlation (GLUE's), NLL, calibration error; beside a teacher agreement and KL.

    Of two classes also the F1 of class 1, which GLUE reports of MRPC and QQP.
    """

    architecture = "sequence_classification"
    metrics = (
        Metric("acc1", "accuracy", share=True, counted=True, hub="accuracy"),
        Metric("f1", "macro-F1", share=True),
        Metric("f1_positive", "F1 of class 1", share=True, hub="f1"),
        Metric("matthews", "Matthews", hub="matthews_correlation"),
        *(KEPT[name] for name in ("nll", "ece", "agreement", "kl")),
    )
    counts = ("acc1",)
    samples = "sentences"
    as_trained = "the labels and the tokenizer"
    summary = ("acc1", "f1", "nll", "agreement")

    def names(self, with_teacher: bool, classes: int | None = None) -> list[str]:
        """Return the names of the metrics of a split; the F1 of class 1 is one where there are two ``classes``."""
        found = super().names(with_teacher)
        return found if classes == 2 else [name for name in found if name != "f1_positive"]

    def meter(self, classes: int | None) -> TextClassificationMeter:
        """Make a fresh meter for one pass over a split of so many classes."""
        if classes is None:
            raise ValueError("task = text_classification needs to know the number of classes")
        return TextClassificationMeter(classes, self.ece_bins, partial(self.names, classes=classes))


class Matthews(MulticlassMatthewsCorrCoef):
    """Matthews' correlation; 0 where all answers, or all targets, are of one class, also of two classes."""

    def compute(self) -> Tensor:
        """Return it, from −1 to 1. torchmetrics gives other numbers for one answer to all of two classes."""
        if any((self.confmat.sum(axis) > 0).sum() < 2 for axis in (0, 1)):
            return self.confmat.new_zeros((), dtype=torch.float32)
        found: Tensor = super().compute()
        return found


class TextClassificationMeter(ClassificationMeter):
    """The metrics of one pass, from logits (rows, classes) and targets (rows,) int64."""

    def __init__(self, num_classes: int, ece_bins: int, names: Callable[[bool], list[str]]) -> None:
        super().__init__(num_classes, ece_bins, names)
        self.f1, self.matthews = MulticlassF1Score(num_classes), Matthews(num_classes)
        self.f1_positive = BinaryF1Score() if num_classes == 2 else None

    def add(self, student: Tensor, targets: Tensor, teacher: Tensor | None = None) -> None:
        """Add one batch."""
        super().add(student, targets, teacher)
        answer = student.argmax(1)
        self.f1.update(answer, targets)
        self.matthews.update(answer, targets)
        if self.f1_positive is not None:
            self.f1_positive.update(answer, targets)
