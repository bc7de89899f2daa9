"""Taps: named intermediate tensors of any network, recorded by forward hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kd.errors import KdError, did_you_mean
from kd.models.stages import stages

Name = str | int


def resolve(names: Sequence[Name] | None, network: nn.Module, side: str) -> list[str]:
    """Module names for a term's taps: ``None`` is every stage, an integer is a stage number (negative: from the end).

    Raises ``KdError`` when the network has no such stage or module; the sentence lists near names.
    """
    if names is None:
        return _stages(network, side)
    if isinstance(names, (str, int)):
        names = [names]
    resolved = []
    for name in names:
        if isinstance(name, int):
            known = _stages(network, side)
            if not -len(known) <= name < len(known):
                raise KdError(f"{side} tap {name} does not exist: the stages are {', '.join(known)}")
            name = known[name]
        _module(network, name, side)
        resolved.append(name)
    return resolved


def _stages(network: nn.Module, side: str) -> list[str]:
    try:
        return list(stages(network))
    except ValueError as error:
        raise KdError(f"{side}: {error}") from None


def _module(network: nn.Module, name: str, side: str) -> nn.Module:
    modules = dict(network.named_modules())
    module, _, port = name.partition(":")
    if port not in ("", "input", "output"):
        raise KdError(f"{side} tap {name} is not allowed: after the colon stands input or output")
    if module not in modules:
        raise KdError(f"{side} tap {name} does not exist: there is no module {module}{did_you_mean(module, modules)}")
    return modules[module]


class AllTapped(Exception):
    """Raised inside a network when all its taps have fired and nobody wants more of it."""


class Taps:
    """Records tensors of one network while it runs.

    ``names`` are module names; ``"layer2.0.act:input"`` is the first input of that module, the plain name its output.
    A module that answers with a tuple or list is represented by the first tensor in it.
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
        for name in self.names:
            module = _module(network, name, side)
            if name.endswith(":input"):
                module.register_forward_pre_hook(self._input_hook(name), with_kwargs=True)
            else:
                module.register_forward_hook(self._output_hook(name))

    def _input_hook(self, name: str):
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.active:
                self._record(name, args or tuple(kwargs.values()))

        return hook

    def _output_hook(self, name: str):
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self.active:
                self._record(name, output)

        return hook

    def _record(self, name: str, value: Any) -> None:
        tensor = value
        if isinstance(value, (tuple, list)):
            tensor = next((v for v in value if isinstance(v, Tensor)), None)
        if not isinstance(tensor, Tensor):
            raise KdError(f"{self.side} tap {name} is a {type(value).__name__}, not a tensor: tap a module inside it")
        kept = tensor.clone() if name in self._clone else tensor
        self._recorded[name], self._versions[name] = kept, kept._version
        self._fired[name] += 1
        if self.stop and len(self._recorded) == len(self.names):
            raise AllTapped

    def take(self) -> dict[str, Tensor]:
        """The tensors of the last forward pass by name; forgets them. ``KdError`` when one did not fire."""
        silent = [name for name in self.names if name not in self._recorded]
        if silent:
            raise KdError(f"{self.side} tap {silent[0]} did not fire: {self._why(silent[0])}")
        self._compare_versions()
        recorded, self._recorded = self._recorded, {}
        return recorded

    def _why(self, name: str) -> str:
        """Why a module does not run: most likely a fused attention, which has no map of weights to show."""
        module = name.partition(":")[0]
        while module:
            if getattr(self._network.get_submodule(module), "fused_attn", False):
                return (
                    f"{module} uses fused attention, which does not run that module; timm computes the attention map "
                    "step by step where it is started with the environment variable TIMM_FUSED_ATTN=0"
                )
            module = module.rpartition(".")[0]
        return "its module does not run in the forward pass"

    def _compare_versions(self) -> None:
        self._overwritten |= {n for n, tensor in self._recorded.items() if tensor._version != self._versions[n]}

    def inspect(self) -> bool:
        """After a dry pass: refuse taps that fire more than once; clone what the network overwrites in place.

        Returns whether something was overwritten, so that the pass must be repeated.
        """
        for name, count in self._fired.items():
            if count > 1:
                raise KdError(f"{self.side} tap {name} fires {count} times in one pass: tap a module around it")
        self._compare_versions()
        overwritten, self._overwritten = self._overwritten - self._clone, set()
        self._clone |= overwritten
        self._fired = dict.fromkeys(self.names, 0)
        return bool(overwritten)
