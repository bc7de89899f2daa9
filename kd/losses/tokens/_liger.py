"""Fused losses by the Triton kernels of Liger (liger-kernel), on a GPU where they are installed and faster.

Its fused linear JSD has β as Eq. 1 of GKD does, a mean over the rows and no T²; its fused linear cross-entropy makes
the student's logits, and a gradient of its weight, a second time. Both take chunks of as many logits as there are
hidden states, several buffers of them: more memory than the plain pass. Not its ``chunked_loss``: no Triton, and fewer
chunks than its chunk size says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kd.losses.base import UNLABELLED, Fused, at_least_float32

if TYPE_CHECKING:
    from kd.losses.tokens.fused import Job, Projection

log = logging.getLogger(__name__)

REPEATS = 3
NEAR = 0.02  # relative: half precision is nearer, another formula is not
Result = tuple[Tensor, list[Tensor], list[Tensor | None]]  # sum, values; gradients of hidden states, weight and bias


class Liger:
    """Whether Liger's kernels take the place of the plain pass: measured once, on the first batch that both compute.

    ``used``: None until then. Where only deterministic algorithms are allowed they are not: a choice by time is none.
    """

    def __init__(self) -> None:
        self.used: bool | None = None

    def __call__(self, plain: Callable[[], Result], kernels: Callable[[], Result]) -> Result:
        """Return the result of the pass that is used."""
        if self.used is None:
            warns = torch.is_deterministic_algorithms_warn_only_enabled()
            strict = torch.are_deterministic_algorithms_enabled() and not warns
            self.used = not strict and find_spec("liger_kernel") is not None and _better(plain, kernels)
        return (kernels if self.used else plain)()


def computes(hidden: Tensor, projection: Projection, job: Job, wanted: Sequence[bool]) -> bool:
    """Tell whether Liger has all of it, on a GPU: one KL or JSD, beside it a cross-entropy or none, with gradients.

    Its fused JSD has no bias, factor or soft cap, and is in float32. float16 is left out: it divides the gradient by
    the number of rows before half precision, where little of it is above 0.
    """
    if not hidden.is_cuda or not len(hidden) or not any(wanted):
        return False
    betas = [_beta(part) for part in job.parts if part.kind != "cross_entropy"]
    if len(betas) != 1 or betas[0] is None or len(job.parts) > 2:
        return False
    teacher, known = job.teacher.hidden, job.teacher.projection
    if teacher is None or known is None or not hidden.device == teacher.device == known.weight.device:
        return False
    plain = all(p.bias is None and p.scale == 1.0 and p.softcap is None for p in (projection, known))
    return plain and (job.half or projection.weight.dtype) in (torch.float32, torch.bfloat16)


def kernel_pass(hidden: Tensor, projection: Projection, job: Job, wanted: Sequence[bool]) -> Result:
    """Compute what the plain pass computes, of Liger by two functions alone: no module of anybody is replaced."""
    from liger_kernel.ops import fused_linear_cross_entropy_forward, fused_linear_jsd_forward  # an extra, and start-up

    assert job.teacher.hidden is not None
    assert job.teacher.projection is not None
    own, other = projection.weight, job.teacher.projection.weight
    dtypes = job.half or own.dtype, job.half or other.dtype
    # copies for Liger, which asks each tensor whether its gradient is wanted
    student = hidden.detach().to(dtypes[0]).requires_grad_(), own.detach().to(dtypes[0]).requires_grad_(wanted[1])
    teacher = job.teacher.hidden.to(dtypes[1]), other.to(dtypes[1])
    values: list[Tensor] = []
    gradients: list[Tensor | None] = [None, None, None]
    total = torch.zeros((), device=hidden.device)
    for part, factor in zip(job.parts, job.factors, strict=True):
        beta, size = _beta(part), 1.0
        if beta is None:
            loss, _, _, _, *found, _ = fused_linear_cross_entropy_forward(
                *student,
                job.targets,
                ignore_index=UNLABELLED,
                label_smoothing=part.share,
                accum_dtype=torch.float32,
            )
        else:
            size = part.temperature**2
            loss, *found = fused_linear_jsd_forward(
                *student,
                *teacher,
                shift_labels=None,
                jsd_beta=beta,
                ignore_index=UNLABELLED,
                has_label=False,
                temperature=part.temperature,
                accum_dtype=torch.float32,
            )
        values.append(size * loss)
        total = total + factor * values[-1]
        for place, gradient in enumerate(found):
            if wanted[place]:
                more, before = at_least_float32(gradient).mul_(size * factor), gradients[place]
                gradients[place] = more if before is None else before.add_(more)
    return total, values, gradients


def _beta(part: Fused) -> float | None:
    return {"forward_kl": 0.0, "reverse_kl": 1.0, "js": float(part.share)}.get(part.kind)


def _better(plain: Callable[[], Result], kernels: Callable[[], Result]) -> bool:
    """Tell whether Liger's kernels run here, give the same numbers and take less time; the log has the reason."""
    try:
        expected, found = _numbers(plain()), _numbers(kernels())  # the first call compiles them
        same = torch.allclose(found, expected, rtol=NEAR, atol=1e-6)
        own, theirs = _milliseconds(plain, kernels) if same else (0.0, 0.0)
    except Exception as error:  # an old version, a GPU that Triton compiles nothing for, too little memory
        log.warning("Liger's kernels are not used, they do not run here: %s: %s", type(error).__name__, error)
        return False
    if not same:
        log.warning("Liger's kernels are not used: losses and gradients %s, not %s", found.tolist(), expected.tolist())
        return False
    used = theirs < own
    log.info("Liger's kernels are %sused: %.2f ms a batch, the plain pass %.2f", "" if used else "not ", theirs, own)
    return used


def _numbers(result: Result) -> Tensor:
    """Return the values and the norms of the gradients, all that is kept of a result beside another one."""
    _, values, gradients = result
    return torch.stack([*values, *(g.norm() for g in gradients if g is not None)])


def _milliseconds(*passes: Callable[[], Result]) -> list[float]:
    """Time each pass on the GPU, in turn; the shortest time of each."""
    times: list[list[float]] = [[] for _ in passes]
    for _ in range(REPEATS):
        for known, one in zip(times, passes, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            one()
            end.record()
            end.synchronize()
            known.append(begin.elapsed_time(end))
    return [min(known) for known in times]
