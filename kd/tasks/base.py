"""What a task is: what a row, a target and a metric are, and how a network of the task is called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch, Output, Term
from kd.tasks.metrics import Metric


class Want(NamedTuple):
    """What is asked of a network in one pass: ``logits`` or not, ``features`` or not, with a graph or not."""

    logits: bool = True
    features: bool = False
    input_gradient: bool = False


class Meter(nn.Module, ABC):
    """The metrics of one pass over a split; ``update`` with each batch, then ``compute``. All in float32."""

    @abstractmethod
    def update(self, student: Output, batch: Batch, teacher: Output | None = None) -> None:
        """Add one batch: the measured network's output, and its teacher's if there is one."""

    @abstractmethod
    def compute(self, with_teacher: bool) -> dict[str, float]:
        """Compute the metrics by name over all processes; with those beside a teacher or without."""

    def per_class(self) -> list[float]:
        """Return the main metric for each class; empty where the task has none."""
        return []


class Task(ABC):
    """A task. ``metrics``: the first one selects the checkpoint and is "the" number in tables.

    ``row``: what a row is, a ``sample``, a ``token`` or a ``pixel``.
    ``counts``: names of what :meth:`count` returns, logged in training as means over the labelled rows.
    ``summary``: the metrics that the last lines of a run show; empty: all. ``needs_logits``: whether the metrics are
    made of the logits, so that they say nothing where no term trains them. ``architecture``: which of a library's
    networks the task wants (``causal_lm``, ``sequence_classification`` …), for factories that take it.
    ``unit``: what the rows are called where training logs how many it goes through in a second; "": it does not.
    ``distribution``: whether the softmax of a row's logits means something, so that its top-k says most of it.
    ``regression``: whether a network answers with numbers to regress on. ``across_tokenizers``: the metric that
    compares networks of two tokenizers. ``outputs``: how the number of outputs of a row is written.
    """

    metrics: Sequence[Metric]
    row: str = "sample"
    architecture: str | None = None
    unit: str = ""
    distribution: bool = True
    regression: bool = False
    across_tokenizers: str | None = None
    outputs: str = "{} classes"
    counts: Sequence[str] = ()
    summary: Sequence[str] = ()
    needs_logits: bool = True

    def rows(self, batch: Batch) -> Batch:
        """Give the batch one target a row: shift, mask and flatten here, once. An image is a row as it stands."""
        return batch

    def few(self, batch: Batch) -> Batch:
        """Take two samples for a dry pass, before :meth:`rows`; of many rows a sample a task leaves most out."""
        return batch.few(2)

    def answer(self, network: nn.Module, inputs: Any, batch: Batch, want: Want) -> Output:
        """Call a network; its logits, if any, are rows × classes. A mapping of inputs becomes keyword arguments.

        ``batch`` has been through :meth:`rows`. A network that answers with a mapping or a model output gives its
        ``logits``; of a tuple the first tensor counts.
        """
        raw = network(**inputs) if isinstance(inputs, Mapping) else network(inputs)
        return Output(self.logits(raw), raw=None if isinstance(raw, Tensor) else raw)

    def logits(self, raw: Any) -> Tensor | None:
        """Find the logits in what a network returned, None if there are none."""
        if isinstance(raw, Mapping):
            return raw.get("logits")
        if isinstance(raw, (tuple, list)):
            return next((part for part in raw if isinstance(part, Tensor)), None)
        return raw if isinstance(raw, Tensor) else getattr(raw, "logits", None)

    def check_terms(self, terms: Iterable[tuple[str, Term]]) -> None:
        """Refuse losses of distributions, by name, where rows are numbers: the softmax of one is 1, whatever it is."""
        for name, term in terms if self.regression else ():
            if (term.needs_student_logits or term.needs_teacher_logits) and not term.regression:
                raise KdError(f"loss.{name} is for classes, and a row of this task is a number: use loss=[mse]")

    def agree(self, student: Output, teacher: Output, classes: int | None, compared: bool) -> None:
        """Refuse outputs of a dry pass that cannot be compared; ``classes``: of the data, None if it has none.

        ``compared``: whether a term reads the teacher's logits. ``KdError`` names both numbers.
        """
        sides = {"student": student, "teacher": teacher} if compared else {"student": student}
        found = {side: output.logits.shape[-1] for side, output in sides.items() if output.has_logits}
        for side, number in found.items():
            if classes is not None and number != classes:
                raise KdError(f"the {side} answers {number} classes, the data has {classes}")
        if len(set(found.values())) > 1:
            raise KdError(f"the student answers {found['student']} outputs a row, the teacher {found['teacher']}")

    def comparable(self, student: Output, teacher: Output) -> bool:
        """Tell whether the outputs of a dry pass mean the same, so that both networks can be measured side by side."""
        both = student.has_logits and teacher.has_logits
        return both and student.logits.shape[-1] == teacher.logits.shape[-1]

    def labelled(self, batch: Batch) -> Tensor:
        """Count the labelled rows of a batch that has been through :meth:`rows`, 0-d."""
        targets = batch.targets
        if targets is None:
            return torch.zeros((), dtype=torch.int64, device=batch.device)
        if targets.is_floating_point():  # shares, or numbers to regress on: every row has one
            return torch.tensor(len(targets), device=targets.device)
        return (targets != UNLABELLED).sum()

    def count(self, student: Output, batch: Batch) -> list[Tensor]:
        """Return sums over the labelled rows for the training curves, in the order of ``counts``, 0-d each.

        A few kernels, no synchronisation. A task that must not make logits in training returns nothing.
        """
        return []

    @abstractmethod
    def meter(self, classes: int | None) -> Meter:
        """Make a fresh meter for one pass; ``classes``: outputs of a row, None where that means nothing."""

    def doubt(self, measured: Mapping[str, float], recorded: Mapping[str, float], classes: int | None) -> str:
        """Return the end of a sentence on a teacher whose metrics are not what they should be; "" if all is right."""
        return ""

    def metric(self, name: str) -> Metric | None:
        """Find a metric by its name."""
        return next((metric for metric in self.metrics if metric.name == name), None)

    def names(self, with_teacher: bool, classes: int | None = None) -> list[str]:
        """Return the names of the metrics of a split; ``classes``: of the data, where a metric is of so many alone."""
        return [m.name for m in self.metrics if with_teacher or not m.beside_teacher]
