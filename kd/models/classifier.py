"""The classifier of a network: where it is, and the same network with another one."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

NAMES = ("fc", "classifier", "head.fc", "head")  # of the networks of kd.models, torchvision, timm


def classifier(network: nn.Module) -> str:
    """Name of the last linear layer: what timm's ``get_classifier`` returns, a usual name, or the last ``nn.Linear``.

    Its input is the tap ``f"{name}:input"``. ``ValueError`` when there is none.
    """
    modules = dict(network.named_modules())
    get_classifier: Any = getattr(network, "get_classifier", None)
    if get_classifier is not None:
        found = get_classifier()
        return next(name for name, module in modules.items() if module is found)
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"{type(network).__name__} has no linear layer that could be its classifier")
    return next((name for name in NAMES if name in linear), linear[-1])


def with_module(network: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The same network, all its weights shared, with another module in the place of ``name``; itself it stays as it is.

    For :meth:`kd.losses.base.Term.deployed`: ``with_module(student, "fc", nn.Sequential(projector, head))``.
    """
    first, _, rest = name.partition(".")
    changed = copy.copy(network)
    changed._modules = dict(network._modules)
    inner = network.get_submodule(first)
    changed._modules[first] = with_module(inner, rest, module) if rest else module
    return changed
