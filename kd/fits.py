"""What data, teacher and objective must agree on, before the first batch."""

from __future__ import annotations

from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from kd.distiller import Distiller
from kd.errors import KdError


def check(module: Distiller, data: Any, batch_size: int) -> None:
    """Refuse, with one sentence, what the data cannot give or what would be silently wrong."""
    _labels(module, data)
    if module.teacher is not None and module.teacher.cache:
        _cache(module, data)
    count = data.sizes["train"]
    batch_norm = any(isinstance(m, _BatchNorm) for m in module.student.modules())
    if count % batch_size == 1 and not data.drop_last and batch_norm:
        raise KdError(
            f"recipe.batch_size = {batch_size} leaves a last batch of one image ({count} in all), too few "
            "for batch norm: set data.drop_last=true, or another batch size"
        )


def _labels(module: Distiller, data: Any) -> None:
    wanting = module.objective.needs("labels")
    if wanting and data.sizes["labelled"] == 0:
        raise KdError(f"loss.{wanting[0]} needs labels, the training data has none")
    if wanting and data.mixup is not None:
        raise KdError(
            f"loss.{wanting[0]} needs labels, and data.mixup = {data.mixup} mixes images of two labels: leave the term "
            "out (loss=[kd]), or set data.mixup=null"
        )


def _cache(module: Distiller, data: Any) -> None:
    tapping = [name for name, term in module.objective.items() if term.teacher_taps is None or len(term.teacher_taps)]
    if tapping:
        raise KdError(
            f"teacher.cache = true keeps the teacher's logits only, loss.{tapping[0]} reads its intermediate tensors: "
            "set teacher.cache=null"
        )
    if data.random_view is not None:
        other = " or data.teacher_view=clean" if data.random_view == "data.augment" else ""
        raise KdError(
            f"teacher.cache = true needs a teacher that sees the same image in every epoch, {data.random_view} changes "
            f"it: set teacher.cache=null{other}"
        )
