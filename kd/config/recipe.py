"""The rules of the recipe section and of when it validates, as far as they need no network. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from kd.config.rules import FLAG, number, one_of, refusals, whole
from kd.config.schema import Protocol, Recipe
from kd.errors import did_you_mean

COUNTS = {
    **dict.fromkeys(
        ("recipe.epochs", "recipe.steps", "protocol.val_every", "protocol.val_every_steps"), whole(1).or_null
    ),
    **dict.fromkeys(("recipe.batch_size", "recipe.accumulate"), whole(1)),
}
RULES = {
    "gradient_clip": number(above=0).or_null,
    "warmup_start": number(least=0, below=1).or_null,  # share of the rate
    "no_decay": one_of("norm_and_bias", None),
    "layer_decay": number(above=0, most=1).or_null,
    "frozen_body": number(above=0, most=1).or_null,
    "frozen_norms": FLAG.or_null,
    "scheduler_interval": one_of("epoch", "step"),
}
# of optimisers and schedulers: torch finds out late, or not at all, that a value is no number, infinite, or a period of
# 0; that a rate is negative it says itself
NUMBERS = {
    **dict.fromkeys(("lr", "eps", "gamma", "eta_min"), number()),
    **dict.fromkeys(("momentum", "weight_decay"), number().or_null),  # null: as the optimiser has it
    **dict.fromkeys(("T_max", "T_0", "step_size", "total_iters"), number(least=1)),
}
EMA = {"decay": number(least=0, below=1), "warmup": FLAG}
RATE = number(least=0).or_null
GROUP_KEYS = ("pattern", "lr", "weight_decay")
NETWORK_KEYS = ("optimizer", "scheduler")


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
    wrong = refusals("", config, COUNTS)
    yield from wrong
    yield from refusals("recipe.", recipe, RULES)
    known = recipe["epochs"] is None or recipe["epochs"] >= 1
    nodes = [("recipe", recipe), *_networks(recipe)]
    for path, node in nodes:
        yield from _of_the_numbers(path, node, recipe, known)
    if not wrong:
        yield from _of_the_length(recipe)
        yield from _of_the_validations(recipe, protocol)
    if not RATE.fits(rate := recipe["body_lr"]) and factor(rate) is None:
        yield f"recipe.body_lr = {rate} is not allowed: it must be a rate (1e-4), a factor of it (x0.1), or null"
    elif rate == 0 or factor(rate) == 0:
        yield f"recipe.body_lr = {rate} trains nothing of the body: set recipe.frozen_body=true in its place"
    yield from _of_the_groups(recipe)
    yield from _of_the_average(recipe["ema"], config["hardware"])
    yield from _of_the_networks(recipe["networks"], config["networks"])


def _networks(recipe: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    given = recipe["networks"] if isinstance(recipe["networks"], Mapping) else {}
    return [(f"recipe.networks.{name}", node) for name, node in given.items() if isinstance(node, Mapping)]


def _of_the_numbers(path: str, parent: Mapping[str, Any], recipe: Mapping[str, Any], known: bool) -> Iterator[str]:
    """Check the numbers of an optimiser and a scheduler."""
    for section in ("optimizer", "scheduler"):
        node, rules, where = parent.get(section), dict(NUMBERS), f"{path}.{section}"
        if not isinstance(node, Mapping):
            continue
        if not known:  # said already: it is recipe.epochs
            del rules["T_max"]
        elif recipe["steps"] and node.get("T_max", 0) is None:
            del rules["T_max"]
            yield (
                f"{where}.T_max has no value where the length is in steps: set {where}.T_max=${{recipe.steps}} and "
                "recipe.scheduler_interval=step"
            )
        yield from refusals(f"{where}.", node, rules)


def _of_the_length(recipe: Mapping[str, Any]) -> Iterator[str]:
    epochs, steps, warmup, start = (recipe[key] for key in ("epochs", "steps", "warmup", "warmup_start"))
    if epochs is None and steps is None:
        yield "recipe.epochs and recipe.steps have no value: set one of them, the length of the run"
    elif epochs is not None and steps is not None:
        yield (
            f"recipe.epochs = {epochs} and recipe.steps = {steps} are not allowed together: the length is one of them, "
            "set the other to null"
        )
    elif not number(above=0, most=epochs or steps).or_null.fits(warmup):
        most = f"recipe.epochs = {epochs}" if epochs else f"recipe.steps = {steps}"
        yield f"recipe.warmup = {warmup} is not allowed: it must be above 0, and at most {most}"
    elif warmup is not None and steps is not None and warmup % 1:
        yield f"recipe.warmup = {warmup} is not allowed: it must be a whole number of steps"
    if start is not None and warmup is None:
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
    if not RATE.fits(rate := rule.get("lr")) and factor(rate) is None:
        yield f"{path}.lr = {rate} is not allowed: it must be a rate (0.01) or a factor of it (x0.1)"
    yield from refusals(f"{path}.", rule, {"weight_decay": RATE})


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
        if key not in EMA:
            yield f"recipe.ema.{key} is not a key of the average{did_you_mean(str(key), EMA)}"
    yield from refusals("recipe.ema.", ema, EMA)
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
