"""From a checked config to objects."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from lightning import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch import nn

from kd.config import hardware
from kd.config.instantiate import found, make
from kd.config.keys import OBJECTIVE_KEYS
from kd.config.recipe import settings
from kd.data.base import AdaptedData
from kd.data.images.base import DataModule
from kd.data.text.base import TextModule
from kd.distill.distiller import Distiller
from kd.distill.objective import Objective
from kd.errors import KdError, did_you_mean, framed
from kd.losses.base import Term
from kd.parallel import group
from kd.records import weight_files
from kd.run import compatibility, input_statistics, networks, optim, weights
from kd.run.frozen_body import freeze
from kd.run.hardware import checkpoint_gradients
from kd.run.tokenizers import TEACHER, with_tokenizers
from kd.tasks.base import Task
from kd.tracking.loggers import complete
from kd.tracking.summary import keep_open

log = logging.getLogger(__name__)


def datamodule(config: Mapping[str, Any]) -> Any:
    """Make the data module, set up for all splits. Of several processes one a node downloads."""
    members = networks.teacher_members(config["teacher"])
    node = with_tokenizers({**config, "data": input_statistics.completed(config)}, members)
    own = node.pop(TEACHER, None)  # an object, perhaps, which no config can hold
    data = make(node, "data", **({} if own is None else {TEACHER: own}))
    if not isinstance(data, LightningDataModule):
        raise KdError(
            f"{_name(config)} makes a {type(data).__name__}, not a LightningDataModule (a dataset of torch is one "
            f"split: data=torch_dataset 'data.train={{_target_: {config['data']['_target_']}}}')"
        )
    try:
        if int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))) == 0 or not group.joined():
            data.prepare_data()
        group.barrier()
        data.setup("fit")
        if isinstance(data, (DataModule, TextModule)):
            return data
        data.setup("test")  # the sizes of all splits are known before the first epoch
        return AdaptedData(data, _name(config))
    except (KdError, OSError):
        raise
    except Exception as error:
        raise framed(_name(config), error) from error


def _name(config: Mapping[str, Any]) -> str:
    return f"data._target_ = {config['data']['_target_']}"


def objective(config: Mapping[str, Any]) -> Objective:
    """Make the named terms with their weights and schedules; a ``term`` or a schedule may be an object already."""
    terms, factors, schedules = {}, {}, {}
    for name, node in config["loss"].items():
        if node is None:
            continue
        terms[name] = node["term"] if "term" in node else _term(name, node)
        factors[name] = node.get("weight", 1.0)
        if node.get("schedule") is not None:
            schedule = node["schedule"]
            schedules[name] = schedule if callable(schedule) else make(schedule, f"loss.{name}.schedule")
    settings = hardware.settings({"hardware": {}, **config})
    standardised = [name for name in terms if config["loss"][name].get("standardise")]
    return Objective(terms, factors, schedules, settings["loss_chunk"], standardised, settings["liger"] == "auto")


def _term(name: str, node: Mapping[str, Any]) -> Term:
    """Make one term. ``KdError`` when its target is something else, such as the function that a term would call."""
    path, target = f"loss.{name}._target_ = {node['_target_']}", found(node["_target_"])
    arguments = {key: value for key, value in node.items() if key not in OBJECTIVE_KEYS}
    must = "it must be a kd.losses.base.Term, a class with forward(student, teacher, batch) -> scalar"
    if inspect.isfunction(target):
        parameters = inspect.signature(target).parameters.values()
        open_ = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if lacking := [parameter for parameter in open_ if parameter not in arguments]:
            raise KdError(f"{path} is a function of {', '.join(lacking)}, and no term: {must}")
    made = make(arguments, f"loss.{name}")
    if not isinstance(made, Term):
        raise KdError(f"{path} is a {type(made).__name__}, and no term: {must}")
    return made


def load_terms(config: Mapping[str, Any], module: Distiller) -> None:
    """Put what an earlier run has learned into the terms that name one: ``loss.NAME.checkpoint=RUN``."""
    for name, term in module.objective.items():
        source = config["loss"][name].get("checkpoint")
        if source is None:
            continue
        file = Path(source) / weight_files.TERMS if Path(source).is_dir() else Path(source)
        state, _ = weights.read(file)
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        if not own:
            raise KdError(f"loss.{name}.checkpoint = {source} holds nothing of a term {name}")
        weights.load(term, own, source, f"term {name}")


def check_objectives(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse the first job whose terms cannot be built, or need a teacher that it does not give."""
    for name, config in configs.items():
        try:
            given = any(config["teacher"].get(key) for key in ("model", "checkpoint", "answers"))
            supplied = getattr(get_object(config["distiller"]["_target_"]), "supplies_teacher", False)
            objective(config).check_teacher(given or supplied)
        except KdError as error:
            raise KdError(f"{name}: {error}") from None


def distiller(config: Mapping[str, Any], data: Any) -> Distiller:
    """Make student, teacher, objective and task one module, prepared on the first training batch."""
    recipe = config["recipe"]
    built_task = task(config)
    own = getattr(get_object(config["distiller"]["_target_"]), "own_optimizers", ())
    # the student first, as ever: both draw from one random state; but one that is made from the teacher after it
    cut = config["student"].get("surgery")
    teacher = networks.teacher(config, data, built_task) if cut else None
    net = networks.student(config, data, built_task, teacher)
    if settings(config)["frozen_body"] == 1:
        freeze(net)
    peers = {
        name: networks.network(
            node, f"networks.{name}", data.num_classes, data.input_shape, **networks.of_text(data, built_task)
        )
        for name, node in (config.get("networks") or {}).items()
        if node is not None
    }
    checkpoint_gradients(config, {"student": net, **{f"networks.{name}": peer for name, peer in peers.items()}})
    if hardware.settings(config)["sync_batchnorm"] and group.joined():
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        peers = {name: nn.SyncBatchNorm.convert_sync_batchnorm(peer) for name, peer in peers.items()}
    module: Distiller = make(
        {**config["distiller"], "_convert_": "none"},
        "distiller",
        student=net,
        teacher=teacher if cut else networks.teacher(config, data, built_task),
        objective=objective(config),
        task=built_task,
        num_classes=data.num_classes,
        seed=config["seed"],
        **optim.arguments(config, own),
        **taken_by(get_object(config["distiller"]["_target_"]), peers, recipe),
    )
    frozen_norms = bool(recipe["frozen_norms"]) or recipe["frozen_body"] == 1.0
    compatibility.check(module, data, recipe["batch_size"], frozen_norms)
    batch = next(iter(data.train_dataloader()))
    length = {"epochs": recipe["epochs"], "steps": recipe.get("steps")}
    channels_last = hardware.settings(config)["channels_last"]
    module.prepare(batch, data.train_index, data.train_targets, **length, channels_last=channels_last)
    load_terms(config, module)
    if isinstance(module.make_groups, optim.Groups):
        module.make_groups.check(module.networks())
    if group.joined():
        module.find_unreached(batch)
        if hardware.settings(config)["sync_batchnorm"]:
            module.objective = nn.SyncBatchNorm.convert_sync_batchnorm(module.objective)  # the adapters'
    if not module.trainable():
        raise KdError("the student has no trainable parameters")
    return module


def taken_by(distiller: Any, peers: Mapping[str, nn.Module], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what only some distillers take: peers where there are any, clipping where Lightning does not do it."""
    given: dict[str, Any] = {"peers": peers} if peers else {}
    if getattr(distiller, "own_optimizers", ()):
        given |= {"gradient_clip": recipe["gradient_clip"], "accumulate": recipe["accumulate"]}
    return given


def task(config: Mapping[str, Any]) -> Task:
    """Make the task of a config. ``KdError`` when it is none."""
    built = make(config["task"], "task")
    if not isinstance(built, Task):
        raise KdError(f"task._target_ = {config['task']['_target_']} is not a kd.tasks.base.Task")
    return built


def loggers(config: Mapping[str, Any], run_dir: Path) -> list[Any]:
    """Make the loggers of the config, completed with where the run writes; ``finish_loggers`` closes them."""
    built = []
    for name, node in config["logger"].items():
        if node is not None:
            built.append(make(complete(name, node, config, run_dir), f"logger.{name}"))
    keep_open(built)
    return built


def callbacks(config: Mapping[str, Any], protocol: Mapping[str, Any], measured: Mapping[str, str]) -> list[Callback]:
    """Make the callbacks of the config; ``protocol``: with what selects; ``measured``: what is better of val's.

    A ``monitor`` of null is what selects; a ``mode`` of null is what is better for the monitor, of a mean of training
    the less.
    """
    built = []
    for name, node in (config.get("callbacks") or {}).items():
        if node is None:
            continue
        path = f"callbacks.{name}"
        if "monitor" in node and node["monitor"] is None and protocol["monitor"] is not None:
            node = {**node, "monitor": protocol["monitor"]}
        if node.get("monitor") is not None and "mode" in node and node["mode"] is None:
            node = {**node, "mode": measured.get(node["monitor"], "min")}
        made = make(node, path)
        if not isinstance(made, Callback):
            raise KdError(
                f"{path}._target_ = {node['_target_']} makes a {type(made).__name__}, not a Lightning callback"
            )
        monitor = getattr(made, "monitor", None)
        if isinstance(monitor, str) and monitor.startswith("val/") and monitor not in measured:
            raise KdError(f"{path}.monitor = {monitor} is not measured{did_you_mean(monitor, measured)}")
        built.append(made)
    return built
