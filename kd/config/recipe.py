"""The rules of the recipe section and of when it validates, as far as they need no network. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from kd.config.schema import Protocol, Recipe
from kd.errors import did_you_mean

# of optimisers and schedulers, and the least that each may be: torch finds out late, or not at all, that a value is no
# number, infinite, or a period of 0; that a rate is negative it says itself
LEAST = {
    **dict.fromkeys(("lr", "momentum", "weight_decay", "eps", "gamma", "eta_min"), -math.inf),
    **dict.fromkeys(("T_max", "T_0", "step_size", "total_iters"), 1),
}
GROUP_KEYS = ("pattern", "lr", "weight_decay")
EMA_KEYS = ("decay", "warmup")
NETWORK_KEYS = ("optimizer", "scheduler")


def number(value: Any) -> bool:
    """Tell whether a value is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the recipe, also in the config of a run that is older than one of its options."""
    open_ = {key: value for key, value in asdict(Recipe(batch_size=0)).items() if key != "batch_size"}
    return {**open_, **config["recipe"]}


def protocol(config: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the protocol section, as :func:`settings`."""
    return {**asdict(Protocol()), **config["protocol"]}


def recorded(protocol: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the protocol of a record: with the length in epochs, and in steps where it is given in those."""
    kept = {key: value for key, value in protocol.items() if key != "val_every_steps" or value is not None}
    steps = {"steps": recipe["steps"]} if recipe.get("steps") else {}
    return {**kept, "epochs": recipe["epochs"], **steps}


def length(recipe: Mapping[str, Any]) -> str:
    """Write how long a run is: ``30 epochs`` or ``1000 steps``."""
    return f"{recipe['steps']} steps" if recipe.get("steps") else f"{recipe['epochs']} epochs"


def problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield one sentence for each value that is not allowed."""
    recipe, protocol = config["recipe"], config["protocol"]
    counts = {f"recipe.{k}": recipe[k] for k in ("epochs", "steps", "batch_size", "accumulate")}
    counts |= {f"protocol.{k}": protocol[k] for k in ("val_every", "val_every_steps")}
    wrong = [path for path, value in counts.items() if value is not None and value < 1]
    for path in wrong:
        yield f"{path} = {counts[path]} is not allowed: it must be 1 or more"
    known = recipe["epochs"] is None or recipe["epochs"] >= 1
    nodes = [("recipe", recipe), *_networks(recipe)]
    for path, node in nodes:
        yield from _of_the_numbers(path, node, recipe, known)
    clip = recipe["gradient_clip"]
    if clip is not None and not 0 < clip < math.inf:
        yield f"recipe.gradient_clip = {clip} is not allowed: it must be a finite number above 0, or null"
    if not wrong:
        yield from _of_the_length(recipe)
        yield from _of_the_validations(recipe, protocol)
    yield from _of_the_groups(recipe)
    yield from _of_the_average(recipe["ema"], config["hardware"])
    yield from _of_the_networks(recipe["networks"], config["networks"])


def _networks(recipe: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    given = recipe["networks"] if isinstance(recipe["networks"], Mapping) else {}
    return [(f"recipe.networks.{name}", node) for name, node in given.items() if isinstance(node, Mapping)]


def _of_the_numbers(path: str, parent: Mapping[str, Any], recipe: Mapping[str, Any], known: bool) -> Iterator[str]:
    """Check the numbers of an optimiser and a scheduler."""
    for section in ("optimizer", "scheduler"):
        node = parent.get(section) if isinstance(parent.get(section), Mapping) else {}
        for key, value in (node or {}).items():
            where = f"{path}.{section}.{key}"
            if key == "T_max" and not known:  # said already: it is recipe.epochs
                continue
            if key == "T_max" and value is None and recipe["steps"]:
                yield (
                    f"{where} has no value where the length is in steps: set {where}=${{recipe.steps}} and "
                    "recipe.scheduler_interval=step"
                )
            elif key in LEAST and (isinstance(value, bool) or not isinstance(value, (int, float))):
                yield f"{where} = {value} is not allowed: it must be a number"
            elif key in LEAST and not (number(value) and value >= LEAST[key]):
                least = "" if LEAST[key] < 0 else f", {LEAST[key]} or more"
                yield f"{where} = {value} is not allowed: it must be a finite number{least}"


def _of_the_length(recipe: Mapping[str, Any]) -> Iterator[str]:
    epochs, steps, warmup, start = (recipe[key] for key in ("epochs", "steps", "warmup", "warmup_start"))
    if epochs is None and steps is None:
        yield "recipe.epochs and recipe.steps have no value: set one of them, the length of the run"
    elif epochs is not None and steps is not None:
        yield (
            f"recipe.epochs = {epochs} and recipe.steps = {steps} are not allowed together: the length is one of them, "
            "set the other to null"
        )
    elif warmup is not None and not (number(warmup) and 0 < warmup <= (epochs or steps)):
        most = f"recipe.epochs = {epochs}" if epochs else f"recipe.steps = {steps}"
        yield f"recipe.warmup = {warmup} is not allowed: it must be above 0, and at most {most}"
    elif warmup is not None and steps is not None and warmup % 1:
        yield f"recipe.warmup = {warmup} is not allowed: it must be a whole number of steps"
    if start is not None and not 0 <= start < 1:
        yield f"recipe.warmup_start = {start} is not allowed: it must be a share of the rate, 0 or more and below 1"
    elif start is not None and warmup is None:
        yield f"recipe.warmup_start = {start} needs recipe.warmup: for how long the rate rises"


def _of_the_validations(recipe: Mapping[str, Any], protocol: Mapping[str, Any]) -> Iterator[str]:
    every, steps, epochs = protocol["val_every"], protocol["val_every_steps"], recipe["epochs"]
    if steps is not None and every not in (None, 1):
        yield (
            f"protocol.val_every = {every} and protocol.val_every_steps = {steps} are not allowed together: "
            "validations are counted in one of them, set protocol.val_every=null"
        )
    elif steps is None and every is None:
        yield "protocol.val_every and protocol.val_every_steps have no value: set one of them"
    elif steps is None and epochs is not None and epochs % every:
        yield f"protocol.val_every = {every} is not allowed: it must divide recipe.epochs = {epochs} (set both)"
    if steps is not None and recipe["steps"] is not None and steps > recipe["steps"]:
        yield f"protocol.val_every_steps = {steps} is not allowed: it must be at most recipe.steps = {recipe['steps']}"


def _of_the_groups(recipe: Mapping[str, Any]) -> Iterator[str]:
    if recipe["no_decay"] not in (None, "norm_and_bias"):
        yield f"recipe.no_decay = {recipe['no_decay']} is not allowed: it must be norm_and_bias or null"
    decay = recipe["layer_decay"]
    if decay is not None and not 0 < decay <= 1:
        yield f"recipe.layer_decay = {decay} is not allowed: it must be above 0 and at most 1, or null"
    rules = recipe["groups"]
    if rules is not None and not isinstance(rules, list):
        yield f"recipe.groups = {rules} is not allowed: it must be a list of {{pattern: …, lr: …, weight_decay: …}}"
        return
    for place, rule in enumerate(rules or ()):
        yield from _of_the_group(f"recipe.groups.{place}", rule)


def _of_the_group(path: str, rule: Any) -> Iterator[str]:
    if not isinstance(rule, Mapping) or not isinstance(rule.get("pattern"), str):
        yield f"{path} = {rule} is not allowed: it must be a mapping with a pattern of parameter names"
        return
    for key in rule:
        if key not in GROUP_KEYS:
            yield f"{path}.{key} is not a key of a group{did_you_mean(str(key), GROUP_KEYS)}"
    if len(rule) == 1:
        yield f"{path} = {rule} is not allowed: it must set lr, weight_decay or both"
    if (rate := rule.get("lr")) is not None and not (number(rate) and rate >= 0) and factor(rate) is None:
        yield f"{path}.lr = {rate} is not allowed: it must be a rate (0.01) or a factor of it (x0.1)"
    if (own := rule.get("weight_decay")) is not None and not (number(own) and own >= 0):
        yield f"{path}.weight_decay = {own} is not allowed: it must be a finite number, 0 or more"


def factor(rate: Any) -> float | None:
    """Read ``x0.1``, a factor of the rate; None for anything else."""
    found = re.fullmatch(r"x(\d+(\.\d*)?([eE][-+]?\d+)?)", rate) if isinstance(rate, str) else None
    return float(found[1]) if found else None


def _of_the_average(ema: Any, hardware: Mapping[str, Any]) -> Iterator[str]:
    if ema is None:
        return
    if not isinstance(ema, Mapping) or "decay" not in ema:
        yield f"recipe.ema = {ema} is not allowed: it must be {{decay: 0.999, warmup: true}}, or null"
        return
    for key in ema:
        if key not in EMA_KEYS:
            yield f"recipe.ema.{key} is not a key of the average{did_you_mean(str(key), EMA_KEYS)}"
    if not number(ema["decay"]) or not 0 <= ema["decay"] < 1:
        yield f"recipe.ema.decay = {ema['decay']} is not allowed: it must be a number, 0 or more and below 1"
    if not isinstance(ema.get("warmup", True), bool):
        yield f"recipe.ema.warmup = {ema['warmup']} is not allowed: it must be true or false"
    if hardware["strategy"] == "fsdp":
        yield f"recipe.ema = {dict(ema)} is not allowed with hardware.strategy = fsdp: it averages whole parameters"


def _of_the_networks(given: Any, networks: Mapping[str, Any]) -> Iterator[str]:
    if given is not None and not isinstance(given, Mapping):
        yield f"recipe.networks = {given} is not allowed: it must be {{NAME: {{optimizer: …, scheduler: …}}}}, or null"
        return
    for name, node in (given or {}).items():
        path = f"recipe.networks.{name}"
        if name not in networks:
            yield f"{path}: there is no networks.{name}{did_you_mean(str(name), networks)}"
        elif not isinstance(node, Mapping):
            yield f"{path} = {node} is not allowed: it must be {{optimizer: …, scheduler: …}}"
        else:
            for key, part in node.items():
                if key not in NETWORK_KEYS:
                    yield f"{path}.{key} is not a key of a network's recipe{did_you_mean(str(key), NETWORK_KEYS)}"
                elif not (key == "scheduler" and part is None) and not (
                    isinstance(part, Mapping) and "_target_" in part
                ):
                    yield f"{path}.{key} = {part} is not allowed: it needs a _target_"
