"""Which values of a config are allowed, where that needs no torch: one sentence for each that is not."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from kd.config import recipe
from kd.config.recipe import number

THREADS = 1024


def of_every_use(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong whether a network is trained or measured: names, places, the teacher's numbers."""
    name = config["name"]
    if not name.strip() or not name.isprintable():
        yield f"name = {name!r} is not allowed: a text on one line, it is the folder of the runs below paths.runs"
    elif PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        yield f"name = {name} is not allowed: the run would lie outside of paths.runs (which says where runs go)"
    root = config["data"].get("root")
    if root is not None and not isinstance(root, str):
        yield f"data.root = {root} is not allowed: it must be the path of a folder, or null"
    augment = config["data"].get("augment")
    if not isinstance(augment, (Mapping, types.NoneType)) and str(config["data"].get("_target_")).startswith("kd."):
        yield f"data.augment = {augment} is not allowed: it must be a mapping, such as {{pad: 2, flip: true}}, or null"
    teacher = config["teacher"]
    for checkpoint in c if isinstance(c := teacher["checkpoint"], list) else [c]:
        if checkpoint is not None and not isinstance(checkpoint, str):
            yield f"teacher.checkpoint = {c} is not allowed: it must be a path, or a list of paths"
    for key, least in {"mean": -math.inf, "std": math.ulp(0), "weights": 0}.items():
        given = teacher[key]
        if given is not None and not (given and all(number(v) and v >= least for v in given)):
            rule = {"mean": "finite numbers", "std": "numbers above 0", "weights": "numbers, 0 or more"}[key]
            yield f"teacher.{key} = {given} is not allowed: it must be a list of {rule}, or null"


def of_a_training(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong for a run that trains."""
    yield from _of_the_loss(config["loss"])
    yield from recipe.problems(config)
    if not 0 <= config["seed"] < 2**32:
        yield f"seed = {config['seed']} is not allowed: it must be 0 to {2**32 - 1}"
    threads, deterministic = config["hardware"]["threads"], config["hardware"]["deterministic"]
    if threads is not None and not 1 <= threads <= THREADS:  # of 100,000 the memory does not suffice: a crash
        yield f"hardware.threads = {threads} is not allowed: it must be 1 to {THREADS}, or null for torch's choice"
    if deterministic not in (True, False, "warn"):
        yield f"hardware.deterministic = {deterministic} is not allowed: it must be true, false or warn"
    every = config["distiller"].get("log_every", 1)
    if not number(every) or not isinstance(every, int) or every < 1:
        yield f"distiller.log_every = {every} is not allowed: it must be a whole number, 1 or more"
    wandb = config["logger"].get("wandb")
    timeout = wandb.get("timeout", 1) if isinstance(wandb, Mapping) else 1
    if not number(timeout) or timeout <= 0:
        yield f"logger.wandb.timeout = {timeout} is not allowed: it must be a number of seconds, above 0"
    yield from _choices(config)


def _numbers(node: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield f"{path}.{key}", str(key), value
            yield from _numbers(value, f"{path}.{key}")


def _of_the_loss(loss: Mapping[str, Any]) -> Iterator[str]:
    if all(node is None for node in loss.values()):
        yield "loss is empty: choose at least one term, for example loss=[ce]"
    for path, key, value in _numbers(loss, "loss"):
        if key in ("temperature", "weight") and (isinstance(value, bool) or not isinstance(value, (int, float))):
            yield f"{path} = {value} is not allowed: it must be a number"
        elif key == "temperature" and not 0 < value < math.inf:
            yield f"{path} = {value} is not allowed: it must be a finite number above 0"
        elif key == "weight" and not 0 <= value < math.inf:
            yield f"{path} = {value} is not allowed: it must be a finite number, 0 or more"


def _choices(config: Mapping[str, Any]) -> Iterator[str]:
    allowed: dict[str, tuple[str | None, ...]] = {
        "teacher.combine": ("probabilities", "logits"),
        "teacher.epoch": ("selected", "last", None),
        "student.epoch": ("selected", "last", None),
        "recipe.scheduler_interval": ("epoch", "step"),
        "protocol.mode": ("max", "min", None),
    }
    for path, choices in allowed.items():
        section, key = path.split(".")
        value = config[section].get(key)
        if value not in choices:
            names = [choice or "null" for choice in choices]
            yield f"{path} = {value} is not allowed: it must be {', '.join(names[:-1])} or {names[-1]}"
        elif key == "epoch" and value and config[section]["checkpoint"] is None:
            yield f"{path} = {value} needs {section}.checkpoint: the run directory whose epoch it chooses"
