"""The checks of a config that need no torch: a typo must cost a fraction of a second."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from kd.config import composition, hardware, keys, own_options, values
from kd.errors import KdError

# sections that do not matter when a finished run is measured
TRAINING = ("loss", "recipe", "distiller", "logger", "callbacks")


def to_container(node: Any) -> Any:
    """Turn a config node into resolved Python containers; anything else stays as it is."""
    return OmegaConf.to_container(node, resolve=True) if isinstance(node, (DictConfig, ListConfig)) else node


def check(cfg: DictConfig, training: bool = True) -> dict[str, Any]:
    """Resolve the config and refuse what cannot work, all complaints at once.

    Without ``training`` the loss, recipe, distiller and loggers do not matter. Returns the resolved config as plain
    containers. Raises ``KdError``; imports no torch.
    """
    line = composition.command_line() if training else {}  # a run that is measured was not composed here
    config = _resolved(cfg, line)
    if training:
        keys.drop_left_out(config, line)
    problems = [*keys.problems(config, line, () if training else TRAINING), *values.of_every_use(config)]
    if training:
        problems += hardware.problems(config["hardware"], config["recipe"]["batch_size"])
        problems += values.of_a_training(config)
    refused = {problem.partition(" is not allowed")[0] for problem in problems}
    types = keys.mistyped(config, line, () if training else TRAINING)
    problems += [problem for problem in types if problem.partition(" is not allowed")[0] not in refused]
    if problems:
        raise KdError("\n".join(dict.fromkeys(problems)))
    if not any(value is not None for value in (config["student"].get("surgery") or {}).values()):
        config["student"].pop("surgery", None)
    for section in ("student", "teacher"):
        config[section]["checkpoint"] = _absolute(config[section]["checkpoint"])
        if config[section].get("epoch") == "selected":  # the same weights, so the same experiment
            config[section]["epoch"] = None
    if config["student"].get("new_head") is False:
        config["student"]["new_head"] = None
    if "root" in config["data"]:
        config["data"]["root"] = _absolute(config["data"]["root"])
    return config


def _resolved(cfg: DictConfig, line: Mapping[str, str]) -> dict[str, Any]:
    """Resolve a config. ``KdError`` where that cannot be done, and for what all other complaints would follow from."""
    whole: Any = OmegaConf.to_container(cfg, resolve=False)
    if broken := list(own_options.outer_keys(whole, line)):
        raise KdError("\n".join(broken))
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise KdError("\n".join(f"{key} has no value: set it, for example {key}=…" for key in missing))
    try:
        config: dict[str, Any] = to_container(cfg)
    except Exception as error:
        raise KdError(f"the config cannot be resolved: {str(error).splitlines()[0]}") from None
    return config


def _absolute(path: Any) -> Any:
    """Make existing paths absolute, so that a run's config means the same from every directory."""
    if isinstance(path, list):
        return [_absolute(p) for p in path]
    if not isinstance(path, str):
        return path
    there = os.path.expanduser(path)
    return os.path.abspath(there) if os.path.exists(there) else path
