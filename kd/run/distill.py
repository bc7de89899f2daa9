"""The Python API: distil any network on any loaders, without a config; the run is that of ``kd train``."""

from __future__ import annotations

import hashlib
import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from kd.config import schema
from kd.data.base import SPLITS, AdaptedData, Loaders
from kd.distill.answers import Answers
from kd.distill.distiller import DEFAULT_OPTIMIZER, Distiller, MakeOptimizer, MakeScheduler
from kd.distill.teacher import Teacher
from kd.errors import KdError, did_you_mean
from kd.run import build, compatibility, finish, loss_nodes, networks, python_arguments, trainer
from kd.run.train import run_from_python
from kd.tasks.base import Task
from kd.tasks.classification import Classification

FACTS = ("class_names", "input_shape", "mean", "std", "train_index", "train_targets", "split_facts")
ALONE, TAUGHT = {"ce": 1.0}, {"ce": 0.1, "kd": 0.9}  # the losses without a word: those of the CIFAR-100 tables


@dataclass(frozen=True)
class Result:
    """What :func:`distill` came to.

    ``student``: the selected network, in eval mode; ``record``: as in ``result.json``; ``history``: one mapping an
    epoch, ``train/…`` and ``val/…``; ``summary``: the last lines of a run, which ``print(result)`` shows; ``run_dir``.
    """

    student: nn.Module
    record: dict[str, Any]
    history: list[dict[str, float]]
    summary: str
    run_dir: Path | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The test metrics of the selected student; empty without a test set."""
        return self.record["student"]["selected"].get("test", {})

    def __str__(self) -> str:
        return self.summary


def distill(
    student: nn.Module,
    teacher: nn.Module | Answers | str | Path | None,
    train: Any,
    val: Any,
    test: Any = None,
    *,
    epochs: int,
    loss: Mapping[str, Any] | None = None,
    optimizer: MakeOptimizer | None = None,
    scheduler: MakeScheduler | str | None = "cosine",
    scheduler_interval: str = "epoch",
    gradient_clip: float | None = None,
    accumulate: int = 1,
    task: Task | None = None,
    num_classes: int | None = None,
    distiller: type[Distiller] = Distiller,
    peers: Mapping[str, nn.Module] | None = None,
    monitor: str | None = None,
    val_every: int = 1,
    seed: int = 0,
    accelerator: str = "auto",
    precision: str = "32-true",
    callbacks: Sequence[L.Callback] = (),
    log_every: int = 50,
    run_dir: str | Path | None = None,
    name: str = "distill",
    verbose: bool = True,
    **facts: Any,
) -> Result:
    """Train ``student`` on what ``teacher`` answers (None: on the labels alone), in this process, on one device.

    Validation picks the epoch, the test set is read once, and the student is left with the selected weights. The
    teacher may be in any mode, on any device, with or without gradients: it is frozen and in eval mode until this
    returns, and then in those that it had. Its weights are used as they are: of random ones a warning says that its
    accuracy is near chance. A path is the run directory of ``kd train``, whose selected student teaches.

    ``train``, ``val``, ``test``: any loaders; ``test`` may be None, without a ``run_dir``. A batch is ``(inputs,
    targets)``, ``(inputs, targets, index)``, a mapping with ``labels`` whose other entries are the inputs, or a
    :class:`~kd.losses.base.Batch`. ``epochs``: passes over the training set.

    ``loss``: name → a weight, a mapping of options, a :class:`~kd.losses.base.Term`, or a function of (student's
    output, teacher's output, batch) that returns a scalar (:func:`kd.run.loss_nodes.complete`); None: ``{"ce": 0.1,
    "kd": 0.9}`` at T = 4, without a teacher ``{"ce": 1}``. ``optimizer``: a function of the parameters,
    ``functools.partial(torch.optim.SGD, lr=0.05)``; None: AdamW, learning rate 1e-3, weight decay 0.01. ``scheduler``:
    a function of the optimiser, "cosine" (to zero over all epochs, or over all steps if that is the
    ``scheduler_interval``), None: a constant rate. ``gradient_clip``: largest norm; ``accumulate``: batches a step.

    ``task``: None is classification. ``num_classes``: None is as many as the student answers. ``distiller``, ``peers``:
    a subclass that owns the loop, and its further networks. ``monitor``: ``val/METRIC`` that selects; None: the task's
    first. ``val_every``: epochs between validations. ``log_every``: steps between two readings of the losses.
    ``callbacks``: Lightning's. ``facts``: what is known of the data, attributes of :class:`~kd.data.base.RunData`
    (``class_names``, ``train_index``, ``train_targets``).

    ``verbose``: print what ``kd train`` prints: an opening line, a line an epoch, the metrics; False: warnings alone.

    ``run_dir``: None: nothing is written; else ``result.json``, ``config.yaml``, ``metrics.csv``, ``train.log`` and the
    students' weights, as ``kd train`` writes them, but no checkpoint: such a run is not resumed.

    Raises ``KdError``, before the first epoch, for what does not fit.
    """
    unknown = [key for key in facts if key not in FACTS]
    if unknown:
        known = [*inspect.signature(distill).parameters, *FACTS]
        raise KdError(f"there is no option {unknown[0]}{did_you_mean(unknown[0], known)}")
    loss = loss if loss is not None else ALONE if teacher is None else TAUGHT
    nodes = loss_nodes.complete(loss)
    python_arguments.check(locals())
    where = Path(run_dir) if run_dir is not None else None
    config = _config(locals(), nodes)
    found: dict[str, Any] = {}

    def work() -> dict[str, Any]:
        trainer.begin(config)
        python_arguments.warn_of_one_set({"train": train, "val": val, "test": test})
        data = AdaptedData(Loaders(train, val, test, num_classes=num_classes, **facts), "the loader")
        batch = next(iter(data.train_dataloader()))
        config["recipe"]["batch_size"] = len(batch)
        data.drop_last = bool(getattr(train, "drop_last", False))
        made_task = task if task is not None else Classification()
        module = distiller(
            *(student, _teacher(teacher, data, made_task), build.objective({"loss": nodes}), made_task, num_classes),
            optimizer=optimizer or DEFAULT_OPTIMIZER,
            scheduler=_scheduler(scheduler, scheduler_interval, epochs, train, accumulate),
            scheduler_interval=scheduler_interval,
            seed=seed,
            log_every=log_every,
            **build.taken_by(distiller, dict(peers or {}), config["recipe"]),
        )
        compatibility.check(module, data, len(batch))
        compatibility.check_steps(config["recipe"], module)
        module.prepare(batch, data.train_index, data.train_targets, epochs=epochs)
        build.load_terms({"loss": nodes}, module)
        if data.num_classes is None and module.num_classes is not None:
            data.num_classes = module.num_classes
            data.class_names = [str(number) for number in range(module.num_classes)]
        if not module.trainable():
            raise KdError("the student has no trainable parameters")
        curves = _Curves()
        further = [curves, *callbacks]
        outcome = trainer.carry_out(config, where, data, module, further=further, resumable=False, bar=verbose)
        found.update(student=module.deployed.eval(), history=curves.epochs, task=made_task)
        return outcome

    with warnings.catch_warnings(), python_arguments.as_it_was(teacher), python_arguments.named(distill):
        record = run_from_python(config, where, work, verbose)
    summary = finish.summary(record, found["task"], where)
    return Result(found["student"], record, found["history"], summary, where)


class _Curves(L.Callback):
    """The numbers of each epoch, after its validation."""

    observes_only = True  # changes no weights: the last student is not validated again

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        epoch = trainer.current_epoch
        self.epochs.append({"epoch": epoch, **module.epoch_means, **module.history.get(epoch, {})})


def _teacher(given: nn.Module | Answers | str | Path | None, data: AdaptedData, task: Task) -> Answers | None:
    if isinstance(given, (str, Path)):
        section = {**vars(schema.Teacher()), "checkpoint": str(given)}
        return networks.teacher({"student": {"model": None}, "teacher": section}, data, task)
    return given if given is None or isinstance(given, Answers) else Teacher([given], task=task)


def _scheduler(
    given: MakeScheduler | str | None, interval: str, epochs: int, loader: Any, accumulate: int
) -> MakeScheduler | None:
    if not isinstance(given, str):
        return given
    if given != "cosine":
        raise KdError(f"scheduler = {given} is not allowed: it must be a function of the optimiser, 'cosine' or None")
    length = epochs
    if interval == "step":
        if not hasattr(loader, "__len__"):
            raise KdError("scheduler = cosine by steps needs a training loader with a length")
        length = epochs * math.ceil(len(loader) / accumulate)
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=length)


def _config(given: Mapping[str, Any], nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Make the sections of a config, as far as a run reads and records them; of objects what tells them apart."""
    optimizer = {"factory": loss_nodes.plain(given["optimizer"] or DEFAULT_OPTIMIZER)}
    teacher = given["teacher"]
    path = str(teacher) if isinstance(teacher, (str, Path)) else None
    return {
        **{key: given[key] for key in ("name", "seed")},
        **{"tags": [], "notes": "", "networks": {}, "logger": {}, "paths": {}, "resume": None},
        "student": {"model": None, "checkpoint": None, "network": _network(given["student"])},
        "teacher": {"model": None, "checkpoint": path, "network": None if path else _network(teacher)},
        "loss": loss_nodes.described(nodes),
        "task": _network(given["task"]),
        "data": {split: _loader(given[split]) for split in SPLITS},
        "distiller": {"log_every": given["log_every"]},
        "recipe": {
            **{key: given[key] for key in ("epochs", "scheduler_interval", "gradient_clip", "accumulate")},
            **{"optimizer": optimizer, "scheduler": loss_nodes.plain(given["scheduler"]), "batch_size": None},
        },
        "protocol": {**vars(schema.Protocol()), "monitor": given["monitor"], "val_every": given["val_every"]},
        "hardware": {
            **{"accelerator": given["accelerator"], "precision": given["precision"], "devices": 1},
            **{"deterministic": "warn", "threads": None, "trainer": {}},
            "keep_memory": False,  # the process is the caller's
        },
    }


def _network(given: Any) -> dict[str, Any]:
    """Name the class of a network or task, and a digest of its layers: other weights are another seed's."""
    found: dict[str, Any] = {"class": f"{type(given).__module__}.{type(given).__qualname__}"}
    if isinstance(given, nn.Module):
        layers = [*map(str, given.named_modules()), *(f"{n} {tuple(p.shape)}" for n, p in given.named_parameters())]
        found["layers"] = hashlib.sha256("\n".join(layers).encode()).hexdigest()[:12]
    return found


def _loader(given: Any) -> dict[str, Any]:
    """Name the class of a loader's data set, its samples and its batch size, as far as it has them."""
    dataset = getattr(given, "dataset", given)
    size = len(dataset) if hasattr(dataset, "__len__") else None
    kind = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
    return {"class": kind, "samples": size, "batch_size": getattr(given, "batch_size", None)}
