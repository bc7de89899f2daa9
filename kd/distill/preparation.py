"""How the Distiller answers and prepares: forward passes with taps, and the dry pass before training."""

from __future__ import annotations

import contextlib
import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kd.data.base import as_batch, refuse_unsharded
from kd.distill.objective import Objective
from kd.distill.optimisation import OptimisationModule
from kd.distill.taps import Taps, resolve, unfuse
from kd.errors import KdError, RunFailure, framed
from kd.losses.base import UNLABELLED, Batch, Output, Setup, Term, TopK
from kd.losses.networks import in_eval
from kd.models.folding import channels_last, to_channels_last
from kd.parallel import group
from kd.tasks.base import Want

log = logging.getLogger(__name__)


class PreparationModule(OptimisationModule):
    """Runs student and teacher with their taps; :meth:`prepare` resolves these and lets the terms build adapters."""

    objective: Objective
    peers: nn.ModuleDict
    prepared: bool  # whether the taps are resolved and the adapters built
    sharded: bool  # whether each process holds a part of every parameter only
    heads: list[str]  # the terms that leave something of theirs on the student
    unreached: list[str]  # see find_unreached
    composes_own_text: bool
    channels_last = False  # whether the student is trained in this memory format
    _two_heads = False  # see _separate_heads
    _want: Want
    _counts: bool  # whether the student has logits to count right answers in

    @abstractmethod
    def compose(self, batch: Batch) -> Batch:
        """Change a training batch before the networks see it."""

    @property
    @abstractmethod
    def composes(self) -> bool:
        """Whether :meth:`compose` changes anything."""

    @abstractmethod
    def losses(self, batch: Batch) -> Any:
        """Compute one step."""

    # ------------------------------------------------------------------ before the first batch

    def prepare(
        self,
        batch: Batch,
        train_index: Tensor | None = None,
        train_targets: Tensor | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        channels_last: bool = True,
    ) -> None:
        """Run both networks and each term once on two samples of a batch; resolve taps, build adapters, compare.

        Each term sees ``Term.prepare(setup)``, then one ``forward``, both in eval mode: see
        :class:`~kd.losses.base.Setup`. Call it once, before the optimiser is built.

        ``train_index``, ``train_targets``: of the training set; ``epochs``, ``steps``: the length of the run; all for
        :class:`~kd.losses.base.Setup`. ``channels_last``: whether images are trained on in that memory format, where
        the networks answer the same with it; :meth:`kd.distill.answers.Answers.optimize` is called in any case. The
        random state and batch statistics are left as they were. Raises ``KdError`` for wrong taps and for shapes that
        do not fit.
        """
        self.to(self.device)  # a teacher, or a term with weights, may have come from another one
        terms = self.objective.items()
        taken = [name for name, _ in terms if name in ("loss", "labelled", *self.task.counts)]
        if taken:
            raise KdError(f"loss.{taken[0]} is no name for a term: train/{taken[0]} is another curve; choose another")
        self.task.check_terms(terms)
        if self.teacher is not None and self.teacher.cache:
            self._check_kept_answers(self.teacher.cached_by)
        self._resolve_taps()
        self._separate_heads()
        gradient = bool(self.objective.needs("input_gradient"))
        if not self.student.training:  # as from_pretrained and a trainer of before leave it: it is to be trained
            self.student.train()
        with self._random_state_kept(), in_eval(self.student, self.peers), _grad(gradient):
            few = self._few(batch)
            self._want = Want(logits=True, features=True, input_gradient=gradient)
            self._inputs_of(few, gradient)
            if few.of_teacher is not few:
                self.objective.check_tokenizers()
            teacher, student = self._dry(few)
            self._student_channels_last(few, channels_last)
            self._compare(student, teacher, two_tokenizers=few.of_teacher is not few)
            if teacher is not None and teacher.topk is not None and teacher.topk.ids.shape[-1] < teacher.topk.classes:
                self._check_topk(teacher.topk, projected=student.hidden is not None)
            self._check_labels(batch)
            self._want = self._want._replace(logits=bool(self.objective.needs("teacher_logits")))
            networks = {"student": self.student, **self._teacher_networks()}
            known: dict[str, Any] = {"train_index": train_index, "train_targets": train_targets}
            known |= {"classes": self.num_classes, "epochs": epochs, "steps": steps}
            known["layouts"] = {"student": self.student_taps.layouts}
            known["layouts"] |= {"teacher": self.teacher.layouts} if self.teacher is not None else {}
            for name, term in terms:
                with _named(name):
                    term.eval().prepare(Setup(*_seen(term, student, teacher, few), networks, **known))
            if self.teacher is not None:  # after the terms, which may have put hooks into its networks
                self.teacher.optimize(few, channels_last)
            teacher, student = self.answer_both(few)  # as in the steps
            for name, term in terms:
                with _named(name):
                    value = term.eval()(*_seen(term, student, teacher, few))  # eval: adapters may have batch statistics
                if not isinstance(value, Tensor) or value.ndim:
                    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise KdError(f"loss.{name} returns {shape}: a term must return a scalar tensor")
            self.objective.train()
            self._deploy(few)
        self.to(self.device)  # the adapters
        self.prepared = True

    def _few(self, batch: Batch) -> Batch:
        """Return a few rows of a batch, as they are in the steps."""
        given = as_batch(batch)
        whole = self.teacher is not None and self.teacher.whole_samples
        return self.task.rows(self.compose((given.few(2) if whole else self.task.few(given)).to(self.device)))

    def _student_channels_last(self, few: Batch, wanted: bool) -> None:
        """Store the student's convolutions channels last, where it answers the same with the same gradients."""

        def read(last: bool) -> Any:
            self.channels_last = last
            with torch.enable_grad():
                output = self.answer_of_student(few)
                found = [output.logits if output.has_logits else None, output.raw, *output.features.values()]
                trained = [p for p in self.student.parameters() if p.requires_grad]
                reached = [t.float().square().mean() for t in tree_leaves(found) if getattr(t, "requires_grad", False)]
                gradients = torch.autograd.grad(sum(reached), trained, allow_unused=True) if reached else []
            return [found, gradients]

        if wanted:
            self.channels_last = to_channels_last(self.student, read)

    def use_given(self) -> None:
        """Run both networks as they were given from now on, all weights stored row by row."""
        if self.channels_last:
            self.channels_last = False
            self.to(memory_format=torch.contiguous_format)
        if self.teacher is not None:
            self.teacher.use_given()

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
            known = [getattr(data, name, None) for name in ("train_index", "train_targets")]
            length: dict[str, Any] = {
                "epochs": max(0, trainer.max_epochs or 0) or None,
                "steps": max(0, trainer.max_steps) or None,
            }
            self.prepare(as_batch(next(iter(loader))), known[0], known[1], **length)
        elif stage in ("validate", "test") and not self.prepared and self.num_classes is None:
            loop = trainer.test_loop if stage == "test" else trainer.validate_loop
            loop.setup_data()
            given: Any = trainer.test_dataloaders if stage == "test" else trainer.val_dataloaders
            batch = as_batch(next(iter(given)))
            self.num_classes = self._classes_of_student(batch)

    @torch.no_grad()
    def _classes_of_student(self, batch: Batch) -> int | None:
        self.to(self.device)
        few = self.task.rows(self.task.few(batch).to(self.device))
        with in_eval(self.student):
            answer = self.task.answer(self.student, few.inputs, few, Want())
        return answer.logits.shape[-1] if answer.has_logits else None

    def _check_kept_answers(self, key: str) -> None:
        """Refuse terms that read more of a teacher than its kept logits, and a set-up that composes other samples."""
        undo = f"{key.partition(' ')[0]}=null"
        terms = self.objective.items()
        tapping = [name for name, term in terms if term.teacher_taps is None or len(term.teacher_taps)]
        if tapping:
            raise KdError(
                f"{key} keeps the teacher's logits only, loss.{tapping[0]} reads its intermediate tensors: set {undo}"
            )
        asked = {"views": self.objective.views, "input gradients": self.objective.needs("input_gradient")}
        for what, names in asked.items():
            if names:
                raise KdError(f"{key} keeps no {what}, and a term reads them ({names[0]}): set {undo}")
        answered = self.composes_own_text and key == "teacher.answers"  # own text is answered live
        if self.composes and not answered:
            raise KdError(
                f"{key} keeps answers to the samples as they are, {type(self).__name__} composes others: set {undo}"
            )

    def _check_topk(self, topk: TopK, projected: bool) -> None:
        """Refuse terms to which a tail in equal parts says something false: it is right at T = 1, in its sum alone.

        ``projected``: whether the student's output projection is known: the teacher's may be, too, and then
        its hidden states can be kept.
        """
        known = f"the top {topk.ids.shape[-1]} of {topk.classes} classes are known of the teacher"
        kept = "what=hidden or what=logits" if projected else "what=logits"
        for name, term in self.objective.items():
            if term.reads_topk or not term.needs_teacher_logits or term.reads_softmax_at == 1:
                continue
            reader = any(other.reads_topk for _, other in self.objective.items())
            instead = f"leave {name} out" if reader else f"take topk_kl in the place of {name}"
            way = f"keep {kept} in teacher.answers, or {instead}"
            reads = "reads more of the teacher's logits than their softmax at T = 1 (reads_softmax_at = None)"
            if term.reads_softmax_at is not None:
                reads, way = f"softens all classes (T = {term.reads_softmax_at:g})", f"{way}, or T = 1"
            raise KdError(f"loss.{name} {reads}, and {known}: {way}")

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

    def _separate_heads(self) -> None:
        """Train the two heads of a student with a distillation token apart, where terms of both kinds read its logits.

        The head of the class token learns from the labels then, the other one from the teacher, and their mean is the
        answer in evaluation, as timm makes it. Where all terms are of one kind, their mean is trained as well.
        """
        kinds = {term.needs_teacher_logits for _, term in self.objective.items() if term.needs_student_logits}
        switch: Any = getattr(self.student, "set_distilled_training", None)
        self._two_heads = switch is not None and len(kinds) == 2
        if switch is not None:
            switch(self._two_heads)

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
        except (KdError, RunFailure):
            raise
        except Exception as error:  # of a network of the user's own: anything
            parts = batch.inputs if isinstance(batch.inputs, Mapping) else {"": batch.inputs}
            shape = ", ".join(f"{name} {tuple(part.shape[1:])}".strip() for name, part in parts.items())
            raise KdError(f"a network cannot take inputs of shape {shape}: {str(error).splitlines()[0]}") from None
        return teacher, student

    def _compare(self, student: Output, teacher: Output, two_tokenizers: bool) -> None:
        """Refuse outputs that do not fit one another; find out what can be measured."""
        read = bool(self.objective.needs("teacher_logits")) and self.teacher is not None
        self.task.agree(student, Output() if two_tokenizers else teacher, self.num_classes, read)
        self._counts = student.has_logits and bool(self.task.counts)
        if self.num_classes is None and student.has_logits:
            self.num_classes = student.logits.shape[-1]
        self.measures_teacher &= two_tokenizers or self.task.comparable(student, teacher)
        self.comparable = self.measures_teacher and not two_tokenizers
        if self.measures_teacher and two_tokenizers:
            log.info(
                "the teacher has a tokenizer of its own: agreement and KL are left out, numbers a token are not "
                "compared with the student's, bits a byte are"
            )

    def _check_labels(self, batch: Batch) -> None:
        """Refuse a batch with a label that is no output of the student."""
        targets = self.task.rows(as_batch(batch)).targets
        read = (self._counts or self.objective.needs("labels")) and not self.task.regression
        if not read or self.num_classes is None or targets is None or targets.is_floating_point() or not len(targets):
            return
        least, most = int(targets.min()), int(targets.max())
        if most >= self.num_classes:
            raise KdError(
                f"the labels go to {most}, the student has {self.num_classes} outputs (0 … {self.num_classes - 1})"
            )
        if least < UNLABELLED:
            raise KdError(
                f"the labels go down to {least}: they must be 0 … {self.num_classes - 1}, or {UNLABELLED} for none"
            )

    def _deploy(self, few: Batch) -> None:
        """Let the terms leave their heads on the student, and see that what they made of it answers."""
        network, self.heads = self.student, []
        for name, term in self.objective.items():
            with _named(name):
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
            with in_eval(network):
                answer = self.task.answer(network, few.inputs, few, Want())
            self.task.agree(answer, Output(), self.num_classes, False)

    def find_unreached(self, batch: Batch) -> None:
        """Note the trainable parameters that no term reaches, in one backward pass on two samples: DDP must know."""
        with self._random_state_kept(), in_eval(self.student, self.peers, self.objective), torch.enable_grad():
            few = self._few(batch)
            self._inputs_of(few, self._want.input_gradient)
            total = self.losses(few).total
            if total.requires_grad:
                total.backward()
        self.unreached = [n for n, p in self.named_parameters() if p.requires_grad and p.grad is None]
        self.zero_grad(set_to_none=True)

    def configure_model(self) -> None:
        """Shard student, teacher and adapters, each over all processes (called by Lightning under FSDP)."""
        if self._device_mesh is None or self.sharded:
            return
        self.sharded = True
        self.strict_loading = False  # the strategy reads a checkpoint before the teacher is put back
        self.run_whole_teacher()  # a network that is left half-way would not be sharded again
        self.use_given()
        teachers = list(self.teacher.networks) if self.teacher is not None else []
        terms = [term for _, term in self.objective.items() if any(True for _ in term.parameters())]
        group.shard([self.student, *teachers, *terms], self._device_mesh["data_parallel"])

    def run_whole_teacher(self) -> None:
        """Do not leave the teacher behind its last tap, whatever the terms need."""
        self._want = self._want._replace(logits=True)

    # ------------------------------------------------------------------ the forward passes

    def answer_both(self, batch: Batch) -> tuple[Output, Output]:
        """Return teacher's and student's outputs with taps.

        The teacher runs first: the other order costs memory traffic.
        """
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
        """Return the teacher's output; empty without one. A set-up that supplies its own overrides this."""
        return Output() if self.teacher is None else self.teacher.answer(batch, self._want)

    def answer_of_student(self, batch: Batch) -> Output:
        """Return the student's output, with the taps of the terms."""
        self.student_taps.active = bool(self.student_taps.names)
        inputs = channels_last(batch.inputs) if self.channels_last else batch.inputs
        want = self._want._replace(logits=True)  # a term of labels alone asks the teacher for none
        output = self.task.answer(self.student, inputs, batch, want)
        if self._two_heads and isinstance(output.raw, tuple):  # in training; an evaluated network answers their mean
            output.distilled = output.raw[1]
        if self.student_taps.active:
            output.features |= self.student_taps.take()
        self.student_taps.active = False
        return output

    def _random_state_kept(self) -> Any:
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    def _inputs_of(self, batch: Batch, gradient: bool) -> None:
        if gradient and isinstance(batch.inputs, Tensor) and batch.inputs.is_floating_point():
            batch.inputs = batch.inputs.detach().requires_grad_()

    def forward(self, inputs: Any) -> Any:
        """Return what the network that is deployed returns."""
        return self.deployed(**inputs) if isinstance(inputs, Mapping) else self.deployed(inputs)

    def _deployed_keys(self) -> dict[str, str]:
        """Name in the deployed network → name in this module's state dict, of each of its tensors."""
        own = {id(tensor): name for name, tensor in self.state_dict(keep_vars=True).items()}
        return {name: own[id(tensor)] for name, tensor in self.trained.state_dict(keep_vars=True).items()}


@contextlib.contextmanager
def _named(term: str) -> Iterator[None]:
    """Turn what a term raises into a sentence that names it."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError, AssertionError) as error:
        raise KdError(f"loss.{term}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    except KdError:
        raise
    except Exception as error:
        raise framed(f"loss.{term}", error) from error


def _seen(term: Term, student: Output, teacher: Output, batch: Batch) -> tuple[Output, Output, Batch]:
    """Return what a term may read, by its declarations."""
    return (
        student if term.needs_student_logits else student.without_logits(),
        teacher if term.needs_teacher_logits else teacher.without_logits(),
        batch if term.needs_labels else batch.without_targets(),
    )


def _grad(wanted: bool) -> Any:
    return contextlib.nullcontext() if wanted else torch.no_grad()
