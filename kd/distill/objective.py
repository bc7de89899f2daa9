"""The objective: named terms, their weights over time, and the adapters and banks that the terms own."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.distill.fused import from_hidden
from kd.distill.schedules import Schedule
from kd.errors import KdError, framed
from kd.losses.base import OVER, Batch, Output, Term, at_least_float32
from kd.losses.logits.standardised import standardised_logits
from kd.losses.tokens.fused import Liger
from kd.parallel import group
from kd.parallel.group import Shares


class Objective(nn.Module):
    """The weighted sum of named terms.

    ``terms``: name → :class:`~kd.losses.base.Term`; ``weights``: name → constant factor (0 or more);
    ``schedules``: name → schedule, for terms whose weight changes. A term with weight 0 is still computed and
    logged, so that an ablation shows what it would have been.

    ``chunk``: where no term needs the logits of a vocabulary as a whole, they are made of so many rows at a time
    (:mod:`kd.distill.fused`); None: as many as suit; 0: all at once, always. ``liger``: with None, Liger's kernels
    compute them on a GPU, where they are installed, have the formula, and are faster on the first batch.

    ``standardise``: names of terms that see z-scores of the logits, on both sides
    (:func:`~kd.losses.logits.standardised.standardised_logits`).
    """

    def __init__(
        self,
        terms: Mapping[str, Term],
        weights: Mapping[str, float] | None = None,
        schedules: Mapping[str, Schedule] | None = None,
        chunk: int | None = None,
        standardise: Collection[str] = (),
        liger: bool = True,
    ) -> None:
        super().__init__()
        self.chunk = chunk
        self.liger = Liger() if liger else None
        for name in terms:
            if "." in name or hasattr(nn.ModuleDict, name):
                raise KdError(
                    f"loss.{name} is no name for a term: torch modules have an attribute of it; choose another"
                )
        self.terms = nn.ModuleDict(dict(terms))
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in terms}
        self.schedules = dict(schedules or {})
        for name, weight in self.weights.items():
            if terms[name].over not in OVER:
                raise KdError(f"loss.{name}: over = {terms[name].over} is not allowed: it must be {', '.join(OVER)}")
            if not 0 <= weight < math.inf:
                raise KdError(f"loss.{name}.weight = {weight} is not allowed: it must be a finite number, 0 or more")
        for name in standardise:
            _standardise(name, terms[name])

    def items(self) -> list[tuple[str, Term]]:
        """Name and term, in the order of the config."""
        return [(name, cast(Term, term)) for name, term in self.terms.items()]

    @property
    def names(self) -> list[str]:
        """The terms' names, in the order of the values of :meth:`forward`."""
        return list(self.terms)

    def needs(self, what: str) -> list[str]:
        """Name the terms that declare ``needs_<what>``: teacher, student_logits, teacher_logits, labels …"""
        return [name for name, term in self.items() if getattr(term, f"needs_{what}")]

    @property
    def views(self) -> list[str]:
        """The views that both networks must be run on."""
        return list(dict.fromkeys(view for _, term in self.items() for view in term.needs_views))

    def check_teacher(self, given: bool) -> None:
        """``KdError`` when a term needs a teacher and none is given."""
        wanting = self.needs("teacher")
        if wanting and not given:
            raise KdError(
                f"loss.{wanting[0]} needs a teacher: give teacher.checkpoint=RUN or model@teacher=NAME, or leave the "
                "term out (loss=[ce])"
            )

    def check_tokenizers(self) -> None:
        """``KdError`` when a term compares the tokens of one tokenizer: for a teacher that has another one."""
        for name, term in self.items():
            if term.needs_teacher and not term.two_tokenizers:
                raise KdError(
                    f"loss.{name} compares the tokens of one tokenizer, and the teacher has another one than "
                    "data.tokenizer: use a loss of two tokenizers, loss=[ce,uld] or loss=[ce,gold], or train the "
                    "student with the teacher's tokenizer"
                )

    def weight(self, name: str, epoch: float, epochs: float) -> float:
        """Return the factor of a term at this (fractional) epoch."""
        schedule = self.schedules.get(name)
        return self.weights[name] * (schedule(epoch, epochs) if schedule else 1.0)

    def forward(
        self,
        student: Output,
        teacher: Output,
        batch: Batch,
        epoch: float = 0.0,
        epochs: float = 1,
        shares: Shares | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Compute each term's unweighted value, and their weighted sum (all scalars).

        With ``shares`` the sum is this process's part: the mean of all parts is the objective of the whole batch. A
        term over the ``batch`` sees that of all processes, and its value is the whole already.
        """
        factors: dict[str, Any] = {}
        for name, term in self.items():
            term.progress = min(1.0, epoch / epochs)
            factors[name] = self.weight(name, epoch, epochs)
            if shares is not None and term.over != "batch":
                factors[name] = factors[name] * getattr(shares, term.over)
        values, parts = from_hidden(self.items(), student, teacher, batch, factors, self.chunk, self.liger)
        whole = _Gathered(student, teacher, batch)
        for name, term in self.items():
            if name not in values:
                several = shares is not None and term.over == "batch"
                own = student.taught if term.needs_teacher_logits else student
                try:
                    values[name] = term(*whole.seen_by(term)) if several else term(own, teacher, batch)
                except KdError:
                    raise
                except Exception as error:
                    raise framed(f"loss.{name}", error) from error
                parts.append(factors[name] * at_least_float32(values[name]))
        return [values[name] for name in self.names], torch.stack(parts).sum()


def _standardise(name: str, term: Term) -> None:
    """Let a term see z-scores of the logits, whoever calls it; of fused losses there are none then."""
    if not (term.needs_student_logits or term.needs_teacher_logits):
        raise KdError(f"loss.{name}.standardise = true is not allowed: the term reads no logits")
    term.every_class, term.reads_softmax_at = True, None  # their mean and spread
    if _see_z_scores not in term._forward_pre_hooks.values():  # a term of one's own may be in several objectives
        term.register_forward_pre_hook(_see_z_scores)


def _see_z_scores(term: nn.Module, seen: tuple[Output, Output, Batch]) -> tuple[Output, Output, Batch]:
    student, teacher, batch = seen
    return _with_z_scores(student), _with_z_scores(teacher), batch


def _with_z_scores(output: Output) -> Output:
    if output.topk is not None:
        raise ValueError("standardise = true needs all logits of the teacher, and only its top-k is stored")
    return Output(
        standardised_logits(output.logits) if output.has_logits else None,
        output.features,
        raw=output.raw,
        members=[_with_z_scores(member) for member in output.members],
        views={view: _with_z_scores(seen) for view, seen in output.views.items()},
    )


class _Gathered:
    """The outputs and the batch of all processes, each tensor gathered once, and only where a term reads it."""

    def __init__(self, student: Output, teacher: Output, batch: Batch) -> None:
        self.student, self.teacher, self.batch = student, teacher, batch
        self.known: dict[int, tuple[Tensor, Tensor]] = {}  # with the tensor itself, so that its id stays its own
        self.whole: Batch | None = None
        self.length = None if batch.mask is None else batch.mask.shape[1]
        self.longest: int | None = None  # of all processes, found where a term asks for the batch of all

    def seen_by(self, term: Term) -> tuple[Output, Output, Batch]:
        """Return what a term declares that it reads; of the batch targets, index, mask and its length."""
        own = self.student.taught if term.needs_teacher_logits else self.student
        student = self._output(own, term.student_taps, term.needs_student_logits, term.needs_views)
        teacher = self._output(self.teacher, term.teacher_taps, term.needs_teacher_logits, term.needs_views)
        if self.whole is None:
            # inputs are much to send: in their place stands what no loss survives
            few = Batch(self.batch.inputs).map(lambda t: torch.full((len(t), 1), torch.nan, device=t.device))
            self.whole = replace(self.batch, inputs=few.inputs, views={}, extra={}).map(self._rows)
        return student, teacher, self.whole

    def _output(self, output: Output, taps: Sequence[Any] | None, logits: bool, views: Sequence[str]) -> Output:
        names = output.features if taps is None else map(str, taps)
        return Output(
            self._rows(output.logits) if logits and output.has_logits else None,
            {name: self._rows(output.features[name]) for name in names if name in output.features},
            members=[self._output(member, (), logits, ()) for member in output.members],
            views={v: self._output(output.views[v], taps, logits, ()) for v in views if v in output.views},
        )

    def _padded(self, tensor: Tensor) -> Tensor:
        """Hidden states (B, L, D), maps (B, H, L, L) and the mask (B, L) with as many positions as any process has."""
        if self.length is None:
            return tensor
        if self.longest is None:
            self.longest = group.longest(self.length, tensor.device)
        more = self.longest - self.length
        if tensor.ndim == 4 and tensor.shape[2:] == (self.length, self.length):
            return F.pad(tensor, (0, more, 0, more))
        if tensor.ndim == 3 and tensor.shape[1] == self.length:
            return F.pad(tensor, (0, 0, 0, more))
        return F.pad(tensor, (0, more)) if tensor.ndim == 2 and tensor is self.batch.mask else tensor

    def _rows(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.known:
            self.known[id(tensor)] = tensor, group.gather_rows(self._padded(tensor))
        return self.known[id(tensor)][1]
