"""The checks of a config that need no torch: a typo must cost a fraction of a second."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from kd import hardware
from kd.errors import KdError, near
from kd.schema import Hardware, Paths, Protocol, Recipe, Root, Student, Teacher
from kd.signature import arguments

_PACKAGE = Path(__file__).resolve().parent
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""Where the configuration files are: inside the installed package, or beside it in a checkout."""

# sections that do not matter when a finished run is measured
TRAINING = ("loss", "recipe", "distiller", "logger")
SECTIONS = (Student, Teacher, Recipe, Hardware, Protocol, Paths)
# arguments of lightning.Trainer that other keys of the config set, or that would break a run's bookkeeping
OWN_TRAINER_KEYS = (
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "accumulate_grad_batches", "gradient_clip_val"),
    *("check_val_every_n_epoch", "val_check_interval", "num_sanity_val_steps", "fast_dev_run", "overfit_batches"),
    *("accelerator", "devices", "num_nodes", "strategy", "precision", "deterministic", "logger", "callbacks"),
    *("default_root_dir", "enable_progress_bar", "enable_checkpointing", "barebones", "use_distributed_sampler"),
    *("sync_batchnorm", "plugins"),
)
# of optimisers and schedulers: torch finds out late, or not at all, when these are no numbers
NUMBERS = ("lr", "momentum", "weight_decay", "eps", "gamma", "T_max", "eta_min", "step_size", "total_iters")
OBJECTIVE_KEYS = ("weight", "schedule")  # of a loss node: read by the objective, not by the term


def plain(node: Any) -> Any:
    """A config node as plain, resolved Python containers."""
    return OmegaConf.to_container(node, resolve=True) if isinstance(node, (DictConfig, ListConfig)) else node


def check(cfg: DictConfig, training: bool = True) -> dict[str, Any]:
    """Resolve the config and refuse what cannot work, all complaints at once.

    Without ``training`` the loss, recipe, distiller and loggers do not matter. Returns the resolved config as plain
    containers. Raises ``KdError``; imports no torch.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise KdError("\n".join(f"{key} has no value: set it, for example {key}=…" for key in missing))
    try:
        values: dict[str, Any] = plain(cfg)
    except Exception as error:
        raise KdError(f"the config cannot be resolved: {str(error).splitlines()[0]}") from None
    problems = [*_check_keys(values), *_check_targets(values, () if training else TRAINING)]
    if training:
        problems += hardware.problems(values["hardware"], values["recipe"]["batch_size"])
        problems += [*_check_loss(values), *_check_numbers(values), *_check_choices(values)]
    if problems:
        raise KdError("\n".join(problems))
    protocol = values["protocol"]
    protocol["mode"] = protocol["mode"] or better(protocol["monitor"])
    for section in ("student", "teacher"):
        values[section]["checkpoint"] = _absolute(values[section]["checkpoint"])
        if values[section]["epoch"] == "selected":  # the same weights, so the same experiment
            values[section]["epoch"] = None
    if "root" in values["data"]:
        values["data"]["root"] = _absolute(values["data"]["root"])
    return values


def better(metric: str) -> str:
    """Whether ``max`` or ``min`` of a metric is better: losses, errors and distances are to be small."""
    return "min" if metric.rpartition("/")[2] in ("nll", "ece", "kl", "loss") else "max"


def _absolute(path: Any) -> Any:
    """Existing paths made absolute, so that a run's config means the same from every directory."""
    if isinstance(path, list):
        return [_absolute(p) for p in path]
    if not isinstance(path, str):
        return path
    there = os.path.expanduser(path)
    return os.path.abspath(there) if os.path.exists(there) else path


def targets(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every node with a ``_target_`` and its dotted path, outer ones first."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, (list, tuple)):
        for position, value in enumerate(node):
            yield from targets(value, f"{path}.{position}")


def _check_keys(values: dict[str, Any]) -> Iterator[str]:
    """``+recipe.foo=1`` can add a key that nothing reads, ``~data`` can take one away."""
    schema = {f.name: f for f in fields(Root)}
    for name in values.keys() - schema.keys():
        yield f"there is no option {name}{near(name, schema)}"
    for name in schema.keys() & values.keys():
        section = {s.__name__.lower(): s for s in SECTIONS}.get(name)
        known = [f.name for f in fields(section)] if section else []
        for key in (values[name] or {}).keys() - set(known) if section else ():
            yield f"there is no option {name}.{key}{near(key, known)}"
    for name in ("data", "task", "distiller"):
        if "_target_" not in (values.get(name) or {}):
            yield f"{name} is empty: choose one of the group's options, or give it a _target_"


def _check_targets(values: dict[str, Any], skip: tuple[str, ...]) -> Iterator[str]:
    for path, node in targets(values):
        if path.partition(".")[0] in skip:
            continue
        try:
            known = arguments(node["_target_"])
        except LookupError as error:
            yield f"{path}._target_ = {node['_target_']} cannot be found: {error}"
            continue
        names = list(known.names)
        if path.startswith("loss.") and path.count(".") == 1:
            names += OBJECTIVE_KEYS
        for key in node:
            if not key.startswith("_") and key not in names and not known.any:
                yield f"{path}.{key} is not an argument of {node['_target_']}{near(key, names)}{_where(path, key)}"

    trainer = arguments("lightning.Trainer").names
    for key, value in (values["hardware"]["trainer"] or {}).items():
        if key in OWN_TRAINER_KEYS or (key, value) == ("limit_val_batches", 0):
            yield f"hardware.trainer.{key} = {value} is not allowed: the recipe, protocol and hardware sections set it"
        elif key not in trainer:
            yield f"hardware.trainer.{key} is not an argument of lightning.Trainer{near(key, trainer)}"


def _where(path: str, key: str) -> str:
    """The configuration file that spells this key, for the complaint about it."""
    group, name, *_ = [*path.split("."), ""]  # Hydra does not list the options of groups chosen as lists
    files = [
        f
        for f in loaded_files(Path(group) / f"{name}.yaml")
        if any(line.split(":")[0].strip() == key for line in _lines(f))
    ]
    return f" [{', '.join(str(f) for f in files[:2])}]" if files else f" [command line: {path}.{key}]"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def loaded_files(*more: Path) -> list[Path]:
    """The YAML files of the options that Hydra chose (and ``more``), while it composes or runs; else none."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return []
    runtime = HydraConfig.get().runtime
    roots = [Path(s.path) for s in runtime.config_sources if s.schema == "file"]
    chosen = [Path("train.yaml"), *more]
    for group, choice in runtime.choices.items():
        options = choice if isinstance(choice, (list, ListConfig)) else [choice]
        chosen += [Path(group.split("@")[0]) / f"{option}.yaml" for option in options if option is not None]
    return [root / file for file in chosen for root in roots if (root / file).is_file()]


def _numbers(node: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield f"{path}.{key}", str(key), value
            yield from _numbers(value, f"{path}.{key}")


def _check_numbers(values: dict[str, Any]) -> Iterator[str]:
    for path, key, value in _numbers(values["loss"], "loss"):
        if key in ("temperature", "weight") and (isinstance(value, bool) or not isinstance(value, (int, float))):
            yield f"{path} = {value} is not allowed: it must be a number"
        elif key == "temperature" and not 0 < value < float("inf"):
            yield f"{path} = {value} is not allowed: it must be a finite number above 0"
        elif key == "weight" and not 0 <= value < float("inf"):
            yield f"{path} = {value} is not allowed: it must be a finite number, 0 or more"
    recipe, protocol = values["recipe"], values["protocol"]
    whole = {f"recipe.{k}": recipe[k] for k in ("epochs", "batch_size", "accumulate")}
    for path, value in {**whole, "protocol.val_every": protocol["val_every"]}.items():
        if value < 1:
            yield f"{path} = {value} is not allowed: it must be 1 or more"
    every, epochs = protocol["val_every"], recipe["epochs"]
    if every >= 1 and epochs % every:
        yield f"protocol.val_every = {every} is not allowed: it must divide recipe.epochs = {epochs} (set both)"
    for section in ("optimizer", "scheduler"):
        for key, value in (recipe[section] or {}).items():
            if key in NUMBERS and (isinstance(value, bool) or not isinstance(value, (int, float))):
                yield f"recipe.{section}.{key} = {value} is not allowed: it must be a number"
    clip = recipe["gradient_clip"]
    if clip is not None and not clip > 0:
        yield f"recipe.gradient_clip = {clip} is not allowed: it must be above 0, or null"
    if not 0 <= values["seed"] < 2**32:
        yield f"seed = {values['seed']} is not allowed: it must be 0 to {2**32 - 1}"


def _check_choices(values: dict[str, Any]) -> Iterator[str]:
    allowed: dict[str, tuple[str | None, ...]] = {
        "teacher.combine": ("probabilities", "logits"),
        "teacher.epoch": ("selected", "last", None),
        "student.epoch": ("selected", "last", None),
        "recipe.scheduler_interval": ("epoch", "step"),
    }
    for path, choices in allowed.items():
        section, key = path.split(".")
        value = values[section].get(key)
        if value not in choices:
            names = [choice or "null" for choice in choices]
            yield f"{path} = {value} is not allowed: it must be {', '.join(names[:-1])} or {names[-1]}"
        elif key == "epoch" and value and values[section]["checkpoint"] is None:
            yield f"{path} = {value} needs {section}.checkpoint: the run directory whose epoch it chooses"

    mode, monitor = values["protocol"]["mode"], values["protocol"]["monitor"]
    if mode is not None and mode != better(monitor):
        yield f"protocol.mode = {mode} is not allowed: the better {monitor} is its {better(monitor)}imum (or null)"


def _check_loss(values: dict[str, Any]) -> Iterator[str]:
    terms = {name: node for name, node in values["loss"].items() if node is not None}
    if not terms:
        yield "loss is empty: choose at least one term, for example loss=[ce]"
    for name, node in terms.items():
        if not isinstance(node, Mapping) or "_target_" not in node:
            chosen = ",".join(terms)
            yield f"loss.{name} = {node} has no _target_: choose the term as well, for example loss=[{chosen}]"


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a.b": value}`` for every leaf of nested mappings."""
    if isinstance(node, Mapping) and node:
        return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): node}
