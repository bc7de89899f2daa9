"""Bare networks: the classifier, batch norms, another module in a place, eval mode until a block ends."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

CLASSIFIERS = ("fc", "head", "heads", "classifier", "score")


@contextmanager
def in_eval(*networks: nn.Module) -> Iterator[None]:
    """Put networks into eval mode until the block ends; then each module is in the mode that it had.

    Batch norms that a user has frozen stay frozen.
    """
    before = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def unwrapped(network: Any) -> Any:
    """Return the network inside of an adapter of peft; any other as it is."""
    return network.get_base_model() if hasattr(network, "peft_config") else network


class Classifier(NamedTuple):
    """The last layer of a network: the name of the module, and the module."""

    name: str
    module: nn.Module


def classifier(network: nn.Module) -> Classifier:
    """Find the layer that makes the logits, of two the first: its name, to tap it by (``NAME:input``), and it.

    Raises ``ValueError`` when there is none.
    """
    return classifiers(network)[0]


def classifiers(network: nn.Module) -> list[Classifier]:
    """Find the layers that make the logits: two where a distillation token has its own.

    timm says which (``get_classifier``); otherwise the last linear layer in ``fc``, ``head``, ``heads``,
    ``classifier`` or ``score``, or of the whole network.

    Raises ``ValueError`` when there is none.
    """
    known = {id(module): name for name, module in network.named_modules() if name}
    getter: Any = getattr(network, "get_classifier", None)
    if callable(getter):
        found = getter()
        several = found if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
        heads = [m for m in several if isinstance(m, nn.Module) and not isinstance(m, nn.Identity) and id(m) in known]
        if heads:
            return [Classifier(known[id(head)], head) for head in heads]
    parts = [getattr(network, name, None) for name in CLASSIFIERS]
    for part in [*(part for part in parts if isinstance(part, nn.Module)), network]:
        linear = [m for m in part.modules() if isinstance(m, nn.Linear) and id(m) in known]
        if linear:
            return [Classifier(known[id(linear[-1])], linear[-1])]
    raise ValueError(f"{type(network).__name__} has no classifier: it has no linear layer behind its features")


def linear_classifier(method: str, networks: Mapping[str, nn.Module], side: str, width: int) -> nn.Linear:
    """Find the classifier of the student or the teacher, where it is one linear layer on features of ``width``.

    ``ValueError``, with the method and both widths, where it is another layer, or there are several teachers.
    """
    if side not in networks:
        raise ValueError(f"{method} needs the {side}'s classifier: there must be one {side} network")
    name, module = classifier(networks[side])
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"{method} needs a {side} with one linear layer behind its features: {name} is a {type(module).__name__}"
        )
    if module.in_features != width:
        raise ValueError(
            f"{method} cannot put features of width {width} into the {side}'s classifier {name}, which takes "
            f"{module.in_features}: tap the features that it reads, {side}_taps=[before_classifier]"
        )
    return module


def frozen_copy(module: nn.Module) -> nn.Module:
    """Make a copy that is not trained."""
    return copy.deepcopy(module).requires_grad_(False)


def batch_norm_before(network: nn.Module, tap: str, channels: int) -> _BatchNorm | None:
    """Find the batch norm of ``channels`` channels behind the last convolution before a tap; None: there is none.

    Found among the modules around the tap, in the order of their registration; of a residual block it is that of the
    branch, not of the shortcut.
    """
    name, _, port = tap.partition("@")[0].partition(":")
    around = name.rpartition(".")[0] if port.startswith("input") else name
    found = None
    for inner, module in network.get_submodule(around).named_modules():
        if isinstance(module, nn.Conv2d) and not _beside(inner):
            found = None
        elif isinstance(module, _BatchNorm) and module.num_features == channels and not _beside(inner):
            found = module
    return found


def _beside(name: str) -> bool:
    return any(part in ("shortcut", "downsample") for part in name.split("."))


def with_module(network: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Return the same network, all weights shared, with another module in place of ``name``; itself it stays as it is.

    For :meth:`kd.losses.base.Term.deployed`: ``with_module(student, "fc", nn.Sequential(projector, head))``.
    """
    first, _, rest = name.partition(".")
    changed = copy.copy(network)
    changed._modules = dict(network._modules)
    inner = network.get_submodule(first)
    changed._modules[first] = with_module(inner, rest, module) if rest else module
    return changed
