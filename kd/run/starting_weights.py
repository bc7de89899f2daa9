"""Weights that a network begins with: of a file in its own or another library's names, with or without a classifier."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd.errors import KdError
from kd.losses.networks import classifiers
from kd.models.key_maps import COUNTER, Mapped, eps_of, mapped
from kd.run import weights

log = logging.getLogger(__name__)

NEW_HEAD = {  # what to do with weights of other classes
    "student": "student.new_head=true trains it further with a new classifier",
    "teacher": "fine-tune it first (model@student=… student.checkpoint=FILE student.new_head=true loss=[ce]) and give "
    "that run as teacher.checkpoint",
}


@dataclass(frozen=True)
class Fitted:
    """A state dict in all names of a network; ``left_out``: names in the file → shapes; ``library``: whose names."""

    state: dict[str, Tensor]
    left_out: dict[str, list[int]]
    library: str | None


def put(
    network: nn.Module, state: dict[str, Tensor], about: Mapping[str, Any], source: Any, role: str, new_head: bool
) -> None:
    """Load the weights of a file into a network, strictly, and note in its ``started_from`` where they came from.

    ``about``: what the file says of itself; one that says nothing may have the names of another library.
    ``new_head``: the classifier stays as it is in the network, all else comes from the file.

    ``KdError`` where a tensor does not fit, which names ``student.new_head`` if it is one of the classifier.
    """
    fit = fitted(network, state, about, source, role, new_head)
    weights.load(network, fit.state, source, role)
    noted: dict[str, Any] = {"file": Path(str(source)).name, "digest": weights.digest(state), "names_of": fit.library}
    noted |= {"left_out": fit.left_out} if new_head else {}
    network.started_from = {key: value for key, value in noted.items() if value is not None}  # type: ignore[assignment]
    if new_head:
        shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in fit.left_out.items())
        left = f"{shapes} left out" if shapes else "there is no classifier in the file"
        if cut := len(getattr(network, "pruned", ())):
            left += f", as are those of what was cut from the network ({cut})"
        log.info("%s: %d tensors read, %s; the %s's classifier is new", source, len(state), left, role)


def fitted(
    network: nn.Module, state: dict[str, Tensor], about: Mapping[str, Any], source: Any, role: str, new_head: bool
) -> Fitted:
    """Give a state dict the names of a network, and its classifier where that is to be new; see :func:`put`."""
    own = network.state_dict()
    found = None if about else mapped(state, network)
    names = {name: name for name in state} if found is None else found.names
    given = dict(state) if found is None else dict(found.state)
    library = None if found is None else found.library
    if found is not None:
        _report(found, network, source)
    if not about:  # files of before PyTorch 0.4.1
        counters = [name for name in own if name.endswith(COUNTER) and name not in given]
        given |= {name: torch.zeros_like(own[name]) for name in counters}
    given = {name: tensor for name, tensor in given.items() if name not in getattr(network, "pruned", ())}
    head = _head(network, own)
    if new_head:
        if not head:
            raise KdError(f"{role}.new_head = true: {type(network).__name__} has no classifier that can be told")
        renew_heads(network)
        own = network.state_dict()
        left_out = {names[name]: list(given.pop(name).shape) for name in head if name in given}
        return Fitted(given | {name: own[name] for name in head}, left_out, library)
    _refuse_other_head({name: (given.get(name), own[name]) for name in head}, source, role)
    return Fitted(given, {}, library)


def renew_heads(network: nn.Module) -> None:
    """Draw the classifier anew as torch draws a layer: a network's own way may be for a training from scratch.

    timm's EfficientNets begin with logits of ±10, and gradients of that size would undo the body's training.
    """
    for head in classifiers(network):
        for module in head.module.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.reset_parameters()


def _head(network: nn.Module, own: Mapping[str, Tensor]) -> list[str]:
    """Name the tensors of the classifier; [] where there is none."""
    with suppress(ValueError):
        places = tuple(f"{head.name}." for head in classifiers(network))
        return [name for name in own if name.startswith(places)]
    return []


def _refuse_other_head(pairs: Mapping[str, tuple[Tensor | None, Tensor]], source: Any, role: str) -> None:
    for name, (theirs, ours) in pairs.items():
        if theirs is None or theirs.shape != ours.shape:
            shape = "lacks it" if theirs is None else f"has {tuple(theirs.shape)}"
            raise KdError(
                f"{source} does not fit the {role}: {name} of its classifier is {tuple(ours.shape)}, the file {shape}; "
                f"{NEW_HEAD[role]}"
            )


def _report(found: Mapped, network: nn.Module, source: Any) -> None:
    """Say whose names a file has, and warn where its batch norms had another eps."""
    log.info("%s has the names of %s: they were changed to timm's", source, found.library)
    own = eps_of(network)
    if found.eps is not None and own is not None and own != found.eps:
        log.warning(
            "%s was trained with batch norms of eps %g, the network has %g: set its bn_eps (student.model.bn_eps=%g), "
            "or choose timm's tf_ network where there is one, which pads images as TensorFlow does as well",
            *(source, found.eps, own, found.eps),
        )
