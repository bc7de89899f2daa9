"""The arguments of kd.distill: what is refused before anything runs, what sentences call them, what is put back."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset, IterableDataset

from kd.distill.optimisation import check_factory
from kd.errors import KdError
from kd.tasks.base import Task

log = logging.getLogger(__name__)

OF_THE_COMMAND_LINE = {  # in sentences that the command line shares: what is meant in Python
    "hydra.run.dir": "run_dir",
    "teacher.checkpoint=RUN or model@teacher=NAME": "a teacher",
    "or leave the term out (loss=[ce])": "or leave the term out of loss",
    "set teacher.trust=true if you trust the file, or name the network yourself (model@teacher=NAME)": (
        "give the network"
    ),
    "add model@teacher=NAME": "give the network",
    "a lower recipe.optimizer.lr": "a lower lr of the optimizer",
    "recipe.batch_size": "the loader's batch size",
    "data.drop_last=true": "drop_last=True",
    "teacher.checkpoint": "teacher",
}


def check(given: Mapping[str, Any]) -> None:
    """Refuse arguments of :func:`kd.run.distill.distill`, by name, that are wrong whatever the batches are."""
    for key in ("epochs", "val_every", "accumulate"):
        value = given[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise KdError(f"{key} = {value} is not allowed: it must be a whole number, 1 or more")
    epochs, every = given["epochs"], given["val_every"]
    if epochs % every:
        raise KdError(f"val_every = {every} is not allowed: epochs = {epochs} must be a multiple of it")
    if given["task"] is not None and not isinstance(given["task"], Task):
        raise KdError(
            f"task = {given['task']!r} is not allowed: it must be an object of a class of kd.tasks, such as "
            "kd.tasks.text_classification.TextClassification(), or None"
        )
    check_factory("optimizer", given["optimizer"])
    if not isinstance(given["scheduler"], str):
        check_factory("scheduler", given["scheduler"])
    _check_networks(given["student"], given["teacher"])
    for split in ("train", "val", "test"):
        if split != "test" or given["test"] is not None:
            _check_loader(split, given[split])
    if given["test"] is None and given["run_dir"] is not None:
        raise KdError("test = None is not allowed with a run_dir: what is kept of a run is measured on the test set")


def _check_networks(student: Any, teacher: Any) -> None:
    if not isinstance(student, nn.Module):
        raise KdError(f"student = {student!r} is not allowed: it must be a torch module")
    if teacher is not None and not isinstance(teacher, (nn.Module, str, Path)):
        raise KdError(f"teacher = {teacher!r} is not allowed: it must be a torch module, a run directory, or None")
    if isinstance(teacher, nn.Module) and any(part is student for part in teacher.modules()):
        raise KdError("student and teacher are the same object: give copy.deepcopy(teacher) as one of them")


def _check_loader(split: str, loader: Any) -> None:
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise KdError(f"{split} is a Dataset: wrap it in a torch.utils.data.DataLoader({split}, batch_size=64)")
    if not hasattr(loader, "__iter__"):
        raise KdError(f"{split} = {loader!r} is not allowed: it must be a loader of batches")


def warn_of_one_set(loaders: Mapping[str, Any]) -> None:
    """Warn where two of the splits train, val and test are one loader, or loaders of one data set."""
    sets = {split: getattr(loader, "dataset", loader) for split, loader in loaders.items()}
    for split, other, what in (
        ("val", "train", "the epoch is picked by what the student was trained on"),
        ("test", "train", "its metrics are of what the student was trained on"),
        ("test", "val", "its metrics are of what picked the epoch"),
    ):
        if sets[split] is not None and sets[split] is sets[other]:
            log.warning("%s and %s are one data set: %s", split, other, what)


@contextmanager
def as_it_was(teacher: Any) -> Iterator[None]:
    """Put back, at the end, the modes of a teacher's modules and which of its parameters want gradients."""
    modules = list(teacher.modules()) if isinstance(teacher, nn.Module) else []
    modes = [(module, module.training) for module in modules]
    wanted = [(p, p.requires_grad) for module in modules for p in module.parameters(recurse=False)]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, gradient in wanted:
            parameter.requires_grad_(gradient)


@contextmanager
def named(function: Callable[..., Any]) -> Iterator[None]:
    """Call the keys of a config by the arguments of a function in the ``KdError`` that is raised."""
    try:
        yield
    except KdError as error:
        text = str(error)
        for key, argument in OF_THE_COMMAND_LINE.items():
            text = text.replace(key, argument)
        arguments = "|".join(inspect.signature(function).parameters)
        text = re.sub(rf"\b(?:recipe|protocol|hardware|distiller)\.({arguments})\b", r"\1", text)
        error.args = (text.replace("=null", "=None"),)
        raise
