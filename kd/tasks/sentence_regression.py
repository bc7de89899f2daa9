"""Numbers for sentences and pairs of sentences, as the similarity of STS-B: a sentence is a row."""

from __future__ import annotations

from torch import Tensor
from torchmetrics import MeanSquaredError, PearsonCorrCoef, SpearmanCorrCoef

from kd.errors import KdError
from kd.losses.base import Batch, Output
from kd.tasks.base import Meter, Task
from kd.tasks.metrics import Metric


class SentenceRegression(Task):
    """Spearman's and Pearson's correlation with the targets (GLUE's), and squared error. Networks have one output."""

    architecture = "sequence_classification"
    metrics = (
        Metric("spearman", "Spearman"),
        Metric("pearson", "Pearson"),
        Metric("mse", "squared error", better="min"),
    )

    def rows(self, batch: Batch) -> Batch:
        """One number a row, as float."""
        targets = None if batch.targets is None else batch.targets.float()
        return Batch(batch.inputs, targets, batch.index, batch.mask, batch.views, batch.extra)

    def agree(self, student: Output, teacher: Output, classes: int | None, compared: bool) -> None:
        """Refuse networks with more than one output."""
        for side, output in {"student": student, "teacher": teacher}.items():
            if output.has_logits and output.logits.shape[-1] != 1:
                raise KdError(f"the {side} has {output.logits.shape[-1]} outputs a row: this task has one number a row")

    def meter(self, classes: int | None) -> CorrelationMeter:
        """A fresh meter for one pass."""
        return CorrelationMeter()


class CorrelationMeter(Meter):
    """Correlations over all rows of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.spearman, self.pearson, self.mse = SpearmanCorrCoef(), PearsonCorrCoef(), MeanSquaredError()

    def update(self, student: Output, batch: Batch, teacher: Output | None = None) -> None:
        """Add one batch."""
        found, wanted = _numbers(student), batch.targets
        for metric in (self.spearman, self.pearson, self.mse):
            metric.update(found, wanted)

    def compute(self, with_teacher: bool) -> dict[str, float]:
        """Correlations, −1 to 1, and mean squared error."""
        return {name: float(getattr(self, name).compute()) for name in ("spearman", "pearson", "mse")}


def _numbers(output: Output) -> Tensor:
    return output.logits.float().squeeze(-1)
