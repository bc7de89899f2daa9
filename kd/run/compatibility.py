"""What data, teacher and objective must agree on, before the first batch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd.data.base import LABELS, SPLITS, AdaptedData, refuse_unsharded
from kd.data.text.base import TextModule
from kd.distill.distiller import Distiller
from kd.errors import KdError
from kd.models.positions import positions_of
from kd.parallel import group
from kd.tasks.base import Task

log = logging.getLogger(__name__)


def check(module: Distiller, data: Any, batch_size: int, frozen_norms: bool = False) -> None:
    """Refuse, with one sentence, what the data cannot give or what would be silently wrong.

    ``frozen_norms``: the student's batch norms stay in eval mode for the whole run, as do those of a frozen body.
    """
    _labels(module, data)
    if isinstance(data, AdaptedData) and group.joined():
        for split in SPLITS:
            refuse_unsharded(getattr(data, f"{split}_dataloader")(), split, group.world_size())
    if module.teacher is not None and module.teacher.cache:
        _cache(module.teacher.cached_by, data)
    if isinstance(data, TextModule):
        _positions(module, data)
    module.check_data(data)
    _last_batch(module, data, batch_size, frozen_norms)


def _labels(module: Distiller, data: Any) -> None:
    wanting = module.objective.needs("labels")
    if wanting and data.sizes["labelled"] == 0:
        raise KdError(f"loss.{wanting[0]} needs labels, the training data has none{_entries(data)}")
    if wanting and data.mixup is not None:
        raise KdError(
            f"loss.{wanting[0]} needs labels, and data.mixup = {data.mixup} mixes images of two labels: leave the term "
            "out (loss=[kd]), or set data.mixup=null"
        )


def _entries(data: Any) -> str:
    """Say, of batches of the user's own that are mappings, which entries there are and which would be the labels."""
    example = data.example() if isinstance(data, AdaptedData) else None
    if not isinstance(example, Mapping):
        return ""
    return f": its batches have the entries {', '.join(map(str, example))}, and labels are {' or '.join(LABELS)}"


def _cache(key: str, data: Any) -> None:
    if data.random_view is not None:
        other = " or data.teacher_view=clean" if data.random_view == "data.augment" else ""
        raise KdError(
            f"{key} needs a teacher that sees the same sample in every epoch, {data.random_view} changes it: set "
            f"{key.partition(' ')[0]}=null{other}"
        )


def _positions(module: Distiller, data: TextModule) -> None:
    """Refuse rows that may be longer than a network has positions for."""
    teachers = (
        module.teacher.networks if module.teacher is not None and getattr(data, "for_teacher", data) is data else ()
    )
    (longest,) = data.input_shape
    for side, network in [("student", module.student), *(("teacher", teacher) for teacher in teachers)]:
        most = positions_of(network)
        if most is not None and longest > most:
            key = "max_length" if hasattr(data, "max_length") else "length"
            given = getattr(data, key)
            raise KdError(
                f"data.{key} = {'null' if given is None else given} is not allowed: rows may have {longest} tokens, "
                f"the {side} takes {most}: set data.{key}={most} or less"
            )


def _last_batch(module: Distiller, data: Any, size: int, frozen_norms: bool = False) -> None:
    """Refuse a last batch that is too small: each process needs a row of the last batch, and batch norm two."""
    count, processes = data.sizes["train"], group.world_size()
    if count is None:  # a stream: what it ends with is not known
        return
    if size > count:
        log.warning("recipe.batch_size = %d is more than the %d training samples: an epoch is one step", size, count)
    last = 0 if data.drop_last else count % size
    batch_norm = not frozen_norms and any(
        isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm) for m in module.student.modules()
    )
    if last and batch_norm and last // processes < 2:
        of = f" for {processes} processes" if processes > 1 else ""
        raise KdError(
            f"recipe.batch_size = {size} leaves a last batch of {'one image' if last == 1 else f'{last} images'}{of} "
            f"({count} in all), too few for batch norm: set data.drop_last=true, or another batch size"
        )
    if 0 < last < processes:
        raise KdError(
            f"recipe.batch_size = {size} leaves a last batch of {last} sample(s) ({count} in all), fewer than the "
            f"{processes} processes: set data.drop_last=true, or another batch size"
        )
    short = next((s for s in ("val", "test") if (data.sizes[s] or processes) < processes), None)
    if short:
        raise KdError(f"the {short} split has {data.sizes[short]} sample(s), fewer than the {processes} processes")


def check_accumulation(recipe: Mapping[str, Any], protocol: Mapping[str, Any], data: Any) -> None:
    """Refuse validations that would come between two steps of the optimiser: Lightning counts batches."""
    every, accumulate = protocol["val_every_steps"], recipe["accumulate"]
    if every is None or accumulate == 1:
        return
    loader = data.train_dataloader()
    batches = len(loader) if hasattr(loader, "__len__") else None
    if batches is None or batches % accumulate:
        raise KdError(
            f"protocol.val_every_steps = {every} is not allowed with recipe.accumulate = {accumulate} and "
            f"{'an unknown number of' if batches is None else batches} batches an epoch: the last step of an epoch "
            "would be of fewer batches, use protocol.val_every"
        )


def check_predictions(protocol: Mapping[str, Any], task: Task) -> None:
    """Refuse to keep the answers of a task whose rows are no samples: they are kept by the index of each sample."""
    if protocol["keep_predictions"] and task.row != "sample":
        raise KdError(
            f"protocol.keep_predictions = true is not allowed with {type(task).__name__}: a row is a {task.row}, and "
            "answers are kept by sample"
        )


def check_steps(recipe: dict[str, Any], module: Distiller) -> None:
    """Refuse what Lightning cannot do for a distiller that steps its optimisers itself, two of them for example."""
    if module.automatic_optimization or module.own_optimizers:
        return
    for key, idle in (("gradient_clip", None), ("accumulate", 1)):
        if recipe[key] not in (idle, 0):
            raise KdError(
                f"recipe.{key} = {recipe[key]} is not allowed with {type(module).__name__}, which steps its optimisers "
                f"itself (manual optimisation): set recipe.{key}={'null' if idle is None else idle}, and do it in "
                "its training_step"
            )
