"""Regression of sentences and pairs of sentences (GLUE's STS-B): a sentence is a row, a number the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torchmetrics import CatMetric
from torchmetrics.functional import mean_squared_error, pearson_corrcoef, spearman_corrcoef

from kd.errors import KdError
from kd.losses.base import Batch, Output
from kd.tasks.base import Meter, Task
from kd.tasks.metrics import Metric

WORSE = 0.05  # a correlation that is lower by so much than in the teacher's own run is said


class TextRegression(Task):
    """Spearman's and Pearson's correlation with the labels (GLUE's metrics of STS-B), and the mean squared error.

    Beside a teacher ``similarity``: Pearson's correlation between the student's and the teacher's numbers. Labels are
    as the data has them: the network's one output is trained towards them, on their scale.
    """

    architecture = "sequence_regression"
    metrics = (
        Metric("spearman", "Spearman", digits=4, hub="spearmanr"),
        Metric("pearson", "Pearson", digits=4, hub="pearsonr"),
        Metric("mse", "squared error", better="min", digits=4),
        Metric("similarity", "similarity", beside_teacher=True),
    )
    distribution = False
    regression = True

    def rows(self, batch: Batch) -> Batch:
        """Return the batch as it is. ``KdError`` when its targets are no numbers."""
        if batch.targets is not None and not batch.targets.is_floating_point():
            raise KdError("task = text_regression needs a number a text, the data has classes: set data.numbers=true")
        return batch

    def agree(self, student: Output, teacher: Output, classes: int | None, compared: bool) -> None:
        """Refuse a network that answers other than one number a row."""
        for side, output in {"student": student, "teacher": teacher}.items():
            if output.has_logits and output.logits.shape[-1] != 1:
                raise KdError(
                    f"the {side} answers {output.logits.shape[-1]} numbers a row, task = text_regression needs one"
                )

    def meter(self, classes: int | None) -> RegressionMeter:
        """Make a fresh meter for one pass."""
        return RegressionMeter(self.names)

    def doubt(self, measured: Mapping[str, float], recorded: Mapping[str, float], classes: int | None) -> str:
        """Say what is wrong with a teacher that ranks the sentences at random, or worse than in its own run."""
        found, before = measured["spearman"], recorded.get("spearman")
        if found < WORSE:
            return f"has a rank correlation of {found:.3f} with the labels, by chance it is 0: is it trained?"
        if before is not None and found < before - WORSE:
            return (
                f"has a rank correlation of {found:.3f} with the labels, {before:.3f} in its own run: are the labels "
                "and the tokenizer those that it was trained with?"
            )
        return ""


class RegressionMeter(Meter):
    """The metrics of one pass: all numbers are kept, since ranks are of all of them; computed in float64."""

    def __init__(self, names: Callable[[bool], list[str]]) -> None:
        super().__init__()
        self.names = names
        self.student, self.teacher, self.targets = (CatMetric(nan_strategy="disable") for _ in range(3))

    def update(self, student: Output, batch: Batch, teacher: Output | None = None) -> None:
        """Add one batch: outputs (rows, 1), targets (rows,)."""
        self.student.update(student.logits.float().flatten())
        self.targets.update(batch.targets.float())
        if teacher is not None:
            self.teacher.update(teacher.logits.float().flatten())

    def compute(self, with_teacher: bool) -> dict[str, float]:
        """Compute the metrics by name; correlations −1 to 1, NaN where all numbers of one side are equal."""
        student, targets = _numbers(self.student), _numbers(self.targets)
        found = {
            "spearman": float(spearman_corrcoef(student, targets)),
            "pearson": float(pearson_corrcoef(student, targets)),
            "mse": float(mean_squared_error(student, targets)),
        }
        if with_teacher:
            found["similarity"] = float(pearson_corrcoef(student, _numbers(self.teacher)))
        return {name: found[name] for name in self.names(with_teacher)}


def _numbers(kept: CatMetric) -> Tensor:
    return kept.compute().double()
