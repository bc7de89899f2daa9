"""Validation and test, student beside teacher: what the Distiller measures, and one pass outside of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric as StateMetric

from kd.data.base import as_batch, bad_inputs
from kd.distill.answers import Answers
from kd.errors import KdError, RunFailure
from kd.losses.base import Batch, Output
from kd.parallel import group
from kd.tasks.base import Task, Want

STATISTICS = ("running_mean", "running_var")
PART = 2**22  # numbers of a weight that are added up at a time: of a whole vocabulary the copies are much memory
KEPT = 2**26  # numbers of a frozen teacher's logits on validation and test that are kept for all epochs


def _absolute_sum(weight: Tensor) -> Tensor:
    """Σ |w| in float64, over all processes of a sharded weight."""
    if hasattr(weight, "full_tensor"):
        return group.whole(weight.abs().sum(dtype=torch.float64))
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for part in weight.reshape(-1).split(PART):  # a list of sums would lie between the copies, and keep their place
        total += part.abs().sum(dtype=torch.float64)
    return total


class NotFinite(StateMetric):
    """Counts the rows of a pass whose logits are not all finite and keeps the lowest index of them.

    Nothing is synchronised before ``compute``, which is over all processes.
    """

    full_state_update = False
    first: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("first", torch.tensor(torch.iinfo(torch.int64).max), dist_reduce_fx="min")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")
        self.seen = 0

    def update(self, logits: Tensor, index: Tensor | None) -> None:
        """Add logits (rows, classes) and the index (rows,) of their samples; else rows are counted as they come."""
        bad = ~logits.flatten(1).isfinite().all(1)
        if index is None or len(index) != len(bad):
            index = torch.arange(self.seen, self.seen + len(bad), device=bad.device)
        self.seen += len(bad)
        self.rows += bad.sum()
        self.first = torch.minimum(self.first, torch.where(bad, index, self.first).min())

    def compute(self) -> tuple[int, int]:
        """Return the number of such rows, and the lowest index among them."""
        return int(self.rows), int(self.first)

    def check(self, network: str, split: str) -> None:
        """``RunFailure`` that names network, split and row when there was one."""
        rows, first = self.compute()
        if rows:
            count = "is not finite for 1 row" if rows == 1 else f"is not finite for {rows} rows"
            raise RunFailure(f"the answer of {network} {count} of {split} (NaN or infinity; index {first})")


class EvaluationModule(L.LightningModule):
    """A ``student`` that is measured by the metrics of ``task``, together with the ``teacher`` if there is one.

    Measured is in float32, whatever precision the steps have: the passes run without autocast, and logits of networks
    that are of another type are cast before anything is made of them. A teacher that the training changes (mutual
    learning, a moving average) is measured as it is at each validation, a frozen one once.

    ``num_classes``: outputs of a row in the data; None: as many as the student has in its dry pass.
    """

    def __init__(self, student: nn.Module, teacher: Answers | None, task: Task, num_classes: int | None) -> None:
        super().__init__()
        self.student, self.teacher, self.task, self.num_classes = student, teacher, task, num_classes
        self.history: dict[int, dict[str, float]] = {}  # epoch → validation metrics, survives a resume
        self.test_name = "test"
        self.tested: dict[str, Any] = {}  # of the last test pass: metrics and accuracy per class
        self.teacher_metrics: dict[str, dict[str, float]] = {}  # split → metrics
        self.teacher_tested: dict[str, Any] = {}
        self.predictions: dict[str, list[Tensor]] | None = None  # filled by test/validation when a list is put here
        self.measures_teacher = teacher is not None and teacher.live and teacher.evaluated  # by the student's metrics
        self.comparable = self.measures_teacher  # whether the two networks' rows and logits mean the same
        self.average: nn.Module | None = None  # of :attr:`trained` over the steps; see kd.run.average
        self._deployed: list[nn.Module] = []  # in a list: its modules belong to the student and the terms
        self._teacher_outputs: dict[tuple[str, int], tuple[float, Tensor]] = {}  # checksum and logits of a batch
        self._kept = 0
        self._teacher_sums: Tensor | None = None  # of its weights, as last seen
        self._teacher_changed = False

    @property
    def deployed(self) -> nn.Module:
        """The network that is measured, saved and exported: the student, with the heads that terms leave on it.

        Where its average is kept, that.
        """
        return self.trained if self.average is None else self.average

    @property
    def trained(self) -> nn.Module:
        """The same network with the weights that the optimiser steps."""
        return self._deployed[0] if self._deployed else self.student

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
        sums = torch.stack([_absolute_sum(t) for t in weights]).cpu()
        before, self._teacher_sums = self._teacher_sums, sums
        if before is not None and len(before) != len(sums):  # parameters that are made when they are first needed
            return
        # a hair: sums over several processes need not be equal to the bit
        if before is not None and not torch.allclose(before, sums, rtol=1e-12, atol=0, equal_nan=True):
            self._teacher_changed = True
            if self.teacher is not None:
                self.teacher.use_given()

    def on_validation_epoch_start(self) -> None:
        """Fresh meters for the pass, and one network on all processes."""
        self.deployed.eval()  # its outermost module may not be one of the student's
        group.same_buffers(self.deployed)
        self.watch_teacher()
        self._meter = self.task.meter(self.num_classes).to(self.device)
        self._teacher_meter = self.task.meter(self.num_classes).to(self.device)
        self._finite = [NotFinite().to(self.device) for _ in range(2)]  # of student and teacher

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Student and teacher on one validation batch."""
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Student and teacher on one test batch."""
        self._evaluate("test", batch, batch_idx)

    def _evaluate(self, split: str, batch: Any, batch_idx: int) -> None:
        batch = self.task.rows(as_batch(batch))
        with _without_autocast(self.device):
            output, teacher = self.task.answer(self.deployed, batch.inputs, batch, Want()).to_float32(), None
            if output.has_logits:
                self._finite[0].update(output.logits, batch.index)
            again = self._measures_again(split)
            if self.comparable or again:
                answer = self._answer_for(split, batch, batch_idx)
                self._finite[1].update(answer.logits, batch.index)
                if again:
                    self._teacher_meter.update(answer, batch.of_teacher)
                teacher = answer if self.comparable else None
            self._meter.update(output, batch, teacher)
        if self.predictions is not None:
            _keep(self.predictions, batch, output)

    def _measures_again(self, split: str) -> bool:
        """Tell whether the teacher is measured in a pass: val of a frozen one is measured before the first epoch."""
        return self.measures_teacher and (split == "test" or self.teacher_trained)

    def _answer_for(self, split: str, batch: Batch, batch_idx: int) -> Output:
        """Return the teacher's output for a batch: a frozen one answers the same samples once, while that fits."""
        assert self.teacher is not None
        if self.teacher_trained:
            return self.teacher.measured(batch).to_float32()
        checksum, kept = _checksum(batch), self._teacher_outputs.get((split, batch_idx))
        if kept is not None and kept[0] == checksum:
            return Output(kept[1])
        output = self.teacher.measured(batch).to_float32()
        size = output.logits.numel()
        if kept is not None or self._kept + size <= KEPT:
            self._teacher_outputs[split, batch_idx] = (checksum, output.logits)
            self._kept += size if kept is None else 0
        return output

    def _check_finite(self, split: str, more: str = "") -> None:
        loader = self.trainer.test_dataloaders if split == "test" else self.trainer.val_dataloaders
        try:
            self._finite[0].check("the student", split)
            if self.comparable or self._measures_again(split):
                self._finite[1].check("the teacher", split)
        except RunFailure as error:
            raise RunFailure(f"{error}{bad_inputs(loader)}{more}") from None

    def on_validation_epoch_end(self) -> None:
        """Log ``val/…`` once, and stop before a network that answers NaN reaches a checkpoint."""
        kept = getattr(self.trainer.checkpoint_callback, "best_model_path", "") or "none yet"
        more = f" after epoch {self.current_epoch + 1}; last good checkpoint: {kept}"
        self._check_finite("val", more)
        metrics = {f"val/{k}": v for k, v in self._meter.compute(self.comparable).items()}
        _check_metrics(metrics, more)
        self.log_dict(metrics)
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.history[self.current_epoch] = metrics
            if self.measures_teacher and self.teacher_trained:
                self.teacher_metrics["val"] = self._teacher_meter.compute(False)

    def on_test_epoch_end(self) -> None:
        """Log the pass under ``test_name``, and keep it: two students of a run are tested, last and selected."""
        self._check_finite("test")
        metrics = self._meter.compute(self.comparable)
        _check_metrics({f"test/{name}": value for name, value in metrics.items()})
        self.log_dict({f"{self.test_name}/{name}": value for name, value in metrics.items()})
        self.tested = {"test": metrics, **_per_class(self._meter.per_class())}
        if self.measures_teacher:
            per_class = self._teacher_meter.per_class()
            self.teacher_tested = {"test": self._teacher_meter.compute(False), **_per_class(per_class)}


def _keep(kept: dict[str, list[Tensor]], batch: Batch, output: Output) -> None:
    """Append index, target and logits of a batch; samples of data without an index are counted as they come."""
    if batch.targets is None or (batch.index is None and group.world_size() > 1):
        lacking = "labels" if batch.targets is None else "an index, which several processes need"
        raise KdError(f"protocol.keep_predictions = true needs data with {lacking}: set it to false")
    before = sum(map(len, kept.get("index", ())))
    index = batch.index if batch.index is not None else torch.arange(before, before + len(batch))
    for name, tensor in (("index", index), ("target", batch.targets), ("logits", output.logits)):
        kept.setdefault(name, []).append(tensor.cpu())


def _checksum(batch: Batch) -> float:
    """Sum up the inputs of a batch, weighted by their places: other samples, or the same changed, have another one."""
    own = batch.of_teacher
    parts = list(own.inputs.values()) if isinstance(own.inputs, Mapping) else [own.inputs]
    flat = [t.flatten().float() for t in (*parts, own.targets) if isinstance(t, Tensor) and t.numel()]
    return float(torch.stack([t @ torch.linspace(1, 2, len(t), dtype=t.dtype, device=t.device) for t in flat]).sum())


def _per_class(values: list[float]) -> dict[str, list[float]]:
    return {"test_per_class": values} if values else {}


def _without_autocast(device: torch.device) -> Any:
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _check_metrics(metrics: dict[str, float], more: str = "") -> None:
    """Refuse metrics that are not finite: logits may be finite, and so large that a metric is not."""
    bad = next((name for name, value in metrics.items() if not math.isfinite(value)), None)
    if bad is not None:
        raise RunFailure(f"{bad} = {metrics[bad]} is not finite{more}")


@torch.no_grad()
def measure(
    task: Task,
    num_classes: int | None,
    network: Callable[[Batch], Output],
    loader: Iterable[Batch],
    device: torch.device,
    teacher: Callable[[Batch], Output] | None = None,
    keep: dict[str, list[Tensor]] | None = None,
    who: str = "the student",
    split: str = "the split",
) -> tuple[dict[str, float], list[float]]:
    """Compute the task's metrics of a network on a split, and its accuracy per class, outside of a trainer.

    ``network`` and ``teacher`` answer a batch on the device, which is measured in float32; ``keep`` collects index,
    target and logits. ``RunFailure`` when logits or a metric are not finite; it says ``who`` and on which ``split``.
    """
    meter = task.meter(num_classes).to(device)
    finite, finite_teacher = NotFinite().to(device), NotFinite().to(device)
    for batch in loader:
        batch = task.rows(as_batch(batch).to(device))
        output, beside = network(batch).to_float32(), None
        if output.has_logits:
            finite.update(output.logits, batch.index)
        if teacher is not None:
            beside = teacher(batch).to_float32()
            finite_teacher.update(beside.logits, batch.index)
        meter.update(output, batch, beside)
        if keep is not None:
            _keep(keep, batch, output)
    finite.check(who, split)
    if teacher is not None:
        finite_teacher.check("the teacher", split)
    metrics = meter.compute(teacher is not None)
    _check_metrics({f"{split}/{name}": value for name, value in metrics.items()}, f": {who}")
    return metrics, meter.per_class()
