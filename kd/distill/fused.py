"""From the terms of an objective to one pass over chunks of rows, where no term needs all logits of a vocabulary.

A language model gives hidden states and its output projection (:class:`~kd.losses.base.Output`). If every term that
reads logits says what computes the same from these (:meth:`~kd.losses.base.Term.fused`), their sum and its gradient
come from :func:`~kd.losses.tokens.fused.fused_losses`. Otherwise the logits are made, as ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd.losses.base import Batch, Fused, Output, Term
from kd.losses.tokens.fused import Liger, Projection, TeacherRows, fused_losses
from kd.tasks.output_projection import Head, linear_of


def from_hidden(
    terms: Sequence[tuple[str, Term]],
    student: Output,
    teacher: Output,
    batch: Batch,
    factors: Mapping[str, float | Tensor],
    chunk: int | None = None,
    liger: Liger | None = None,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Compute the terms that read logits from hidden states: name → value, and in a list Σ factor · value.

    ``chunk``, ``liger``: see :class:`~kd.distill.objective.Objective`. Both returned are empty where a term needs the
    logits themselves.
    """
    readers = {name: term for name, term in terms if term.needs_student_logits or term.needs_teacher_logits}
    forms = {name: fused for name, term in readers.items() if (fused := form_of(term)) is not None}
    if chunk == 0 or not readers or forms.keys() != readers.keys() or any(t.needs_input_gradient for _, t in terms):
        return {}, []
    hidden, projection = student.hidden, projection_of(student)
    if hidden is None or projection is None or student.made_logits is not None:
        return {}, []
    taught = any(form.kind != "cross_entropy" for form in forms.values())
    rows = rows_of(teacher, len(hidden), projection.weight.shape[0]) if taught else TeacherRows()
    labelled = any(form.kind == "cross_entropy" for form in forms.values())
    if rows is None or (labelled and not _classes_of(batch.targets, len(hidden))):
        return {}, []
    targets = batch.targets if labelled else None
    parts = list(forms.values())
    values, total = fused_losses(hidden, projection, rows, targets, parts, [factors[n] for n in forms], chunk, liger)
    return dict(zip(forms, values, strict=True)), [total]


def form_of(term: Term) -> Fused | None:
    """Return what computes the term from hidden states, where the class that defines its ``forward`` says so."""
    if "forward" in vars(term) or _hooked(term) or term.over not in ("rows", "labelled"):
        return None
    owner = next(kind for kind in type(term).__mro__ if "fused" in vars(kind) or "forward" in vars(kind))
    return term.fused() if "fused" in vars(owner) else None


def projection_of(output: Output) -> Projection | None:
    """Return the output projection, where it is a plain linear layer with at most a factor and a soft cap behind it."""
    head = output.head
    if (layer := linear_of(head)) is None:
        return None
    weight = layer.weight
    sharded = hasattr(weight, "full_tensor")
    if sharded or _hooked(layer) or output.hidden is None or output.hidden.device != weight.device:
        return None
    behind = (head.scale, head.softcap) if isinstance(head, Head) else ()
    return Projection(weight, layer.bias, *behind)


def rows_of(teacher: Output, rows: int, classes: int) -> TeacherRows | None:
    """Return what is there of the teacher: logits that are made already, else hidden states, else a top-k.

    None where there is nothing, where it has a gradient, or is of another size: what compares them says so then.
    """
    logits, topk, hidden, projection = teacher.made_logits, teacher.topk, None, None
    if logits is None and teacher.hidden is not None and teacher.head is not None:
        hidden, projection = teacher.hidden, projection_of(teacher)
        if projection is None:
            return None
    known = [t for t in (logits, hidden, None if topk is None else topk.log_probs) if t is not None]
    sizes = [logits.shape[-1]] if logits is not None else []
    sizes += [projection.weight.shape[0]] if projection is not None else []
    sizes += [topk.classes] if topk is not None else []
    moving = [*known, *([] if projection is None else projection[:2])]
    fits = all(len(t) == rows for t in known) and all(size == classes for size in sizes)
    if not known or not fits or any(t is not None and t.requires_grad for t in moving):
        return None
    return TeacherRows(hidden, projection, logits, topk)


def _classes_of(targets: Tensor | None, rows: int) -> bool:
    """Tell whether each row has one class, or none, for a target; not shares of them."""
    return targets is not None and targets.dtype == torch.int64 and targets.shape == (rows,)


def _hooked(module: nn.Module) -> bool:
    """Tell whether somebody reads or changes what goes through a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
