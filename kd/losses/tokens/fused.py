"""Fused linear loss: Hsu et al., Liger Kernel: Efficient Triton Kernels for LLM Training, 2024, arXiv 2410.10989."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd.losses.base import UNLABELLED, Fused, Output, TopK, at_least_float32, check_choice, check_temperature
from kd.losses.tokens._inplace import DIVERGENCES, Pool, cross_entropy, log_softmax, topk_kl
from kd.losses.tokens._liger import Liger, Result, computes, kernel_pass
from kd.losses.tokens._topk import teacher_topk

__all__ = ["fused_losses"]

CHUNK = 128  # rows at a time, of a vocabulary of SMALL classes or more
SMALL = 32_768
BLOCK = 1024  # rows of a weight that stay in a CPU's cache: of few hidden states the product takes a quarter less time
KINDS = ("cross_entropy", *DIVERGENCES, "topk_kl")


class Projection(NamedTuple):
    """From hidden states (rows, width) to logits (rows, classes): z = scale · (hidden @ weight.T + bias).

    ``weight`` (classes, width), ``bias`` (classes,); with a ``softcap`` the logits are softcap · tanh(z / softcap).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


class TeacherRows(NamedTuple):
    """A teacher in one of three ways: ``hidden`` (rows, width) with ``projection``, ``logits``, or ``topk``."""

    hidden: Tensor | None = None
    projection: Projection | None = None
    logits: Tensor | None = None
    topk: TopK | None = None


def fused_losses(
    student_hidden: Tensor,
    student_projection: Projection,
    teacher: TeacherRows,
    targets: Tensor | None,
    parts: Sequence[Fused],
    factors: Sequence[float | Tensor],
    chunk: int | None = None,
    liger: Liger | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Compute losses of logits that are never there as a whole: the value of each, and Σ factor · value.

    ``student_hidden`` (rows, width); ``targets`` (rows,) int64, ``UNLABELLED`` where there is none; ``parts``: the
    losses, each with a factor, a number or 0-d; ``chunk``: rows of which the logits are made at a time, 1 or more;
    None: 128, of a small vocabulary as many as are 16 MiB. Each value is that of the function of its loss
    (:func:`~kd.losses.logits.kd.kl_divergence` …): T² · mean over the rows, of the cross-entropy over the labelled
    rows. Only the sum has a gradient: it is computed here, chunk by chunk, and handed over in the backward pass, which
    can go through it once. The teacher has none. ``ValueError`` for a bad setting, or where the classes differ.

    Memory: classes · width for the gradient of the weight, rows · width for that of the hidden states, and three
    buffers of chunk · classes for a KL (four for a mixture, or beside a cross-entropy, one for ``topk_kl`` with a
    stored top-k), all in float32, or float64 if the hidden states are. Half-precision matrix products stay in half
    precision, under autocast as well; everything else is in float32.

    The paper's FusedLinearCrossEntropy and its relatives are Triton kernels in chunks of many rows; here is the same
    idea in torch's own operations, for several losses at once. With ``liger``, and no ``chunk``, those kernels compute
    it on a GPU where they can and are faster.
    """
    weight, bias, scale, softcap = student_projection
    liger = liger if chunk is None else None  # the size of its chunks is its own
    if chunk is None:
        chunk = CHUNK * max(1, SMALL // weight.shape[0])
    if chunk < 1 or chunk != int(chunk):
        raise ValueError(f"chunk = {chunk} is not allowed: it must be a whole number above 0")
    if not parts or len(parts) != len(factors):
        raise ValueError(f"there are {len(parts)} parts and {len(factors)} factors: it must be one factor each")
    for part in parts:
        check_choice("kind", part.kind, KINDS)
        check_temperature(part.temperature)
        if part.kind == "cross_entropy" and targets is None:
            raise ValueError("a cross-entropy needs targets, and there are none")
    _check_classes(weight.shape[0], teacher)
    kind = student_hidden.device.type
    half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    job = Job(teacher, targets, parts, factors, int(chunk), scale, softcap, half, torch.is_grad_enabled(), liger)
    total, *values = _Fused.apply(student_hidden, weight, bias, job)
    return values, total


def _check_classes(classes: int, teacher: TeacherRows) -> None:
    known = {
        "weight": None if teacher.projection is None else teacher.projection.weight.shape[0],
        "logits": None if teacher.logits is None else teacher.logits.shape[-1],
        "top-k": None if teacher.topk is None else teacher.topk.classes,
    }
    for what, found in known.items():
        if found not in (None, classes):
            raise ValueError(f"the student's weight is for {classes} classes, the teacher's {what} for {found}")


class Job(NamedTuple):
    """All but the tensors that have a gradient. ``half``: what autocast computes products in, None without it."""

    teacher: TeacherRows
    targets: Tensor | None
    parts: Sequence[Fused]
    factors: Sequence[float | Tensor]
    chunk: int
    scale: float
    softcap: float | None
    half: torch.dtype | None
    differentiated: bool
    liger: Liger | None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> tuple[Tensor, ...]:
        wanted = [bool(need) and job.differentiated for need in ctx.needs_input_grad[:3]]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        with torch.autocast(hidden.device.type, enabled=False):
            given = hidden, Projection(weight, bias, job.scale, job.softcap), job, wanted
            if job.liger is not None and computes(*given):
                with torch.cuda.device_of(hidden):  # Triton runs on the current one
                    total, values, ctx.gradients = job.liger(partial(_plain_pass, *given), partial(kernel_pass, *given))
            else:
                total, values, ctx.gradients = _plain_pass(*given)
        ctx.mark_non_differentiable(*values)
        return (total, *values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # no second reference: the parameter takes the tensor itself
        if gradients is None:
            raise RuntimeError("a fused loss has its gradient from the forward pass: backward goes through it once")
        # the factor in float32 first: with a scaled half-precision loss it is what keeps the gradient from being 0
        scaled = [g if g is None else g.mul_(outer).to(d) for g, d in zip(gradients, ctx.dtypes, strict=True)]
        return (*scaled, None)


def _plain_pass(hidden: Tensor, projection: Projection, job: Job, wanted: list[bool]) -> Result:
    return _Pass(hidden, projection, job, wanted).run()


class _Pass:
    """One pass over the chunks."""

    def __init__(self, hidden: Tensor, projection: Projection, job: Job, wanted: list[bool]) -> None:
        self.hidden, self.job = hidden, job
        self.student, self.teacher = _Projected(hidden, projection, job.half), None
        known = job.teacher
        if known.hidden is not None and known.projection is not None:
            self.teacher = _Projected(known.hidden, known.projection, job.half)
        rows, self.classes = len(hidden), projection.weight.shape[0]
        dtype = at_least_float32(hidden[:0]).dtype
        self.pool = Pool(min(job.chunk, max(1, rows)), self.classes, dtype, hidden.device)
        self.values = torch.zeros(len(job.parts), rows, dtype=dtype, device=hidden.device)
        shapes = [hidden.shape, projection.weight.shape, (self.classes,)]
        self.gradients = [
            torch.zeros(shape, dtype=dtype, device=hidden.device) if want else None
            for shape, want in zip(shapes, wanted, strict=True)
        ]
        self.labelled = None if job.targets is None else (job.targets != UNLABELLED).sum().clamp(min=1).to(dtype)
        # those without a teacher first: its logits then find the student's buffer free
        self.order = sorted(range(len(job.parts)), key=lambda i: job.parts[i].kind != "cross_entropy")
        self.topk: dict[int, tuple[Tensor, Tensor]] = {}
        if known.topk is not None:  # k numbers a row: made at once
            of_k = [i for i in self.order if job.parts[i].kind == "topk_kl"]
            self.topk = {
                i: teacher_topk(Output(topk=known.topk), job.parts[i].k, job.parts[i].temperature) for i in of_k
            }

    @torch.no_grad()
    def run(self) -> Result:
        """Return the sum, the values, and the gradients of hidden states, weight and bias."""
        count = max(1, len(self.hidden))
        for start in range(0, len(self.hidden), self.job.chunk):
            rows = slice(start, min(start + self.job.chunk, len(self.hidden)))
            self.pool.rows = rows.stop - rows.start
            gradient = self._chunk(rows)
            self.student.add_gradients(gradient, rows, self.gradients)
            self.pool.give(gradient)
        for found in self.gradients:
            if found is not None:
                found.div_(count)  # at the end: of a sum nothing is too small for half precision
        values = []
        for part, rows_of in zip(self.job.parts, self.values, strict=True):
            hard = part.kind == "cross_entropy"
            values.append(rows_of.sum() / self.labelled if hard else part.temperature**2 * rows_of.sum() / count)
        total = self.values.new_zeros(())
        for factor, value in zip(self.job.factors, values, strict=True):
            total += factor * value
        return total, values, self.gradients

    def _chunk(self, rows: slice) -> Tensor:
        """Fill in the values of some rows; the gradient by the student's logits, times the number of all rows."""
        scale, softcap = self.job.scale, self.job.softcap
        logits = self.student.logits(rows, self.pool)
        total: Tensor | None = None
        for place, number in enumerate(self.order):
            part = self.job.parts[number]
            last = place == len(self.order) - 1 and softcap is None  # of a cap the gradient needs the logits
            self.values[number, rows], gradient = self._part(number, part, logits, rows, last)
            gradient.mul_(self._outer(part) * self.job.factors[number])
            total = gradient if total is None else total.add_(gradient)
            if gradient is not total:
                self.pool.give(gradient)
        assert total is not None
        if softcap is not None:
            total.mul_(logits.div_(softcap).square_().neg_().add_(1))  # 1 − tanh²
            self.pool.give(logits)
        return total if scale == 1.0 else total.mul_(scale)

    def _outer(self, part: Fused) -> Tensor | float:
        """Return what a row's gradient is multiplied by, times the number of rows."""
        if part.kind != "cross_entropy":
            return part.temperature  # T² of the loss, 1 / T of the logits
        assert self.labelled is not None
        return len(self.hidden) / self.labelled

    def _part(self, number: int, part: Fused, logits: Tensor, rows: slice, last: bool) -> tuple[Tensor, Tensor]:
        pool = self.pool
        if part.kind == "cross_entropy":
            assert self.job.targets is not None
            return cross_entropy(log_softmax(logits, 1.0, pool, last), self.job.targets[rows], part.share)
        if part.kind == "topk_kl":
            log_probs, ids = self._topk_of(number, part, rows)
            scaled = logits if last else pool.take()
            torch.mul(logits, 1 / part.temperature, out=scaled)
            return topk_kl(scaled, log_probs, ids, part.form)
        log_s = log_softmax(logits, part.temperature, pool, last)
        log_t = log_softmax(self._of_teacher(rows), part.temperature, pool, last=True)
        return DIVERGENCES[part.kind](log_s, log_t, part.share, pool)

    def _topk_of(self, number: int, part: Fused, rows: slice) -> tuple[Tensor, Tensor]:
        if number in self.topk:
            log_probs, ids = self.topk[number]
            return log_probs[rows].to(self.values.dtype), ids[rows]
        logits = self._of_teacher(rows)
        found = teacher_topk(Output(logits), part.k, part.temperature)
        self.pool.give(logits)
        return found

    def _of_teacher(self, rows: slice) -> Tensor:
        """Return the teacher's logits of some rows, in a buffer."""
        if self.teacher is not None:
            return self.teacher.logits(rows, self.pool)
        known = self.job.teacher
        if known.logits is not None:
            return self.pool.take().copy_(known.logits[rows])
        if known.topk is None:
            raise ValueError("there are no logits of the teacher, nor what they are made from")
        rests = {temperature: rest[rows] for temperature, rest in known.topk.log_rests.items()}
        few = TopK(known.topk.ids[rows], known.topk.log_probs[rows], self.classes, rests)
        return self.pool.take().copy_(few.dense())


class _Projected:
    """Hidden states and a projection, in the precision that their product is computed in."""

    def __init__(self, hidden: Tensor, projection: Projection, half: torch.dtype | None) -> None:
        self.dtype = half or projection.weight.dtype
        self.projection, self.hidden = projection, hidden
        self.weight = projection.weight.to(self.dtype)
        self.bias = None if projection.bias is None else projection.bias.to(self.dtype)
        self.product: Tensor | None = None

    def logits(self, rows: slice, pool: Pool) -> Tensor:
        """Compute the logits of some rows, in a buffer."""
        made = pool.take()
        exact = self.dtype == made.dtype
        target = made if exact else torch.empty_like(made, dtype=self.dtype)
        some = self.hidden[rows].to(self.dtype)
        classes = self.weight.shape[0]
        step = BLOCK if some.device.type == "cpu" else classes
        for start in range(0, classes, step):
            block = slice(start, start + step)
            if self.bias is None:
                torch.mm(some, self.weight[block].T, out=target[:, block])
            else:
                torch.addmm(self.bias[block], some, self.weight[block].T, out=target[:, block])
        if not exact:
            made.copy_(target)
        _, _, scale, softcap = self.projection
        if scale != 1.0:
            made.mul_(scale)
        return made if softcap is None else made.div_(softcap).tanh_().mul_(softcap)

    def add_gradients(self, outer: Tensor, rows: slice, gradients: Sequence[Tensor | None]) -> None:
        """Add what the gradient ``outer`` by the logits makes of hidden states, weight and bias."""
        of_hidden, of_weight, of_bias = gradients
        if of_bias is not None:
            of_bias.add_(outer.sum(0))
        outer = outer.to(self.dtype)
        if of_hidden is not None and of_hidden.dtype == self.dtype:
            torch.mm(outer, self.weight, out=of_hidden[rows])
        elif of_hidden is not None:
            of_hidden[rows] = (outer @ self.weight).to(of_hidden.dtype)
        some = self.hidden[rows].to(self.dtype)
        if of_weight is not None and of_weight.dtype == self.dtype:
            of_weight.addmm_(outer.T, some)
        elif of_weight is not None:
            self.product = self.product if self.product is not None else torch.empty_like(of_weight, dtype=self.dtype)
            of_weight.add_(torch.mm(outer.T, some, out=self.product))
