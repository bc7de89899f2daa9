"""The Distiller: one LightningModule that holds student, teacher, objective and task."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd.data.base import as_batch, refuse_unsharded
from kd.distill.answers import Answers
from kd.distill.evaluation import measure
from kd.distill.objective import Objective
from kd.distill.optimisation import MakeGroups, MakeOptimizer, MakeScheduler, Optimised, OwnRecipe, WarmUp
from kd.distill.step_buffer import StepBuffer, first_bad
from kd.distill.taps import Taps, resolve, unfuse
from kd.distill.teacher import Teacher
from kd.errors import KdError, RunFailure
from kd.losses.base import Batch, Output, Setup, Term
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

    def beside(self, other: Step, name: str) -> Step:
        """This step with another one on the same batch: the totals added, the other's values as ``name/…``."""
        values = self.values | {f"{name}/{key}": value for key, value in other.values.items()}
        over = {**self.over, **{f"{name}/{key}": kind for key, kind in other.over.items()}}
        return replace(self, total=self.total + other.total, values=values, over=over)


class Distiller(Optimised):
    """Trains ``student`` on the objective; ``teacher`` may be None (plain supervised training).

    Works in a plain ``lightning.Trainer`` with any loaders, whose batches become :class:`~kd.losses.base.Batch` by
    :func:`kd.data.base.as_batch`::

        module = Distiller(student, teacher, Objective({"ce": CrossEntropy(), "kd": KnowledgeDistillation(4.0)}))
        lightning.Trainer(max_epochs=10).fit(module, train_loader, val_loader)

    ``teacher``: an :class:`~kd.distill.answers.Answers`, or a network, which is frozen. ``task``: None is image
    classification. ``num_classes``: None is as many as the student answers. ``optimizer``: called with the parameters;
    None is AdamW, learning rate 1e-3, weight decay 0.01. ``scheduler``: called with the optimiser; None is a constant
    rate.

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
    """

    supplies_teacher = False

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
        seed: int = 0,
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
        if log_every < 1:
            raise ValueError(f"log_every = {log_every} is not allowed: it must be 1 or more")
        self.objective, self.seed, self.log_every = objective, seed, log_every
        self.peers = nn.ModuleDict(dict(peers or {}))
        self._make_optimizer, self._make_scheduler = optimizer or DEFAULT_OPTIMIZER, scheduler
        self._interval = scheduler_interval
        self.epoch_means: dict[str, float] = {}  # of the last training epoch
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
        self.automatic_optimization = not self.own_optimizers
        objective.check_teacher(teacher is not None or self.supplies_teacher)

    # ------------------------------------------------------------------ where a set-up differs

    def compose(self, batch: Batch) -> Batch:
        """Change a training batch before the networks see it: views, generated samples, noise. Nothing by default."""
        return batch

    def losses(self, batch: Batch) -> Step:
        """Compute one step on a batch that has been through :meth:`compose` and ``task.rows``."""
        teacher, student = self.answer_both(batch)
        return self.score(student, teacher, batch)

    def score(self, student: Output, teacher: Output, batch: Batch) -> Step:
        """The objective of two outputs on a batch, as one step. Each of several networks has one of its own."""
        labelled = self.task.labelled(batch)
        rows = len(batch.targets) if batch.targets is not None else len(batch)
        shares = group.shares(rows, labelled, len(batch))
        values, total = self.objective(student, teacher, batch, *self.place(), shares)
        named = dict(zip(self.objective.names, values, strict=True))
        counts = self.task.count(student, batch) if self._counts else ()
        own = 1.0 if shares is None else shares.rows.clamp(min=1e-12)  # a process may have no row
        loss = total.detach() / own  # the buffer weights it with the rows
        over = {name: term.over for name, term in self.objective.items()}
        return Step(total, {"loss": loss, **named}, rows, labelled, counts, over)

    def networks(self) -> dict[str, nn.Module]:
        """What is trained, by name: the student, the terms' adapters, and the peers of a set-up."""
        return {"student": self.student, "objective": self.objective, **dict(self.peers.items())}

    # ------------------------------------------------------------------ before the first batch

    def prepare(
        self,
        batch: Batch,
        train_index: Tensor | None = None,
        train_targets: Tensor | None = None,
        epochs: int | None = None,
        steps: int | None = None,
    ) -> None:
        """Run both networks and each term once on two samples of a batch; resolve taps, build adapters, compare.

        Each term sees ``Term.prepare(setup)``, then one ``forward``, both in eval mode: see
        :class:`~kd.losses.base.Setup`. Call it once, before the optimiser is built.

        ``train_index``, ``train_targets``: of the training set; ``epochs``, ``steps``: the length of the run; all for
        :class:`~kd.losses.base.Setup`. The random state and batch statistics are left as they were. Raises ``KdError``
        for wrong taps and for shapes that do not fit.
        """
        self.to(self.device)  # a teacher, or a term with weights, may have come from another one
        few = self.task.rows(self.compose(as_batch(batch).few(2).to(self.device)))
        terms = self.objective.items()
        self._resolve_taps()
        gradient = bool(self.objective.needs("input_gradient"))
        training = self.student.training
        self.student.eval()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), _grad(gradient):
            self._want = Want(logits=True, features=True, input_gradient=gradient)
            self._inputs_of(few, gradient)
            teacher, student = self._dry(few)
            self._compare(student, teacher)
            self._want = self._want._replace(logits=bool(self.objective.needs("teacher_logits")))
            networks = {"student": self.student, **self._teacher_networks()}
            known: dict[str, Any] = {"train_index": train_index, "train_targets": train_targets}
            known |= {"classes": self.num_classes, "epochs": epochs, "steps": steps}
            known["layouts"] = {"student": self.student_taps.layouts}
            known["layouts"] |= {"teacher": self.teacher.layouts} if self.teacher is not None else {}
            for name, term in terms:
                own = student if term.needs_student_logits else student.without_logits()
                other = teacher if term.needs_teacher_logits else teacher.without_logits()
                seen = few if term.needs_labels else few.without_targets()
                try:
                    term.eval().prepare(Setup(own, other, seen, networks, **known))
                    value = term.eval()(own, other, seen)  # eval: adapters may have batch statistics
                except (ValueError, RuntimeError, TypeError, LookupError, AssertionError) as error:
                    raise KdError(f"loss.{name}: {str(error).splitlines()[0]}") from error
                if not isinstance(value, Tensor) or value.ndim:
                    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise KdError(f"loss.{name} returns {shape}: a term must return a scalar tensor")
            self.objective.train()
            self._deploy(few)
        self.student.train(training)
        self.to(self.device)  # the adapters
        self.prepared = True

    def setup(self, stage: str) -> None:
        """Prepare on the trainer's own loaders, where nobody has done it before (called by Lightning)."""
        trainer = self.trainer
        if trainer.world_size > 1:
            group.ignore_in_ddp(self, None if self.teacher_trained else "teacher.", "objective.")
        if stage == "fit" and not self.prepared:
            trainer.fit_loop.setup_data()
            data: Any = getattr(trainer, "datamodule", None)
            loader: Any = trainer.train_dataloader
            refuse_unsharded(loader, "train", trainer.world_size)
            known = (getattr(data, name, None) for name in ("train_index", "train_targets"))
            length: dict[str, Any] = {
                "epochs": max(0, trainer.max_epochs or 0) or None,
                "steps": max(0, trainer.max_steps) or None,
            }
            self.prepare(as_batch(next(iter(loader))), *known, **length)
        elif stage in ("validate", "test") and not self.prepared and self.num_classes is None:
            loop = trainer.test_loop if stage == "test" else trainer.validate_loop
            loop.setup_data()
            given: Any = trainer.test_dataloaders if stage == "test" else trainer.val_dataloaders
            batch = as_batch(next(iter(given)))
            self.num_classes = self._classes_of_student(batch)

    @torch.no_grad()
    def _classes_of_student(self, batch: Batch) -> int | None:
        self.to(self.device)
        few, training = self.task.rows(batch.few(2).to(self.device)), self.student.training
        answer = self.task.answer(self.student.eval(), few.inputs, few, Want())
        self.student.train(training)
        return answer.logits.shape[-1] if answer.has_logits else None

    def _resolve_taps(self) -> None:
        terms = self.objective.items()
        root = self.teacher.root if self.teacher is not None else None
        for name, term in terms:
            try:
                term.student_taps = resolve(term.student_taps, self.student, "student")
                if root is not None:
                    term.teacher_taps = resolve(term.teacher_taps, root, "teacher")
                elif self.teacher is None or term.teacher_taps is None:
                    term.teacher_taps = []
            except KdError as error:
                raise KdError(f"loss.{name}: {error}") from None
            if term.needs_attention_maps:
                self._unfuse(name, term, root)
        self.student_taps = Taps(self.student, [str(n) for _, t in terms for n in t.student_taps or ()], "student")
        if self.teacher is not None:
            self.teacher.tap([str(n) for _, t in terms for n in t.teacher_taps or ()])

    def _unfuse(self, name: str, term: Term, root: nn.Module | None) -> None:
        """Let the tapped attention make its maps, and say that it is slower for it."""
        for side, network, taps in (("student", self.student, term.student_taps), ("teacher", root, term.teacher_taps)):
            changed = unfuse(network, [str(tap) for tap in taps or ()]) if network is not None else []
            if changed:
                where = ", ".join(changed)
                log.info("loss.%s reads attention maps: fused attention is off in the %s's %s", name, side, where)

    def _teacher_networks(self) -> dict[str, nn.Module]:
        networks = list(self.teacher.networks) if self.teacher is not None else []
        if len(networks) == 1:
            return {"teacher": networks[0]}
        return {f"teacher{number}": network for number, network in enumerate(networks)}

    def _dry(self, batch: Batch) -> tuple[Output, Output]:
        try:
            teacher, student = self.answer_both(batch)
            again = self.student_taps.inspect()
            if self.teacher is not None:
                again |= self.teacher.inspect_taps()
            if again:
                teacher, student = self.answer_both(batch)
                self.student_taps.inspect()
                if self.teacher is not None:
                    self.teacher.inspect_taps()
        except (RuntimeError, AssertionError) as error:
            parts = batch.inputs if isinstance(batch.inputs, Mapping) else {"": batch.inputs}
            shape = ", ".join(f"{name} {tuple(part.shape[1:])}".strip() for name, part in parts.items())
            raise KdError(f"a network cannot take inputs of shape {shape}: {str(error).splitlines()[0]}") from None
        return teacher, student

    def _compare(self, student: Output, teacher: Output) -> None:
        """Refuse outputs that do not fit one another; find out what can be measured."""
        read = bool(self.objective.needs("teacher_logits")) and self.teacher is not None
        self.task.agree(student, teacher, self.num_classes, read)
        self._counts = student.has_logits and bool(self.task.counts)
        if self.num_classes is None and student.has_logits:
            self.num_classes = student.logits.shape[-1]
        alike = teacher.has_logits and student.has_logits and teacher.logits.shape[-1] == student.logits.shape[-1]
        self.comparable = self.comparable and alike

    def _deploy(self, few: Batch) -> None:
        """Let the terms leave their heads on the student, and see that what they made of it answers."""
        network, self.heads = self.student, []
        for name, term in self.objective.items():
            before, network = network, term.deployed(network)
            self.heads += [name] if network is not before else []
            if not isinstance(network, nn.Module):
                raise KdError(f"loss.{name}: deployed(student) returns a {type(network).__name__}, not a torch module")
        self._deployed = [network]
        if network is not self.student:
            try:
                self._deployed_keys()
            except KeyError:
                raise KdError(
                    f"loss.{self.heads[-1]}: deployed(student) has weights that belong neither to the student nor to a "
                    "term: they would be in no checkpoint"
                ) from None
            training = network.training
            answer = self.task.answer(network.eval(), few.inputs, few, Want())
            self.task.agree(answer, Output(), self.num_classes, False)
            network.train(training)

    def find_unreached(self, batch: Batch) -> None:
        """Note the trainable parameters that no term reaches, in one backward pass on two samples: DDP must know."""
        few = self.task.rows(self.compose(as_batch(batch).few(2).to(self.device)))
        training = self.student.training
        self.student.eval()
        self.objective.eval()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            self._inputs_of(few, self._want.input_gradient)
            teacher, student = self.answer_both(few)
            _, total = self.objective(student, teacher, few)
            if total.requires_grad:
                total.backward()
        self.student.train(training)
        self.objective.train()
        self.unreached = [n for n, p in self.named_parameters() if p.requires_grad and p.grad is None]
        self.zero_grad(set_to_none=True)

    def configure_model(self) -> None:
        """Shard student, teacher and adapters, each over all processes (called by Lightning under FSDP)."""
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
        self._want = self._want._replace(logits=True)

    # ------------------------------------------------------------------ the forward passes

    def answer_both(self, batch: Batch) -> tuple[Output, Output]:
        """Teacher's and student's outputs with taps. The teacher runs first: the other order costs memory traffic."""
        teacher = self.answer_of_teacher(batch)
        student = self.answer_of_student(batch)
        for view in self.objective.views:
            if view not in batch.views:
                raise KdError(
                    f"a term needs the view {view} of each sample, the batches have "
                    f"{', '.join(batch.views) or 'none'}: the data module must make it"
                )
            seen = Batch(batch.views[view], batch.targets, batch.index, batch.mask, {}, batch.extra)
            teacher.views[view] = self.answer_of_teacher(seen)
            student.views[view] = self.answer_of_student(seen)
        return teacher, student

    def answer_of_teacher(self, batch: Batch) -> Output:
        """The teacher's output; empty without one. A set-up that supplies its own overrides this."""
        return Output() if self.teacher is None else self.teacher.answer(batch, self._want)

    def answer_of_student(self, batch: Batch) -> Output:
        """The student's output, with the taps of the terms."""
        self.student_taps.active = bool(self.student_taps.names)
        output = self.task.answer(self.student, batch.inputs, batch, self._want)
        if self.student_taps.active:
            output.features |= self.student_taps.take()
        self.student_taps.active = False
        return output

    def _inputs_of(self, batch: Batch, gradient: bool) -> None:
        if gradient and isinstance(batch.inputs, Tensor) and batch.inputs.is_floating_point():
            batch.inputs = batch.inputs.detach().requires_grad_()

    def forward(self, inputs: Any) -> Any:
        """What the network that is deployed returns."""
        return self.deployed(**inputs) if isinstance(inputs, Mapping) else self.deployed(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step: named terms, their weighted sum, counts into the buffer."""
        batch = self.task.rows(self.compose(as_batch(batch)))
        self._inputs_of(batch, self._want.input_gradient)
        step = self.losses(batch)
        self.track(step, batch_idx)
        if not self.automatic_optimization:
            self.descend(step.total, batch_idx)
        return step.total

    # ------------------------------------------------------------------ bookkeeping of an epoch

    def on_fit_start(self) -> None:
        """Measure the teacher with the student's metrics, once, and say so before the first epoch."""
        self._buffer = None
        self.watch_teacher()
        if self.teacher is None:
            return
        if self.comparable and "val" not in self.teacher_metrics:
            self._measure_teacher()
        if self.teacher.cache and self._want.logits:
            data: Any = getattr(self.trainer, "datamodule", None)
            if not hasattr(data, "answering_dataloader"):
                raise KdError(
                    "a teacher with cache = True answers the whole training set before the first epoch: its data must "
                    "be a kd.data.base.AdaptedData or a data module of kd (trainer.fit(module, datamodule=data))"
                )
            loader = data.answering_dataloader()
            with self.trainer.precision_plugin.forward_context():  # as in the training step
                self.teacher.begin(loader, self.device)

    def _measure_teacher(self) -> None:
        assert self.teacher is not None
        teacher, loader = self.teacher, self._val_batches()
        if loader is None:
            return
        dtype = next((p.dtype for p in self.student.parameters()), torch.float32)  # bf16-true: as in the steps
        cast = _cast_to(dtype)
        found, _ = measure(
            *(self.task, self.num_classes, lambda batch: teacher.measured(batch.map(cast)), loader, self.device),
            who="the teacher",
            split="val",
        )
        self.teacher_metrics["val"] = found  # of one that is trained along, each validation's take its place
        numbers = ", ".join(f"val/{k} {v:.4f}" for k, v in found.items())
        log.info("teacher%s: %s", ", before it is trained along" if self.teacher_trained else "", numbers)
        recorded = teacher.sources[0].get("val", {}) if len(teacher.sources) == 1 else {}
        if words := self.task.doubt(found, recorded, self.num_classes):
            log.warning("the teacher %s", words)

    def _val_batches(self) -> Iterable[Batch] | None:
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            return data.val_dataloader()
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
            self.epoch_means = self._train_means(self._buffer, *self._buffer.take_epoch())

    def on_train_epoch_end(self) -> None:
        """Give the epoch's means to Lightning's callbacks; the loggers have them step by step."""
        self.close_epoch()
        self.log_dict(self.epoch_means, logger=False)

    def _read_buffer(self, buffer: StepBuffer, batch_idx: int) -> None:
        window = buffer.read()
        bad = first_bad(window)
        if bad is not None:
            self._stop_on(buffer, bad, batch_idx, len(window))
        means = self._train_means(buffer, *buffer.last)  # over all processes
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
        raise RunFailure(
            f"the loss is not finite: term {', '.join(terms)} at step {batch_idx - steps + 2 + row} of epoch "
            f"{self.current_epoch + 1} (a lower recipe.optimizer.lr or recipe.gradient_clip may help); "
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

    def _deployed_keys(self) -> dict[str, str]:
        """Name in the deployed network → name in this module's state dict, of each of its tensors."""
        own = {id(tensor): name for name, tensor in self.state_dict(keep_vars=True).items()}
        return {name: own[id(tensor)] for name, tensor in self.trained.state_dict(keep_vars=True).items()}

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
        for key, what in {"content": "the images are others", "split": "they are split otherwise"}.items():
            if before.get(key) is not None and before[key] != now.get(key):
                raise KdError(
                    f"the data is not what it was when the run began: {what} (data.{key} {before[key]} then, "
                    f"{now.get(key)} now). Put it back, or start a run of its own; an older kd "
                    "divided folders otherwise"
                )


def _grad(wanted: bool) -> Any:
    return contextlib.nullcontext() if wanted else torch.no_grad()


def _cast_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
