"""The Distiller: one LightningModule that holds student, teacher, objective and task."""

from __future__ import annotations

import functools
import logging
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd.data.base import as_batch, bad_inputs
from kd.distill.answers import Answers
from kd.distill.evaluation import measure
from kd.distill.objective import Objective
from kd.distill.optimisation import (
    EVERY_PEER,
    MakeGroups,
    MakeOptimizer,
    MakeScheduler,
    OwnRecipe,
    WarmUp,
    check_factory,
)
from kd.distill.preparation import PreparationModule
from kd.distill.step_buffer import StepBuffer, first_bad
from kd.distill.teacher import Teacher
from kd.errors import KdError, RunFailure
from kd.losses.base import Batch, Output
from kd.parallel import group
from kd.tasks.base import Task, Want
from kd.tasks.classification import Classification

log = logging.getLogger(__name__)

DEFAULT_OPTIMIZER: MakeOptimizer = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.01)


@dataclass
class Step:
    """What one step came to: ``total`` (0-d, of this process) is what gradients go through.

    ``values``: named scalars to log, not weighted; ``over``: what the mean of each is over (default: rows);
    ``rows``, ``labelled`` (0-d): how many; ``counts``: sums over the labelled rows, in the order of ``task.counts``.
    """

    total: Tensor
    values: dict[str, Tensor]
    rows: int
    labelled: Tensor
    counts: Sequence[Tensor] = ()
    over: Mapping[str, str] = field(default_factory=dict)

    def averaged(self) -> int:
        """Count what the total is a mean over: the labelled rows where all terms are, else the rows."""
        return int(self.labelled) if set(self.over.values()) == {"labelled"} else self.rows

    def beside(self, other: Step, name: str) -> Step:
        """Return this step with another one on the same batch: the totals added, the other's values as ``name/…``."""
        values = self.values | {f"{name}/{key}": value for key, value in other.values.items()}
        over = {**self.over, **{f"{name}/{key}": kind for key, kind in other.over.items()}}
        return replace(self, total=self.total + other.total, values=values, over=over)


class Distiller(PreparationModule):
    """Trains ``student`` on the objective; ``teacher`` may be None (plain supervised training).

    Works in a plain ``lightning.Trainer`` with any loaders, whose batches become :class:`~kd.losses.base.Batch` by
    :func:`kd.data.base.as_batch`::

        module = Distiller(student, teacher, Objective({"ce": CrossEntropy(), "kd": KnowledgeDistillation(4.0)}))
        lightning.Trainer(max_epochs=10).fit(module, train_loader, val_loader)

    ``teacher``: an :class:`~kd.distill.answers.Answers`, or a network, which is frozen. ``task``: None is image
    classification. ``num_classes``: None is as many as the student answers. ``optimizer``: called with the parameters;
    None is AdamW, learning rate 1e-3, weight decay 0.01. ``scheduler``: called with the optimiser, every
    ``scheduler_interval``, "epoch" or "step"; None is a constant rate. ``seed``: every epoch draws anew
    from it, so that a resumed run draws the same; None: that of ``lightning.seed_everything``, else 0.

    :meth:`prepare` runs both networks once, resolves the taps and lets the terms build their adapters. The trainer's
    own training loader is used for it where it was not called before. Methods that own the loop subclass this and are
    named by ``distiller._target_``; they differ in up to three places, :meth:`compose` (what a batch becomes),
    :meth:`losses` (what is computed of it) and :meth:`networks` (what is trained), and inherit the rest.

    ``log_every``: steps between two readings of the loss buffer, each one synchronisation. ``peers``: further networks
    of the set-up by name, trained along with the student. ``gradient_clip``, ``accumulate``: of the recipe, where this
    module steps its optimisers itself (Lightning does it otherwise).

    ``warmup``, ``groups``, ``own_recipes``: a rise of the rate, parameter groups, and other optimisers for networks of
    ``own_optimizers``; see :mod:`kd.distill.optimisation`.

    ``supplies_teacher``: whether a subclass makes its own teacher, so that terms which need one are satisfied.
    ``peers_answer``: whether the peers answer as the student does, so that they are measured at the end as well.
    ``composes_own_text``: whether what :meth:`compose` changes is marked by ``extra["own_text"]``, so that answers on
    the disk are read for the other batches.
    """

    supplies_teacher = False
    peers_answer = False
    composes_own_text = False

    def __init__(
        self,
        student: nn.Module,
        teacher: Answers | nn.Module | None,
        objective: Objective,
        task: Task | None = None,
        num_classes: int | None = None,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = None,
        scheduler_interval: str = "epoch",
        seed: int | None = None,
        log_every: int = 50,
        peers: Mapping[str, nn.Module] | None = None,
        gradient_clip: float | None = None,
        accumulate: int = 1,
        warmup: WarmUp | None = None,
        groups: MakeGroups | None = None,
        own_recipes: Mapping[str, OwnRecipe] | None = None,
    ) -> None:
        task = task if task is not None else Classification()
        if teacher is not None and not isinstance(teacher, Answers):
            teacher = Teacher([teacher], task=task)
        super().__init__(student, teacher, task, num_classes)
        check_factory("optimizer", optimizer)
        check_factory("scheduler", scheduler)
        if log_every < 1:
            raise ValueError(f"log_every = {log_every} is not allowed: it must be 1 or more")
        self.objective, self.log_every = objective, log_every
        self.seed = seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.peers = nn.ModuleDict(dict(peers or {}))
        self._make_optimizer, self._make_scheduler = optimizer or DEFAULT_OPTIMIZER, scheduler
        self._interval = scheduler_interval
        self.epoch_means: dict[str, float] = {}  # of the last training epoch
        self.speed: dict[str, float] = {}  # of the last training epoch: rows a second, where the task names its rows
        self._began: float | None = None  # the epoch, by the clock
        self.step_means: dict[str, float] = {}  # of the steps between the last two readings of the buffer
        self.about: dict[str, Any] = {}  # what is recorded with the weights: model, data facts
        self.unreached: list[str] = []  # see find_unreached
        self.prepared = False  # whether the taps are resolved and the adapters built
        self.sharded = False  # whether each process holds a part of every parameter only
        self.heads: list[str] = []  # the terms that leave something of theirs on the student
        self._buffer: StepBuffer | None = None
        self._earlier: tuple[Tensor, int] | None = None  # sums of this epoch from before a run was resumed
        self._reseed = False  # before the next step: a validation by steps was between it and the last one
        self.epoch_trained = -1  # the epoch of the last batch
        self._counts = False  # whether the student has logits to count right answers in
        # the dry pass wants the teacher's, to compare the classes; after it only the terms have a say
        self._want = Want(logits=True, features=True)
        self.gradient_clip, self.accumulate = gradient_clip, accumulate
        self.warmup, self.make_groups, self.own_recipes = warmup, groups, own_recipes or {}
        if EVERY_PEER in self.own_optimizers:
            self.own_optimizers = tuple(self.peers)
        self.automatic_optimization = not self.own_optimizers
        objective.check_teacher(teacher is not None or self.supplies_teacher)

    # ------------------------------------------------------------------ where a set-up differs

    def compose(self, batch: Batch) -> Batch:
        """Change a training batch before the networks see it: views, generated samples, noise. Nothing by default."""
        return batch

    @property
    def composes(self) -> bool:
        """Whether a set-up of its own changes batches: :meth:`compose` is not this class's."""
        return type(self).compose is not Distiller.compose

    def losses(self, batch: Batch) -> Step:
        """Compute one step on a batch that has been through :meth:`compose` and ``task.rows``."""
        teacher, student = self.answer_both(batch)
        return self.score(student, teacher, batch)

    def score(self, student: Output, teacher: Output, batch: Batch) -> Step:
        """Compute the objective of two outputs on a batch, as one step. Each of several networks has its own."""
        labelled = self.task.labelled(batch)
        rows = len(batch.targets) if batch.targets is not None else len(batch)
        shares = group.shares(rows, labelled, len(batch), batch.mask)
        values, total = self.objective(student, teacher, batch, *self.place(), shares)
        named = dict(zip(self.objective.names, values, strict=True))
        counts = self.task.count(student, batch) if self._counts else ()
        own = 1.0 if shares is None else shares.rows.clamp(min=1e-12)  # a process may have no row
        loss = total.detach() / own  # the buffer weights it with the rows
        over = {name: term.over for name, term in self.objective.items()}
        return Step(total, {"loss": loss, **named}, rows, labelled, counts, over)

    def networks(self) -> dict[str, nn.Module]:
        """Return what is trained, by name: the student, the terms' adapters, and the peers of a set-up."""
        return {"student": self.student, "objective": self.objective, **dict(self.peers.items())}

    # ------------------------------------------------------------------ a step

    def check_data(self, data: Any) -> None:
        """Refuse a data module that the set-up cannot work on, before the first batch; this one takes any."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute one step: named terms, their weighted sum, counts into the buffer."""
        batch = self.task.rows(self.compose(as_batch(batch)))
        self._inputs_of(batch, self._want.input_gradient)
        step = self.losses(batch)
        self.track(step, batch_idx)
        total = step.total if self.batches_a_step == 1 else self.weigh(step.total, step.averaged(), batch_idx)
        if not self.automatic_optimization:
            self.descend(total, batch_idx)
        return total

    # ------------------------------------------------------------------ bookkeeping of an epoch

    def on_fit_start(self) -> None:
        """Measure the teacher with the student's metrics, once, and say so before the first epoch."""
        self._buffer = None
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.student.parameters())
        if self.teacher is not None and (half or self.teacher_trained):  # half: folded weights are rounded once more
            self.teacher.use_given()
        self.watch_teacher()
        if self.teacher is None:
            return
        if self.measures_teacher and "val" not in self.teacher_metrics:
            self._measure_teacher()
        if self._want.logits:
            with self.trainer.precision_plugin.forward_context():  # as in the training step
                self.teacher.begin(self._training_set(), self.device)

    def on_fit_end(self) -> None:
        """Leave the weights as they came: other libraries save them only row by row."""
        self.use_given()

    def _training_set(self) -> Iterator[Batch]:
        """Yield the training set once, in order, read when the first batch is asked for."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "answering_dataloader"):
            raise KdError(
                "a teacher with cache = True answers the whole training set before the first epoch: its data must be a "
                "kd.data.base.AdaptedData or a data module of kd (trainer.fit(module, datamodule=data))"
            )
        yield from data.answering_dataloader()

    def _measure_teacher(self) -> None:
        assert self.teacher is not None
        teacher, loader = self.teacher, self._val_batches()
        if loader is None:
            return
        dtype = next((p.dtype for p in self.student.parameters()), torch.float32)  # bf16-true: as in the steps
        own = (as_batch(batch).of_teacher for batch in loader)
        try:
            found, _ = measure(
                *(self.task, self.num_classes, lambda batch: teacher.measured(batch.cast(dtype)), own, self.device),
                who="the teacher",
                split="val",
            )
        except RunFailure as error:
            raise RunFailure(f"{error}{bad_inputs(loader)}") from None
        self.teacher_metrics["val"] = found  # of one that is trained along, each validation's take its place
        numbers = ", ".join(f"val/{k} {v:.4f}" for k, v in found.items())
        if found:
            log.info("teacher%s: %s", ", before it is trained along" if self.teacher_trained else "", numbers)
        recorded = teacher.sources[0].get("val", {}) if len(teacher.sources) == 1 else {}
        classes = self.num_classes if self.comparable else None  # of the student's tokenizer
        if words := self.task.doubt(found, recorded, classes):
            log.warning("the teacher %s", words)

    def _val_batches(self) -> Iterable[Batch] | None:
        if not self.trainer.enable_validation:
            return None
        self.trainer.fit_loop.epoch_loop.val_loop.setup_data()
        loaders = self.trainer.val_dataloaders
        return loaders[0] if isinstance(loaders, (list, tuple)) and len(loaders) == 1 else loaders

    def on_train_start(self) -> None:
        """Go on with the warm-up, and with an epoch that a checkpoint has cut in two."""
        super().on_train_start()
        if self.trainer.fit_loop.restarted_mid_epoch:
            self._seed()  # what the loader has drawn at the beginning of the epoch
            self._reseed = True

    def on_train_epoch_start(self) -> None:
        """Seed by epoch, so that a resumed run draws what the uninterrupted one would have drawn."""
        self._seed()
        self._reseed = False
        self._began = time.perf_counter()

    def on_validation_end(self) -> None:
        """After a checkpoint within an epoch a resumed run must draw what this one draws: seed anew."""
        trainer = self.trainer
        self._reseed = (
            trainer.state.fn == "fit" and trainer.check_val_every_n_epoch is None and not trainer.is_last_batch
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed by step behind a validation within the epoch."""
        if self._reseed:
            self._seed(self.steps_done)
            self._reseed = False

    def _seed(self, step: int = 0) -> None:
        seed = (self.seed * 1_000_003 + self.current_epoch * 9_176 + step * 7_368_787 + self.global_rank) % 2**32
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def track(self, step: Step, batch_idx: int) -> None:
        """Put a step into the buffer; read it when it is full, and close the epoch at its last batch."""
        if self._buffer is None:
            names = self.task.counts if step.counts else ()
            labelled = [name for name, over in step.over.items() if over == "labelled"]
            self._buffer = StepBuffer(list(step.values), self.log_every, self.device, labelled, names)
            if self._earlier is not None:
                self._buffer.sums, self._buffer.row_total = self._earlier
                self._earlier = None
        self._buffer.add([*step.values.values(), *step.counts, step.labelled], rows=step.rows)
        self.epoch_trained = self.current_epoch
        last = self.closes_epoch(batch_idx)
        if last or self._buffer.full or self.validates_next():
            self._read_buffer(self._buffer, batch_idx)
        if last:  # before the validation, so that the epoch's line has both
            self.close_epoch()

    def close_epoch(self) -> None:
        """Make the epoch's means of all steps that were read; once more it does nothing. All processes call it."""
        if self._buffer is not None and self._buffer.filled:  # a callback has ended the run within the epoch
            self._read_buffer(self._buffer, self.trainer.fit_loop.batch_idx)
        if self._buffer is not None and self._buffer.row_total:
            rows = self._buffer.row_total * self.trainer.world_size  # the processes have as many, to a few
            self.epoch_means = self._train_means(self._buffer, *self._buffer.take_epoch())
            self._log_speed(rows)

    def _log_speed(self, rows: int) -> None:
        """Log how many tokens a second an epoch went through: its rows, the supervised ones."""
        if self.task.unit and self._began is not None:
            self.speed = {f"train/{self.task.unit}_per_second": rows / (time.perf_counter() - self._began)}
            for logger in self.loggers:
                logger.log_metrics({"epoch": self.current_epoch, **self.speed}, step=self.steps_done)

    def on_train_epoch_end(self) -> None:
        """Give the epoch's means to Lightning's callbacks; the loggers have them step by step."""
        self.close_epoch()
        self.log_dict(self.epoch_means, logger=False)

    def _read_buffer(self, buffer: StepBuffer, batch_idx: int) -> None:
        window = buffer.read()
        bad = first_bad(window)
        if bad is not None:
            self._stop_on(buffer, bad, batch_idx, len(window))
        self.step_means = self._train_means(buffer, *buffer.last)  # over all processes
        means = dict(self.step_means)
        for name in self.objective.schedules:
            means[f"weight/{name}"] = self.objective.weight(name, *self.place(batch_idx + 1))
        means |= self.rates()
        for logger in self.loggers:
            logger.log_metrics({"epoch": self.current_epoch, **means}, step=self.steps_done)

    def _stop_on(self, buffer: StepBuffer, bad: tuple[int, list[int]], batch_idx: int, steps: int) -> None:
        row, columns = bad
        names = [buffer.names[c] for c in columns]
        terms = [n for n in names if n != "loss"] or names[:1]
        checkpoint = getattr(self.trainer.checkpoint_callback, "best_model_path", "") or "none yet"
        advice = " (a lower recipe.optimizer.lr or recipe.gradient_clip may help)"
        raise RunFailure(
            f"the loss is not finite: term {', '.join(terms)} at batch {batch_idx - steps + 2 + row} of epoch "
            f"{self.current_epoch + 1}{bad_inputs(self.trainer.train_dataloader) or advice}; "
            f"last good checkpoint: {checkpoint}"
        )

    def _train_means(self, buffer: StepBuffer, sums: Tensor, rows: int) -> dict[str, float]:
        return {f"train/{name}": value for name, value in buffer.means(*self._over_all(sums, rows)).items()}

    def _over_all(self, sums: Tensor, rows: int) -> tuple[Tensor, int]:
        """Add up the sums of all processes."""
        if self.trainer.world_size == 1:
            return sums, rows
        packed = torch.cat([sums, torch.tensor([float(rows)], dtype=torch.float64)]).to(self.device)
        packed = self.trainer.strategy.reduce(packed, reduce_op="sum").cpu()
        return packed[:-1], int(packed[-1])

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave a frozen teacher out: it is not trained, and half as large again. One that is trained along is kept."""
        if not self.teacher_trained:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in state.items() if not k.startswith("teacher.")}
        checkpoint["kd"] = {"history": self.history, "epoch_means": self.epoch_means, "about": self.about}
        checkpoint["kd"] |= {"teacher_trained": self.teacher_trained, "epoch_trained": self.epoch_trained}
        if self.heads:
            checkpoint["kd"]["deployed"] = self._deployed_keys()
        if self._buffer is not None and self._buffer.row_total:  # in the middle of an epoch
            sums, rows = self._over_all(self._buffer.sums.clone(), self._buffer.row_total)
            checkpoint["kd"]["sums"] = {"sums": sums, "rows": rows}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put a teacher that was left out back, so that loading stays strict. ``KdError`` when the data is another."""
        self._refuse_other_data(checkpoint["kd"]["about"].get("data", {}))
        self._teacher_changed = checkpoint["kd"].get("teacher_trained", False)
        if not self.sharded and not self._teacher_changed:
            own = self.state_dict()
            checkpoint["state_dict"].update({k: v for k, v in own.items() if k.startswith("teacher.")})
        self.epoch_trained = checkpoint["kd"]["epoch_trained"]
        if (kept := checkpoint["kd"].get("sums")) is not None and self.global_rank == 0:  # those of all processes
            self._earlier = (kept["sums"], kept["rows"])
        self.history, self.epoch_means = (dict(checkpoint["kd"][name]) for name in ("history", "epoch_means"))

    def _refuse_other_data(self, before: Mapping[str, Any]) -> None:
        now = self.about.get("data", {})
        for key, what in {"content": "the samples are others", "split": "they are split otherwise"}.items():
            if before.get(key) is not None and before[key] != now.get(key):
                raise KdError(
                    f"the data is not what it was when the run began: {what} (data.{key} {before[key]} then, "
                    f"{now.get(key)} now). Put it back, or start a run of its own; an older kd "
                    "divided folders otherwise"
                )
