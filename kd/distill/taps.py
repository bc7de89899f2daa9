"""Taps: named intermediate tensors of any network, recorded by forward hooks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kd.errors import KdError, did_you_mean
from kd.losses.layouts import NCHW, Layout, parse_layout
from kd.models.base import before_activation, before_classifier, layout, stages

Name = str | int
BEFORE_CLASSIFIER = "before_classifier"
PREACTIVATION = "preactivation"

# names of the projections in attention blocks: BERT and its kin, DistilBERT, Llama, BART, T5
PROJECTIONS = {part: (part, f"{part[0]}_lin", f"{part[0]}_proj", part[0]) for part in ("query", "key", "value")}


def resolve(names: Sequence[Name] | None, network: nn.Module, side: str) -> list[str]:
    """Module names for a term's taps: ``None`` is every stage, an integer is a stage number (negative: from the end).

    Stages of a transformer of the library transformers are its ``hidden_states``: 0 is the output of the embeddings, i
    that of layer i, before a final norm; of an encoder with a decoder those of the encoder.

    ``"-1:query"``, ``"-1:key"``, ``"-1:value"`` are the projections in the (self-)attention of a stage,
    ``"all:query"`` those of all layers, ``"decoder.layers.2:key"`` that of a named module. Attention scores can be
    made of them, so that attention may stay fused.

    ``"before_classifier"`` is what the last linear layer reads; ``"-1:preactivation"`` what enters the activation that
    ends a stage, ``"all:preactivation"`` that of all stages.

    Raises ``KdError`` when the network has no such stage or module; the sentence lists near names.
    """
    if names is None:
        return _stages(network, side)
    if isinstance(names, (str, int)):
        names = [names]
    resolved = []
    for name in names:
        if isinstance(name, str) and name.partition(":")[2] in PROJECTIONS:
            resolved += _projections(network, name, side)
            continue
        if isinstance(name, str) and name.partition(":")[2] == PREACTIVATION:
            resolved += _preactivations(network, name, side)
            continue
        if name == BEFORE_CLASSIFIER:
            resolved.append(_before_classifier(network, side))
            continue
        name = _stage(network, name, side) if isinstance(name, int) else name
        _module(network, name, side)
        resolved.append(name)
    return resolved


def _stage(network: nn.Module, number: int, side: str) -> str:
    known = _stages(network, side)
    if not -len(known) <= number < len(known):
        raise KdError(f"{side} tap {number} does not exist: the stages are {', '.join(known)}")
    return known[number]


def _preactivations(network: nn.Module, tap: str, side: str) -> list[str]:
    """Name what enters the activations of one stage, by number or name, or of all."""
    place = tap.partition(":")[0]
    if place == "all":
        return [before_activation(network, stage) for stage in _stages(network, side)]
    stage = _stage(network, int(place), side) if re.fullmatch(r"-?\d+", place) else place
    _module(network, stage, side)
    return [before_activation(network, stage)]


def _before_classifier(network: nn.Module, side: str) -> str:
    try:
        return before_classifier(network)
    except ValueError as error:
        raise KdError(
            f"{side} tap {BEFORE_CLASSIFIER} does not exist: {error}; tap a stage, {side}_taps=[-1]"
        ) from None


def _projections(network: nn.Module, tap: str, side: str) -> list[str]:
    """Find the modules that make the queries, keys or values: of one block, or of all that have them."""
    place, _, part = tap.partition(":")

    def inside(block: str) -> list[str]:  # the first is that of self-attention; a stage "…:input" is no block
        names = [n for n, _ in _module(network, block, side).named_modules()] if ":" not in block else []
        return [f"{block}.{n}" for n in names if n.rpartition(".")[2] in PROJECTIONS[part]][:1]

    if place == "all" or re.fullmatch(r"-\d+", place):  # from the end: of those that have them
        blocks = _stages(network, side)
        found = [name for block in blocks for name in inside(block)]
        if place != "all":
            found = found[int(place) :][:1] if -int(place) <= len(found) else []
    else:
        blocks = [_stage(network, int(place), side) if place.isdecimal() else place]
        found = inside(blocks[0])
    if not found:
        raise KdError(
            f"{side} tap {tap} does not exist: in {', '.join(blocks)} there is no such module named "
            f"{', '.join(PROJECTIONS[part])}: name the one that makes the {part} yourself"
        )
    return found


def _stages(network: nn.Module, side: str) -> list[str]:
    try:
        return [stage.name for stage in stages(network)]
    except ValueError as error:
        raise KdError(f"{side}: {error}") from None


def _module(network: nn.Module, tap: str, side: str) -> nn.Module:
    modules = dict(network.named_modules())
    place, at, declared = tap.partition("@")
    name, _, port = place.partition(":")
    if port.partition(".")[0] not in ("", "input", "output") or port.startswith("."):
        raise KdError(
            f"{side} tap {tap} is not allowed: after the colon stands input or output, and of several tensors "
            "which, as output.1 or output.attentions"
        )
    if name not in modules:
        raise KdError(f"{side} tap {tap} does not exist: there is no module {name}{did_you_mean(name, modules)}")
    if at:
        try:
            parse_layout(declared)
        except ValueError as error:
            raise KdError(f"{side} tap {tap}: {error}") from None
    return modules[name]


def unfuse(network: nn.Module, taps: Sequence[str]) -> list[str]:
    """Switch fused attention off around these taps, so that their attention maps are made.

    In timm that of each attention block around a tap; in transformers that of the innermost model around it, which then
    runs its "eager" attention, slower and with more memory. Maps are ``"encoder.layer.0.attention.self:output.1"``.
    Returns the modules where that was necessary.
    """
    changed = []
    for tap in taps:
        name = tap.partition("@")[0].partition(":")[0]
        for around in _around(name):
            module: Any = network.get_submodule(around)
            if getattr(module, "fused_attn", False):
                module.fused_attn = False
                changed.append(around)
            if _implementation(module) not in (None, "eager"):
                module.set_attn_implementation("eager")
                changed.append(around or type(module).__name__)
    return changed


def _around(name: str) -> list[str]:
    """Return the names of a module and of all around it, the network ("") last."""
    parts = name.split(".") if name else []
    return [".".join(parts[:length]) for length in range(len(parts), -1, -1)]


def _implementation(module: nn.Module) -> str | None:
    """Name the attention that a model of transformers runs: sdpa, eager, flash_attention_2 …; None of other modules."""
    config = getattr(module, "config", None)
    return getattr(config, "_attn_implementation", None) if hasattr(module, "set_attn_implementation") else None


class AllTapped(Exception):
    """Raised inside a network when all its taps have fired and nobody wants more of it."""


class Taps:
    """Records tensors of one network while it runs.

    ``names`` are module names; ``"layer2.0.act:input"`` is the first input of that module, the plain name its output.
    A module that answers with a tuple, list or mapping is represented by the first tensor in it; another one is
    ``"MODULE:output.1"``, ``"MODULE:output.attentions"``, or deeper, ``"MODULE:output.attentions.3"``. A name may end
    with a layout, ``"MODULE@NHWC"``: see :func:`kd.models.base.layout`.

    Maps (B, H, W, C) are recorded as views (B, C, H, W). ``layouts``: of the tensors as they are recorded, by name,
    known after the first pass.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], side: str) -> None:
        self.names = list(dict.fromkeys(names))
        self.side = side
        self._network = network
        self.active = False  # hooks do nothing while the network runs for another purpose (validation, say)
        self.stop = False  # end the forward pass (AllTapped) as soon as every tap has fired
        self._recorded: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._fired: dict[str, int] = dict.fromkeys(self.names, 0)
        self._clone: set[str] = set()
        self._overwritten: set[str] = set()
        self._inspected = False  # the dry pass has found out what to clone
        self.layouts: dict[str, Layout] = {}
        self._made: dict[tuple[str, int], Layout] = {}  # as the network makes them, by name and number of dimensions
        self._handles: list[RemovableHandle] = []
        self.attach(network)

    def attach(self, network: nn.Module) -> None:
        """Record in this network from now on: the one that the taps were made for, or a copy of it."""
        self.detach()
        if self.names:
            self._handles.append(network.register_forward_pre_hook(self._begin))
        for name in self.names:
            module = _module(network, name, self.side)
            if name.partition("@")[0].partition(":")[2].startswith("input"):
                self._handles.append(module.register_forward_pre_hook(self._input_hook(name), with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._output_hook(name)))

    def detach(self) -> None:
        """Record nothing from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Count anew: a task tries a language model once before the pass that it answers with."""
        if self.active and not self._inspected:
            self._fired = dict.fromkeys(self.names, 0)

    def _input_hook(self, name: str):
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.active:
                self._record(name, {**dict(enumerate(args)), **kwargs})

        return hook

    def _output_hook(self, name: str):
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self.active:
                self._record(name, output)

        return hook

    def _record(self, name: str, value: Any) -> None:
        tensor = self._tensor(name, value)
        kept = tensor.clone() if name in self._clone else tensor
        if not torch.compiler.is_compiling():  # a compiled network counts versions of its own; the dry pass is eager
            self._versions[name] = kept._version
        self._recorded[name] = self._as_map(name, kept)
        self._fired[name] += 1
        if self.stop and len(self._recorded) == len(self.names):
            raise AllTapped

    def _tensor(self, name: str, value: Any) -> Tensor:
        """Find the tensor that a tap names in what a module takes or answers."""
        first, *parts = name.partition("@")[0].partition(":")[2].split(".")
        for number, part in enumerate(parts):
            inside = _entries(value)
            if part not in inside:
                where = ".".join([first, *parts[:number]])
                raise KdError(
                    f"{self.side} tap {name} does not exist: {where} is a {type(value).__name__} with "
                    f"{', '.join(inside) or 'nothing inside'}"
                )
            value = inside[part]
        if isinstance(value, (tuple, list, Mapping)):
            entries = value.values() if isinstance(value, Mapping) else value
            value = next((v for v in entries if isinstance(v, Tensor)), value)
        if value is None and any(_implementation(m) not in (None, "eager") for m in self._network.modules()):
            raise KdError(
                f"{self.side} tap {name} is None: fused attention makes no maps; a term that declares "
                'needs_attention_maps switches it off, set_attn_implementation("eager") does so by hand'
            )
        if not isinstance(value, Tensor):
            raise KdError(f"{self.side} tap {name} is a {type(value).__name__}, not a tensor: tap a module inside it")
        return value

    def _as_map(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor with its channels in the second place, where it is a map; note its layout."""
        made = self._made.get((name, tensor.ndim))
        if made is None:
            try:
                made = layout(self._network, name, tensor.shape)
            except ValueError as error:
                raise KdError(f"{self.side} {error}") from None
            self._made[name, tensor.ndim] = made
            self.layouts[name] = NCHW if made.kind == "NHWC" else made
        return tensor.permute(0, 3, 1, 2) if made.kind == "NHWC" else tensor

    def take(self) -> dict[str, Tensor]:
        """Take the tensors of the last forward pass by name; forget them. ``KdError`` when one did not fire."""
        silent = [name for name in self.names if name not in self._recorded]
        if silent:
            raise KdError(f"{self.side} tap {silent[0]} did not fire: {self._why(silent[0])}")
        self._compare_versions()
        if self._inspected and (late := sorted(self._overwritten - self._clone)):
            raise KdError(
                f"{self.side} tap {late[0]} is overwritten in place by what follows it in training mode alone, as an "
                "in-place dropout does: tap the module behind it, or make that one not in place"
            )
        recorded, self._recorded, self._versions = self._recorded, {}, {}
        return recorded

    def _why(self, name: str) -> str:
        """Why a module does not run: most likely a fused attention, which has no map of weights to show."""
        for module in _around(name.partition("@")[0].partition(":")[0]):
            if getattr(self._network.get_submodule(module), "fused_attn", False):
                return (
                    f"{module} uses fused attention, which does not run that module; timm computes the attention map "
                    "step by step where it is started with the environment variable TIMM_FUSED_ATTN=0"
                )
        return "its module does not run in the forward pass"

    def _compare_versions(self) -> None:
        self._overwritten |= {n for n, version in self._versions.items() if self._recorded[n]._version != version}

    def inspect(self) -> bool:
        """After a dry pass: refuse taps that fire more than once; clone what the network overwrites in place.

        Returns whether something was overwritten, so that the pass must be repeated.
        """
        for name, count in self._fired.items():
            if count > 1:
                raise KdError(f"{self.side} tap {name} fires {count} times in one pass: tap a module around it")
        self._compare_versions()
        self._inspected = True
        overwritten, self._overwritten = self._overwritten - self._clone, set()
        self._clone |= overwritten
        self._fired = dict.fromkeys(self.names, 0)
        return bool(overwritten)


def _entries(value: Any) -> dict[str, Any]:
    """Return what is inside a tuple, a named tuple, a mapping: by number and by name."""
    if isinstance(value, Mapping):
        numbered = {str(number): entry for number, entry in enumerate(value.values())}
        return {**numbered, **{str(key): entry for key, entry in value.items()}}
    if not isinstance(value, (tuple, list)):
        return {}
    named = dict(zip(getattr(value, "_fields", ()), value, strict=False))
    return {**{str(number): entry for number, entry in enumerate(value)}, **named}
