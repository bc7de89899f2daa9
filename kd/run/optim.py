"""From the recipe to what the Distiller optimises with: optimisers, schedules, warm-up, parameter groups."""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from kd.config.instantiate import first_line, make
from kd.config.recipe import factor, settings
from kd.distill.optimisation import EVERY_PEER, OwnRecipe, WarmUp
from kd.errors import KdError, did_you_mean
from kd.run.frozen_body import body_parameters

log = logging.getLogger(__name__)

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
TOKENS = ("pos_embed", "cls_token", "dist_token", "reg_token", "mask_token", "relative_position_bias_table")


def arguments(config: Mapping[str, Any], own_optimizers: Sequence[str]) -> dict[str, Any]:
    """Return what a Distiller is given of the recipe: the common optimiser, and what the recipe sets beside it."""
    recipe = settings(config)
    given: dict[str, Any] = {
        "optimizer": functools.partial(_optimizer, recipe["optimizer"], "recipe.optimizer"),
        "scheduler": _scheduler(recipe["scheduler"], "recipe.scheduler"),
        "scheduler_interval": recipe["scheduler_interval"],
    }
    if recipe["warmup"] is not None:
        given["warmup"] = WarmUp(recipe["warmup"], recipe["steps"] is not None, recipe["warmup_start"] or 0.0)
    if any(recipe[key] is not None for key in ("no_decay", "layer_decay", "groups", "body_lr")):
        own = {name: (node.get("optimizer") or {}).get("lr") for name, node in (recipe["networks"] or {}).items()}
        rates = {"": recipe["optimizer"].get("lr"), **{name: rate for name, rate in own.items() if rate is not None}}
        rules = recipe["groups"] or ()
        given["groups"] = Groups(recipe["no_decay"] is not None, recipe["layer_decay"], rules, rates, recipe["body_lr"])
    if recipe["networks"]:
        _refuse_others(recipe["networks"], own_optimizers)
        given["own_recipes"] = {name: _own(name, node) for name, node in recipe["networks"].items()}
    return given


def _optimizer(node: Mapping[str, Any], path: str, params: Any) -> torch.optim.Optimizer:
    given = list(params)
    node = {key: value for key, value in node.items() if value is not None}  # null: as the optimiser has it
    if not (given and isinstance(given[0], Mapping)):
        return make(node, path, params=given)
    made = make({**node, "_partial_": True, "_convert_": "all"}, path)  # Hydra would take groups for a config
    try:
        return made(given)
    except (ValueError, TypeError) as error:
        raise KdError(f"{path}: {first_line(error)}") from error


def _scheduler(node: Mapping[str, Any] | None, path: str) -> Callable[[torch.optim.Optimizer], Any] | None:
    return (lambda optimizer: make(node, path, optimizer=optimizer)) if node else None


def _own(name: str, node: Mapping[str, Any]) -> OwnRecipe:
    path = f"recipe.networks.{name}"
    optimizer = functools.partial(_optimizer, node["optimizer"], f"{path}.optimizer") if "optimizer" in node else None
    return OwnRecipe(optimizer, _scheduler(node.get("scheduler"), f"{path}.scheduler"), "scheduler" in node)


def _refuse_others(networks: Mapping[str, Any], own: Sequence[str]) -> None:
    for name in networks:
        if name not in own and EVERY_PEER not in own:
            raise KdError(
                f"recipe.networks.{name} is not allowed: this distiller gives an optimiser of its own to "
                f"{', '.join(own) or 'no network'}{did_you_mean(name, own)}"
            )


class Groups:
    """Parameter groups of networks by name: rates and weight decay that differ within one optimiser.

    ``no_decay``: no weight decay for norms, biases, parameters of one dimension, embeddings, tokens, and what a network
    lists in ``no_weight_decay()``; ``layer_decay``: the rate of a layer is that of the next one times this (timm's
    layers; terms are no layers); ``rules``: the first one that matches a parameter's name sets its ``lr`` (a rate, or
    ``x0.1``, a factor of what it would be) and ``weight_decay``. Names are those of the student, and those of another
    network begin with its own (``objective.``, ``peer.``); a pattern is a glob, or a regular expression of the whole
    name. ``rates``: of the optimisers, "" the common one, else by the network that has it. ``body``: the rate of what
    is not the student's classifier, or ``x0.1``, a factor of the optimiser's.
    """

    def __init__(
        self,
        no_decay: bool = False,
        layer_decay: float | None = None,
        rules: Sequence[Mapping[str, Any]] = (),
        rates: Mapping[str, float | None] | None = None,
        body: float | str | None = None,
    ) -> None:
        self.no_decay, self.layer_decay, self.rules, self.rates = no_decay, layer_decay, rules, rates or {}
        self.body = body

    def __call__(self, networks: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
        """Group the parameters that want a gradient; groups without a key of their own have the optimiser's."""
        found: dict[tuple[float | None, float | None], dict[str, Any]] = {}
        seen: set[int] = set()
        for name, parameter, base, share, decay in self._settings(networks):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            rate, decay = self._by_rule(name, base, share, decay)
            group = {k: v for k, v in (("lr", rate), ("weight_decay", decay)) if v is not None}
            found.setdefault((rate, decay), {"params": [], **group})["params"].append(parameter)
        groups = list(found.values())
        log.info("%s", describe(groups))
        return groups

    def check(self, networks: Mapping[str, nn.Module]) -> None:
        """``KdError`` for a pattern that matches no trained parameter of any network."""
        names = [name for name, *_ in self._settings(networks)]
        for place, rule in enumerate(self.rules):
            if not any(matches(rule["pattern"], name) for name in names):
                raise KdError(
                    f"recipe.groups.{place}.pattern = {rule['pattern']} matches no trained parameter"
                    f"{did_you_mean(rule['pattern'], names)}"
                )

    def _settings(
        self, networks: Mapping[str, nn.Module]
    ) -> Iterator[tuple[str, nn.Parameter, float | None, float, float | None]]:
        """Yield name, parameter, the optimiser's rate, the share of it, and weight decay (None: the optimiser's)."""
        for network_name, network in networks.items():
            prefix = "" if network_name == "student" else f"{network_name}."
            base = self.rates.get(network_name, self.rates.get(""))
            shares, undecayed = self._shares(network_name, network)
            if self.body is not None and network_name == "student":
                times = self._share_of_body(base)
                shares |= {id(p): shares.get(id(p), 1.0) * times for p in body_parameters(network, "recipe.body_lr")}
            for name, parameter in network.named_parameters():
                if parameter.requires_grad:
                    decay = 0.0 if id(parameter) in undecayed else None
                    yield prefix + name, parameter, base, shares[id(parameter)], decay

    def _shares(self, name: str, network: nn.Module) -> tuple[dict[int, float], set[int]]:
        """Return the share of the rate of each parameter, and those without weight decay."""
        named = dict(network.named_parameters())
        shares, bare = {id(p): 1.0 for p in named.values()}, set()
        if self.no_decay:
            listed = no_decay_names(network)  # timm's networks list patterns
            bare = {id(p) for n, p in named.items() if p.ndim <= 1 or any(fnmatchcase(n, some) for some in listed)}
        if self.layer_decay is not None and name != "objective" and named:
            from timm.optim import param_groups_layer_decay  # start-up: timm

            groups = param_groups_layer_decay(network, layer_decay=self.layer_decay)
            shares |= {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        return shares, bare

    def _share_of_body(self, base: float | None) -> float:
        if (times := factor(self.body)) is not None:
            return times
        assert isinstance(self.body, (int, float))
        if not base:
            raise KdError(f"recipe.body_lr = {self.body} needs recipe.optimizer.lr: the rate of the classifier")
        return self.body / base

    def _by_rule(
        self, name: str, base: float | None, share: float, decay: float | None
    ) -> tuple[float | None, float | None]:
        """Return rate and weight decay of a parameter, None for what is the optimiser's."""
        rule: Mapping[str, Any] = next((rule for rule in self.rules if matches(rule["pattern"], name)), {})
        given, own = rule.get("lr"), rule.get("weight_decay")
        share *= 1.0 if (times := factor(given)) is None else times
        decay = decay if own is None else own
        if given is not None and times is None:
            return given, decay
        if share == 1:
            return None, decay
        if base is None:
            raise KdError("recipe.optimizer.lr has no value, and recipe.layer_decay, body_lr or groups multiplies it")
        return base * share, decay


def matches(pattern: str, name: str) -> bool:
    """Tell whether a name is what a glob, or a regular expression of the whole name, describes."""
    if fnmatchcase(name, pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:  # *.bias
        return False


def no_decay_names(network: nn.Module) -> list[str]:
    """Name norms, embeddings, tokens and biases, and what the network itself lists."""
    listed = getattr(network, "no_weight_decay", None)
    found = set(listed()) if callable(listed) else set()
    for prefix, module in network.named_modules():
        if isinstance(module, (*NORMS, nn.Embedding, nn.EmbeddingBag)) or type(module).__name__.endswith("Norm"):
            found |= {f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
    for name, _ in network.named_parameters():
        last = name.rpartition(".")[2]
        if last == "bias" or last in TOKENS or last.endswith("_embed"):
            found.add(name)
    return sorted(found)


def describe(groups: Sequence[Mapping[str, Any]]) -> str:
    """Write one line: how many parameters have which rate and weight decay of their own."""
    counts: Counter[str] = Counter()
    for group in groups:
        own = ", ".join(f"{key} {group[key]:g}" for key in ("lr", "weight_decay") if key in group)
        counts[own or "as the optimiser"] += sum(p.numel() for p in group["params"])
    parts = "; ".join(f"{count:,} parameters {words}" for words, count in counts.items())
    return f"{len(groups)} parameter groups: {parts}"
