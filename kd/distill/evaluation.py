"""Validation and test, student beside teacher: the half of the Distiller that measures."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from kd.distill.measure import NotFinite
from kd.distill.teacher import Teacher
from kd.errors import RunFailure
from kd.losses.base import Batch
from kd.parallel import group

STATISTICS = ("running_mean", "running_var")


class Evaluated(L.LightningModule):
    """A ``student`` that is measured by the metrics of ``task``, together with the ``teacher`` if there is one.

    Measured is in float32, whatever precision the steps have: the passes run without autocast, and logits of networks
    that are of another type are cast before anything is made of them. A teacher that the training changes (mutual
    learning, a moving average) is measured as it is at each validation, a frozen one once.
    """

    def __init__(self, student: nn.Module, teacher: Teacher | None, task: Any, num_classes: int) -> None:
        super().__init__()
        self.student, self.teacher, self.task, self.num_classes = student, teacher, task, num_classes
        self.history: dict[int, dict[str, float]] = {}  # epoch → validation metrics, survives a resume
        self.test_name = "test"
        self.tested: dict[str, Any] = {}  # of the last test pass: metrics and accuracy per class
        self.teacher_metrics: dict[str, dict[str, float]] = {}  # split → metrics
        self.teacher_tested: dict[str, Any] = {}
        self.predictions: dict[str, list[Tensor]] | None = None  # filled by test/validation when a list is put here
        self._teacher_logits: dict[tuple[str, int], Tensor] = {}
        self._teacher_sums: Tensor | None = None  # of its weights, as last seen
        self._teacher_changed = False

    @property
    def teacher_trained(self) -> bool:
        """Whether the training changes the teacher: its weights want gradients, or have changed since the start.

        A distiller that measures a teacher of its own may answer otherwise, and put its numbers into
        ``teacher_metrics`` and ``teacher_tested``.
        """
        return self._teacher_changed or (
            self.teacher is not None and any(p.requires_grad for p in self.teacher.parameters())
        )

    def watch_teacher(self) -> None:
        """Note whether the teacher's weights are others than at the last call. One synchronisation."""
        # of the buffers batch statistics alone: counters and caches change in a frozen network, too
        weights = [] if self.teacher is None else [p.detach() for p in self.teacher.parameters()]
        for module in self.teacher.modules() if self.teacher is not None else ():
            weights += [getattr(module, name) for name in STATISTICS if isinstance(getattr(module, name, None), Tensor)]
        if not weights:
            return
        sums = torch.stack([group.whole(t.abs().sum(dtype=torch.float64)) for t in weights]).cpu()
        before, self._teacher_sums = self._teacher_sums, sums
        if before is not None and len(before) != len(sums):  # parameters that are made when they are first needed
            return
        # a hair: sums over several processes need not be equal to the bit
        if before is not None and not torch.allclose(before, sums, rtol=1e-12, atol=0, equal_nan=True):
            self._teacher_changed = True

    def on_validation_epoch_start(self) -> None:
        """Fresh metrics for the pass, and one network on all processes."""
        group.same_buffers(self.student)
        self.watch_teacher()
        self._metrics = self.task.metrics(self.num_classes).to(self.device)
        self._teacher_metrics = self.task.metrics(self.num_classes).to(self.device)
        self._finite = [NotFinite().to(self.device) for _ in range(2)]  # of student and teacher

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Student and teacher on one validation batch."""
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Student and teacher on one test batch."""
        self._evaluate("test", batch, batch_idx)

    def _evaluate(self, split: str, batch: Batch, batch_idx: int) -> None:
        with _without_autocast(self.device):
            logits, teacher = self.student(batch.inputs).float(), None
            self._finite[0].update(logits, batch.index)
            if self.teacher is not None:
                teacher = self._answer_for(split, batch, batch_idx)
                self._finite[1].update(teacher, batch.index)
                if split == "test" or self.teacher_trained:  # val of a frozen one is measured before the first epoch
                    self._teacher_metrics.update(teacher, batch.targets)
            self._metrics.update(logits, batch.targets, teacher)
        if self.predictions is not None:
            for name, tensor in (("index", batch.index), ("target", batch.targets), ("logits", logits)):
                self.predictions.setdefault(name, []).append(tensor.cpu())

    def _answer_for(self, split: str, batch: Batch, batch_idx: int) -> Tensor:
        """The teacher's logits (rows, classes) of a batch: the split never changes, so a frozen one answers once."""
        assert self.teacher is not None
        if self.teacher_trained:
            return self.teacher(batch.inputs).rows.float()
        if (split, batch_idx) not in self._teacher_logits:
            self._teacher_logits[split, batch_idx] = self.teacher(batch.inputs).rows.float()
        return self._teacher_logits[split, batch_idx]

    def _check_finite(self, split: str, more: str = "") -> None:
        self._finite[0].check("the student", split, more)
        if self.teacher is not None:
            self._finite[1].check("the teacher", split, more)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/…`` once, and stop before a network that answers NaN reaches a checkpoint."""
        kept = getattr(self.trainer.checkpoint_callback, "best_model_path", "") or "none yet"
        more = f" after epoch {self.current_epoch + 1}; last good checkpoint: {kept}"
        self._check_finite("val", more)
        metrics = {f"val/{k}": v for k, v in self._metrics.compute(self.teacher is not None).items()}
        _check_metrics(metrics, more)
        self.log_dict(metrics)
        if self.trainer.state.fn == "fit":
            self.history[self.current_epoch] = metrics
            if self.teacher_trained:
                self.teacher_metrics["val"] = self._teacher_metrics.compute(False)

    def on_test_epoch_end(self) -> None:
        """Log the pass under ``test_name``, and keep it: two students of a run are tested, last and selected."""
        self._check_finite("test")
        metrics = self._metrics.compute(self.teacher is not None)
        _check_metrics({f"test/{name}": value for name, value in metrics.items()})
        self.log_dict({f"{self.test_name}/{name}": value for name, value in metrics.items()})
        self.tested = {"test": metrics, "test_per_class": self._metrics.accuracy_per_class()}
        if self.teacher is not None:
            per_class = self._teacher_metrics.accuracy_per_class()
            self.teacher_tested = {"test": self._teacher_metrics.compute(False), "test_per_class": per_class}


def _without_autocast(device: torch.device) -> Any:
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _check_metrics(metrics: dict[str, float], more: str = "") -> None:
    """Logits may be finite, and so large that a metric is not."""
    bad = next((name for name, value in metrics.items() if not math.isfinite(value)), None)
    if bad is not None:
        raise RunFailure(f"{bad} = {metrics[bad]} is not finite{more}")
