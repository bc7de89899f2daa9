"""A teacher's answers on the disk: made once for all jobs that need them, then read in the place of its network."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd.data.base import as_batch
from kd.data.text.base import TextModule
from kd.distill import cache_key, cache_shards
from kd.distill.answers import Answers
from kd.distill.cache_build import Builder, order_of
from kd.distill.cache_forms import Form
from kd.distill.cache_shards import Damaged, Held, Rows
from kd.distill.teacher import Teacher
from kd.errors import KdError
from kd.losses.base import Batch, Output
from kd.tasks.base import Task, Want
from kd.tasks.classification import Classification
from kd.tasks.output_projection import Head

log = logging.getLogger(__name__)

_GIVE = "give teacher.checkpoint=RUN or model@teacher=NAME"


class CachedAnswers(Answers):
    """``teacher.answers={_target_: kd.distill.cache.CachedAnswers, k: 64, temperatures: [1, 2]}``: see the disk first.

    Before the first epoch the live teacher answers the training set, unless all answers are there; in training nothing
    runs but the student. On validation and test the live teacher is measured as ever. Samples are known by their index,
    rows by their place in the sample. Several processes and jobs share the work: none makes what another one makes, and
    what was made before a kill stays.

    ``what``, ``k``, ``temperatures``, ``precision``: what is kept, see :class:`kd.distill.cache_forms.Form`. A top-k is
    ``Output.topk``, exact at its temperatures; hidden states and their output projection give the logits themselves.

    ``folder``: where caches are, each in a folder named by a digest of what decides it: weights and architecture,
    tokenizer, training data and split, views, task, precision, what is kept. None: ``.answers`` in the folder of runs
    (``KD_RUNS``, or ``runs``). ``path``: the folder of one cache, in the place of that; if it is of something else, one
    sentence says of what. With it the live teacher may be left out, which then is not measured.

    ``shard_samples``: samples of a file; None: about 64 MiB. ``verify``: read every byte when it is opened, and not the
    sizes and headers of the files alone. ``evaluate``: False: the live teacher is not measured on validation and test,
    which may take longer than all steps of a small student.

    Images that are cropped and flipped at random need ``data.augment.period=K`` (or ``data.teacher_view=clean``): their
    augmentation repeats after K epochs, and the cache keeps the answers to these K views.

    A cache that is damaged, or of something else, is a ``KdError``; so is a full disk: the next run goes on from there.
    """

    cache = True

    def __init__(
        self,
        teacher: Teacher | None,
        data: Any,
        task: Task | None = None,
        *,
        what: str = "topk",
        k: int = 64,
        temperatures: Sequence[float] = (1.0,),
        precision: str | None = None,
        folder: str | None = None,
        path: str | None = None,
        shard_samples: int | None = None,
        verify: bool = False,
        evaluate: bool = True,
    ) -> None:
        super().__init__()
        self.evaluated = evaluate
        self.form = Form(what, k, temperatures, precision)
        self.data, self.task, self.verify = data, task if task is not None else Classification(), verify
        if what == "topk" and not self.task.distribution:
            raise ValueError("what = topk is not allowed: the answers of this task are no distribution (what = logits)")
        if shard_samples is not None and (isinstance(shard_samples, bool) or shard_samples < 1):
            raise ValueError(
                f"shard_samples = {shard_samples} is not allowed: it must be a whole number above 0, or null"
            )
        if teacher is None and path is None:
            raise KdError(f"teacher.answers needs a teacher: {_GIVE}, or the path of a cache that is complete")
        if getattr(data, "for_teacher", data) is not data:
            raise KdError(
                "teacher.answers is not allowed with a teacher of another tokenizer than data.tokenizer: a loss of two "
                "tokenizers reads the live teacher, set it to null"
            )
        if teacher is not None and teacher.cache:
            raise KdError(
                "teacher.cache = true keeps the answers in memory, teacher.answers on the disk: set one of them"
            )
        self.shard_samples, self.path = shard_samples, Path(path).expanduser() if path else None
        self.folder = Path(folder or Path(os.environ.get("KD_RUNS", "runs")) / ".answers").expanduser()
        self._aside: list[Any] = [teacher]  # in a list: its weights are those of self.networks, by the same names
        self.live = teacher is not None and teacher.live
        self.rows: Rows | None = None
        self.held: Held | None = None  # the same on the training's device
        self.head: list[nn.Module] = []  # of hidden states; no part of the teacher's weights
        self._digest: str | None = None
        self._row_bytes: float | None = None
        if teacher is not None:
            self.networks, self.sources = teacher.networks, teacher.sources
        else:
            self._open(self._facts(torch.device("cpu")))

    # ------------------------------------------------------------------ the live teacher behind it

    @property
    def teacher(self) -> Teacher | None:
        """The live teacher, if there is one."""
        return self._aside[0]

    def forward(self, inputs: Any) -> Output:
        """Return what the live teacher answers."""
        return self._living()(inputs)

    def measured(self, batch: Batch) -> Output:
        """Return the live teacher's output on a batch of validation or test."""
        return self._living().measured(batch)

    def _living(self) -> Teacher:
        if self.teacher is None:
            raise KdError(
                "teacher.answers has answers to the training samples alone: give teacher.checkpoint=RUN as well"
            )
        return self.teacher

    def optimize(self, batch: Batch, channels_last: bool) -> None:
        """Get the live teacher to answer faster."""
        if self.teacher is not None:
            self.teacher.optimize(batch, channels_last)

    def use_given(self) -> None:
        """Undo :meth:`optimize`."""
        if self.teacher is not None:
            self.teacher.use_given()

    def train(self, mode: bool = True) -> CachedAnswers:
        """Stay in eval, whatever a trainer calls."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> CachedAnswers:
        """Move along what is no module of this one."""
        if self.teacher is not None:
            self.teacher._apply(fn)
        for head in self.head:
            head._apply(fn)
        return super()._apply(fn, recurse)

    # ------------------------------------------------------------------ answers

    def answer(self, batch: Batch, want: Want) -> Output:
        """Return what is kept for a batch of training.

        Before :meth:`begin`, and for text of the student's own, it is the live teacher's output, cut to the same.
        """
        if want.input_gradient:
            raise KdError("teacher.answers keeps no graph, and a term reads the gradient of the inputs: set it to null")
        if not want.logits:
            return Output()
        if self.rows is None or "own_text" in batch.extra:  # what the student wrote is no sample of the data
            return self._of_living(batch)
        index, view, device = cache_key.index_of(batch), self._view(batch, self.rows.views), batch.device
        held = self.held if self.held is not None and self.held.device == device == index.device else None
        arrays = held.read(index, view) if held is not None else self.rows.read(index.cpu().numpy(), view)
        found = len(next(iter(arrays.values())))
        due = len(batch.targets) if batch.targets is not None else len(batch)
        if found != due:
            raise KdError(
                f"{self.rows.folder} has {found} rows for these samples, the batch has {due}: the data is another"
            )
        moved = {name: _moved(tensor, device) for name, tensor in arrays.items()}
        return self.form.decode(moved, self.rows.classes, self.head[0] if self.head else None)

    def _view(self, batch: Batch, views: int) -> int:
        if views == 1:
            return 0
        if "view" not in batch.extra:
            raise KdError(f"teacher.answers keeps {views} views of a sample, a batch does not say which of them it is")
        return int(batch.extra["view"])

    @torch.no_grad()
    def _of_living(self, batch: Batch) -> Output:
        """Put the live teacher's answer in the form of the kept ones, so that the terms see what they will see."""
        if self._digest is None:
            self._digest = cache_key.digest_of_teacher(self._living())  # before its weights are sharded or folded
        output = self._living().answer(batch, Want())
        arrays, classes = self.form.encode(output)
        rows = max(1, len(next(iter(arrays.values()))))
        self._row_bytes = sum(t.numel() * t.element_size() for t in arrays.values()) / rows
        moved = {name: tensor.to(batch.device) for name, tensor in arrays.items()}
        return self.form.decode(moved, classes, output.head)

    # ------------------------------------------------------------------ opening and making

    @torch.no_grad()
    def begin(self, batches: Iterable[Batch], device: torch.device) -> None:
        """Open the cache; make it before, where it is not complete. ``batches`` are not read, the data is asked."""
        if self.rows is None:
            facts = self._facts(device)
            if not self._open(facts):
                self._build(facts, device)
                self._open(facts)
        assert self.rows is not None
        self.held = cache_shards.held(self.rows, device, self.data.train_index is not None)

    def _facts(self, device: torch.device) -> dict[str, Any]:
        """Return what decides the answers; without a live teacher what of it is known."""
        facts = cache_key.facts_of_run(self.data, self.task, self.form)
        if self.teacher is not None:
            self._digest = self._digest or cache_key.digest_of_teacher(self.teacher)
            facts |= {"teacher": self._digest, "arithmetic": cache_key.arithmetic(self.teacher, device)}
        return facts

    def _place(self, facts: dict[str, Any]) -> Path:
        return self.path or self.folder / cache_key.key_of(facts)

    def _open(self, facts: dict[str, Any]) -> bool:
        """Open the cache if it is complete; tell whether it is. ``KdError``: damaged, or of something else."""
        place = self._place(facts)
        if place.exists() and not place.is_dir():
            raise KdError(f"teacher.answers.path = {place} is not allowed: it is there, and no folder")
        try:
            manifest = cache_shards.read_json(place / cache_shards.MANIFEST)
            plan = manifest if manifest is not None else cache_shards.read_json(place / cache_shards.PLAN)
            if plan is None and self.path is not None:
                _check_new(place)
            first = plan is not None and plan["version"] == cache_shards.FIRST
            if first and isinstance(cache_key.own_kind(self.data), TextModule):
                raise Damaged(f"{place} keeps answers to texts as an earlier version of kd did")
            if plan is not None and (differs := cache_key.difference(plan["facts"], facts)):
                raise KdError(f"teacher.answers: {place} {differs}")
            if manifest is None:
                if self.teacher is None:
                    raise KdError(f"teacher.answers.path = {place} is no complete cache: it needs a teacher to be made")
                return False
            self.rows, self.whole_samples = Rows(place, manifest, self.verify), True
            self.head = [_head(self.rows.head)] if self.rows.head is not None else []
        except (Damaged, KeyError) as error:
            why = error if isinstance(error, Damaged) else f"{place} lacks {error}"
            made = f"delete {place}" if self.teacher is not None else f"{_GIVE} and another teacher.answers.path"
            raise KdError(f"teacher.answers: {why}; {made} to have the answers made anew") from None
        weight = next(self.parameters(), None)
        for head in self.head:
            head.to(weight.device if weight is not None else "cpu")
        if (index := self.data.train_index) is not None:
            self.rows.samples(index.numpy())
        log.info("answers of the teacher: read from %s (%s)", place, self.form.described())
        return True

    def _build(self, facts: dict[str, Any], device: torch.device) -> None:
        views = int(getattr(getattr(self.data, "own", self.data), "views", 1))

        def loader(view: int) -> Any:
            return cache_key.answering(self.data, view if views > 1 else None)

        known = cache_key.own_kind(self.data)
        order = known.train_index.numpy().astype(np.int64) if known is not None else order_of(loader(0))
        builder = Builder(self._place(facts), facts, self._living(), self.task, self.form, loader, order, views, device)
        first = self.task.rows(as_batch(next(iter(loader(0)))))
        rows = len(first.targets) if first.targets is not None else len(first)
        builder.sample_bytes = None if self._row_bytes is None else self._row_bytes * rows / len(first)
        builder.shard_samples = self.shard_samples
        builder.complete()


def _check_new(place: Path) -> None:
    """Refuse a folder that has something else in it: a cache would be written between."""
    full = place.is_dir() and any(not name.startswith(".") for name in os.listdir(place))  # a dot: what others begin
    if full and not (place / cache_shards.PLAN).exists():  # it does where another process has begun the cache meanwhile
        raise KdError(
            f"teacher.answers.path = {place} is not allowed: the folder has something else in it, and no cache"
        )


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)


def _head(file: cache_shards.File) -> Head:
    """Make the output projection that was kept beside the hidden states."""
    weight = file.tensor("weight")
    bias = file.tensor("bias") if "bias" in file.arrays else None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    softcap = file.about.get("softcap")
    return Head(layer, float(file.about["scale"]), float(softcap) if softcap is not None else None)
