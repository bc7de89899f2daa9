"""The Distiller: one LightningModule that holds student, teacher, objective and task."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd.distill.evaluation import Evaluated
from kd.distill.measure import measure
from kd.distill.objective import Objective
from kd.distill.step_buffer import StepBuffer, first_bad
from kd.distill.taps import Taps, resolve
from kd.distill.teacher import Teacher
from kd.errors import KdError, RunFailure
from kd.losses.base import Batch, Output
from kd.parallel import group

log = logging.getLogger(__name__)

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], Any]


class Distiller(Evaluated):
    """Trains ``student`` on the objective; ``teacher`` may be None (plain supervised training).

    Call :meth:`prepare` with one batch before the trainer sees the module: it runs both networks once, resolves the
    taps and lets the terms build their adapters. Methods that own the loop subclass this and are named by
    ``distiller._target_``.

    ``log_every``: steps between two readings of the loss buffer, each one synchronisation.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        objective: Objective,
        task: Any,
        num_classes: int,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        scheduler_interval: str = "epoch",
        seed: int = 0,
        log_every: int = 50,
    ) -> None:
        super().__init__(student, teacher, task, num_classes)
        if log_every < 1:
            raise ValueError(f"log_every = {log_every} is not allowed: it must be 1 or more")
        self.objective, self.seed, self.log_every = objective, seed, log_every
        self._make_optimizer, self._make_scheduler, self._interval = optimizer, scheduler, scheduler_interval
        self.epoch_means: dict[str, float] = {}  # of the last training epoch
        self.about: dict[str, Any] = {}  # what is recorded with the weights: model, data facts
        self.unreached: list[str] = []  # see find_unreached
        self.sharded = False  # whether each process holds a part of every parameter only
        # the dry pass wants them, to compare the classes; after it only the terms have a say
        self._teacher_logits_wanted = True
        objective.check_teacher(teacher is not None)

    # ------------------------------------------------------------------ before the first batch

    @torch.no_grad()
    def prepare(self, batch: Batch) -> None:
        """Run both networks and each term once on two rows of a batch; resolve taps, build adapters, compare classes.

        The random state and batch statistics are left as they were. Raises ``KdError`` for wrong taps and for
        shapes that do not fit.
        """
        few = self._two_rows(batch)
        terms = self.objective.items()
        for name, term in terms:
            try:
                term.student_taps = resolve(term.student_taps, self.student, "student")
                root = self.teacher.root if self.teacher else None
                term.teacher_taps = resolve(term.teacher_taps, root, "teacher") if root is not None else []
            except KdError as error:
                raise KdError(f"loss.{name}: {error}") from None
        self.student_taps = Taps(self.student, [str(n) for _, t in terms for n in t.student_taps or ()], "student")
        if self.teacher is not None:
            self.teacher.tap([str(n) for _, t in terms for n in t.teacher_taps or ()])
        training = self.student.training
        self.student.eval()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            teacher, student = self._dry(few)
            self._teacher_logits_wanted = any(t.needs_teacher and t.needs_logits for _, t in terms)
            if not self._teacher_logits_wanted:
                teacher.logits = None
            for name, term in terms:
                try:
                    term.prepare(student, teacher)
                    value = term.eval()(student, teacher, few)  # eval: adapters may have batch statistics
                except (ValueError, RuntimeError, TypeError, LookupError, AssertionError) as error:
                    raise KdError(f"loss.{name}: {str(error).splitlines()[0]}") from error
                if not isinstance(value, Tensor) or value.ndim:
                    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise KdError(f"loss.{name} returns {shape}: a term must return a scalar tensor")
            self.objective.train()
        self.student.train(training)

    def find_unreached(self, batch: Batch) -> None:
        """Note the trainable parameters that no term reaches, in one backward pass on two rows: DDP must know."""
        few = self._two_rows(batch)
        training = self.student.training
        self.student.eval()
        self.objective.eval()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            teacher, student = self.answer_both(few)
            _, total = self.objective(student, teacher, few)
            if total.requires_grad:
                total.backward()
        self.student.train(training)
        self.objective.train()
        self.unreached = [n for n, p in self.named_parameters() if p.requires_grad and p.grad is None]
        self.zero_grad(set_to_none=True)

    def _two_rows(self, batch: Batch) -> Batch:
        return Batch(*(None if t is None else t[:2].to(self.device) for t in batch))  # type: ignore[arg-type]

    def _dry(self, batch: Batch) -> tuple[Output, Output]:
        try:
            teacher, student = self.answer_both(batch)
            again = self.student_taps.inspect()
            if self.teacher is not None:
                again |= self.teacher.taps.inspect()
            if again:
                teacher, student = self.answer_both(batch)
                self.student_taps.inspect()
                if self.teacher is not None:
                    self.teacher.taps.inspect()
        except (RuntimeError, AssertionError) as error:
            shape = tuple(batch.inputs.shape[1:])
            raise KdError(f"a network cannot take inputs of shape {shape}: {str(error).splitlines()[0]}") from None
        for name, output in (("student", student), ("teacher", teacher)):
            classes = None if output.logits is None else output.logits.shape[-1]
            if classes is not None and classes != self.num_classes:
                raise KdError(f"the {name} answers {classes} classes, the data has {self.num_classes}")
        return teacher, student

    def configure_model(self) -> None:
        """Of a strategy that shards (FSDP): student, teacher and adapters, each over all processes."""
        if self._device_mesh is None or self.sharded:
            return
        self.sharded = True
        self.strict_loading = False  # the strategy reads a checkpoint before the teacher is put back
        self.run_whole_teacher()  # a network that is left half-way would not be sharded again
        teachers = list(self.teacher.networks) if self.teacher is not None else []
        terms = [term for _, term in self.objective.items() if any(True for _ in term.parameters())]
        group.shard([self.student, *teachers, *terms], self._device_mesh["data_parallel"])

    def run_whole_teacher(self) -> None:
        """Do not leave the teacher behind its last tap, whatever the terms need."""
        self._teacher_logits_wanted = True

    # ------------------------------------------------------------------ the forward passes

    def answer_both(self, batch: Batch) -> tuple[Output, Output]:
        """Teacher's and student's outputs with taps. The teacher runs first: the other order costs memory traffic."""
        teacher = self._answer_of_teacher(batch)
        self.student_taps.active = bool(self.student_taps.names)
        logits = self.student(batch.inputs)
        features = self.student_taps.take() if self.student_taps.active else {}
        self.student_taps.active = False
        return teacher, Output(logits, features)

    def _answer_of_teacher(self, batch: Batch) -> Output:
        """Its own view of the batch if it has one, a remembered answer if there is one, nothing if no term reads it."""
        if self.teacher is None or not (self._teacher_logits_wanted or self.teacher.taps.names):
            return Output()
        if self.teacher.remembered is not None:
            return self.teacher.recall(batch.index)
        inputs = batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs
        return self.teacher(inputs, features=True, logits=self._teacher_logits_wanted)

    def forward(self, inputs: Tensor) -> Tensor:
        """The student's logits (rows, classes)."""
        return self.student(inputs)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step: named terms, their weighted sum, counts into the buffer."""
        teacher, student = self.answer_both(batch)
        epoch = self.current_epoch + batch_idx / max(1, self.trainer.num_training_batches)
        correct, labelled = self.task.count(student.rows, batch.targets)
        shares = group.shares(len(batch.targets), labelled)
        values, total = self.objective(student, teacher, batch, epoch, self.trainer.max_epochs or 1, shares)
        loss = total if shares is None else total / shares.rows  # the buffer weights it with the rows again
        self._buffer.add([loss, *values, *correct, labelled], rows=len(batch.targets))
        last = batch_idx + 1 == self.trainer.num_training_batches
        if last or self._buffer.full:
            self._read_buffer(batch_idx)
        if last:
            self._close_epoch()
        return total

    # ------------------------------------------------------------------ bookkeeping of an epoch

    def on_fit_start(self) -> None:
        """Measure the teacher with the student's metrics, once, and say so before the first epoch."""
        names, few = ["loss", *self.objective.names], self.objective.needs("labels")
        self._buffer = StepBuffer(names, self.log_every, self.device, over_labelled=few, counts=self.task.counts)
        self.watch_teacher()
        if self.teacher is not None and "val" not in self.teacher_metrics:
            teacher, loader = self.teacher, self.trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
            dtype = next(self.student.parameters()).dtype  # of a precision like bf16-true, as in the steps
            found, _ = measure(
                *(self.task, self.num_classes, lambda x: teacher(x.to(dtype)).rows, loader, self.device),
                whose="the teacher",
                split="val",
            )
            self.teacher_metrics["val"] = found  # of one that is trained along, each validation's take its place
            said = ", ".join(f"val/{k} {v:.4f}" for k, v in found.items())
            log.info("teacher%s: %s", ", before it is trained along" if self.teacher_trained else "", said)
            recorded = teacher.sources[0].get("val", {}) if len(teacher.sources) == 1 else {}
            if (doubt := getattr(self.task, "doubt", None)) and (words := doubt(found, recorded, self.num_classes)):
                log.warning("the teacher %s", words)
        if self.teacher is not None and self.teacher.cache and self._teacher_logits_wanted:
            loader = self.trainer.datamodule.answering_dataloader()  # type: ignore[attr-defined]
            with self.trainer.precision_plugin.forward_context():  # as in the training step
                self.teacher.remember(loader, self.device)

    def on_train_epoch_start(self) -> None:
        """Seed by epoch, so that a resumed run draws what the uninterrupted one would have drawn."""
        seed = (self.seed * 1_000_003 + self.current_epoch * 9_176 + self.global_rank) % 2**32
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def _read_buffer(self, batch_idx: int) -> None:
        window = self._buffer.read()
        bad = first_bad(window)
        if bad is not None:
            self._stop_on(bad, batch_idx, len(window))
        means = self._train_means(*self._buffer.last)  # over all processes
        epoch = self.current_epoch + (batch_idx + 1) / max(1, self.trainer.num_training_batches)
        for name in self.objective.schedules:
            means[f"weight/{name}"] = self.objective.weight(name, epoch, self.trainer.max_epochs or 1)
        means["lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        for logger in self.loggers:
            logger.log_metrics({"epoch": self.current_epoch, **means}, step=self.global_step)

    def _stop_on(self, bad: tuple[int, list[int]], batch_idx: int, steps: int) -> None:
        row, columns = bad
        names = [self._buffer.names[c] for c in columns]
        terms = [n for n in names if n in self.objective.names] or names[:1]
        checkpoint = getattr(self.trainer.checkpoint_callback, "best_model_path", "") or "none yet"
        raise RunFailure(
            f"the loss is not finite: term {', '.join(terms)} at step {batch_idx - steps + 2 + row} of epoch "
            f"{self.current_epoch + 1} (a lower recipe.optimizer.lr or recipe.gradient_clip may help); "
            f"last good checkpoint: {checkpoint}"
        )

    def _train_means(self, sums: Tensor, rows: int) -> dict[str, float]:
        if self.trainer.world_size > 1:
            packed = torch.cat([sums, torch.tensor([float(rows)], dtype=torch.float64)]).to(self.device)
            packed = self.trainer.strategy.reduce(packed, reduce_op="sum").cpu()
            sums, rows = packed[:-1], int(packed[-1])
        return {f"train/{name}": value for name, value in self._buffer.means(sums, rows).items()}

    def _close_epoch(self) -> None:
        """The epoch's exact means; before the validation, so that the epoch's line has both."""
        self.epoch_means = self._train_means(*self._buffer.take_epoch())

    # ------------------------------------------------------------------ optimiser and checkpoints

    def trainable(self) -> list[nn.Parameter]:
        """What the optimiser gets: the student's and the adapters' parameters, never the teacher's."""
        return [p for m in (self.student, self.objective) for p in m.parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        """The recipe's optimiser and schedule."""
        optimizer = self._make_optimizer(self.trainable())
        if self._make_scheduler is None:
            return optimizer
        scheduler = self._make_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self._interval}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave a frozen teacher out: it is not trained, and half as large again. One that is trained along is kept."""
        if not self.teacher_trained:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in state.items() if not k.startswith("teacher.")}
        checkpoint["kd"] = {"history": self.history, "epoch_means": self.epoch_means, "about": self.about}
        checkpoint["kd"]["teacher_trained"] = self.teacher_trained

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put a teacher that was left out back, so that loading stays strict. ``KdError`` when the data is another."""
        self._refuse_other_data(checkpoint["kd"]["about"].get("data", {}))
        self._teacher_changed = checkpoint["kd"].get("teacher_trained", False)
        if not self.sharded and not self._teacher_changed:
            own = self.state_dict()
            checkpoint["state_dict"].update({k: v for k, v in own.items() if k.startswith("teacher.")})
        self.history, self.epoch_means = (dict(checkpoint["kd"][name]) for name in ("history", "epoch_means"))

    def _refuse_other_data(self, before: Mapping[str, Any]) -> None:
        now = self.about.get("data", {})
        for key, what in {"content": "the images are others", "split": "they are split otherwise"}.items():
            if before.get(key) is not None and before[key] != now.get(key):
                raise KdError(
                    f"the data is not what it was when the run began: {what} (data.{key} {before[key]} then, "
                    f"{now.get(key)} now). Put it back, or start a run of its own; an older kd "
                    "divided folders otherwise"
                )
