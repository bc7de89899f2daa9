"""The half of the :class:`~kd.distiller.Distiller` that measures: validation and test, student beside teacher."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from torch import Tensor, nn

from kd import distributed
from kd.errors import KdError
from kd.losses.base import Batch
from kd.teacher import Teacher


class Evaluated(L.LightningModule):
    """A ``student`` that is measured by the metrics of ``task``, together with the ``teacher`` if there is one."""

    def __init__(self, student: nn.Module, teacher: Teacher | None, task: Any, num_classes: int) -> None:
        super().__init__()
        self.student, self.teacher, self.task, self.num_classes = student, teacher, task, num_classes
        self.history: dict[int, dict[str, float]] = {}  # epoch → validation metrics, survives a resume
        self.test_name = "test"
        self.tested: dict[str, Any] = {}  # of the last test pass: metrics and accuracy per class
        self.teacher_tested: dict[str, Any] = {}
        self.predictions: dict[str, list[Tensor]] | None = None  # filled by test/validation when a list is put here
        self._teacher_logits: dict[tuple[str, int], Tensor] = {}

    def on_validation_epoch_start(self) -> None:
        """Fresh metrics for the pass, and one network on all processes."""
        distributed.same_buffers(self.student)
        self._metrics = self.task.metrics(self.num_classes).to(self.device)
        self._teacher_metrics = self.task.metrics(self.num_classes).to(self.device)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Student and teacher on one validation batch."""
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Student and teacher on one test batch."""
        self._evaluate("test", batch, batch_idx)

    def _evaluate(self, split: str, batch: Batch, batch_idx: int) -> None:
        logits = self.student(batch.inputs)
        teacher = None
        if self.teacher is not None:  # the split never changes: its teacher's logits are computed once
            if (split, batch_idx) not in self._teacher_logits:
                self._teacher_logits[split, batch_idx] = self.teacher(batch.inputs).rows
            teacher = self._teacher_logits[split, batch_idx]
            if split == "test":  # val is measured before the first epoch
                self._teacher_metrics.update(teacher, batch.targets)
        self._metrics.update(logits, batch.targets, teacher)
        if self.predictions is not None:
            for name, tensor in (("index", batch.index), ("target", batch.targets), ("logits", logits)):
                self.predictions.setdefault(name, []).append(tensor.cpu())

    def on_validation_epoch_end(self) -> None:
        """Log ``val/…`` once, and stop before a network that answers NaN reaches a checkpoint."""
        metrics = {f"val/{k}": v for k, v in self._metrics.compute(self.teacher is not None).items()}
        if not math.isfinite(metrics["val/nll"]):
            raise KdError(
                f"the student's answers are not finite after epoch {self.current_epoch + 1} (val/nll = "
                f"{metrics['val/nll']}); last good checkpoint: "
                f"{getattr(self.trainer.checkpoint_callback, 'best_model_path', '') or 'none yet'}"
            )
        self.log_dict(metrics)
        if self.trainer.state.fn == "fit":
            self.history[self.current_epoch] = metrics

    def on_test_epoch_end(self) -> None:
        """Log the pass under ``test_name``, and keep it: two students of a run are tested, last and selected."""
        metrics = self._metrics.compute(self.teacher is not None)
        self.log_dict({f"{self.test_name}/{name}": value for name, value in metrics.items()})
        self.tested = {"test": metrics, "test_per_class": self._metrics.accuracy_per_class()}
        if self.teacher is not None:
            per_class = self._teacher_metrics.accuracy_per_class()
            self.teacher_tested = {"test": self._teacher_metrics.compute(False), "test_per_class": per_class}
