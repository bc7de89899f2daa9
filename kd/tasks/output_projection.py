"""The output projection of a language model, and its hidden states at chosen positions, before that projection."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kd.losses.networks import in_eval, unwrapped

CLOSE = 1e-4  # how far logits may be from those of the whole network, relative to the largest
FEW = 16  # positions of which logits are compared

_HEADS: WeakKeyDictionary[nn.Module, Head | None] = WeakKeyDictionary()


class Head(nn.Module):
    """From hidden states (…, width) to logits (…, vocabulary), as the network itself makes them.

    ``projection``: the network's own layer. ``scale``: factor of the logits (Cohere, Granite); ``softcap``: they become
    ``softcap · tanh(logits / softcap)`` (Gemma 2); None: as they are.
    """

    caches = False  # whether the network would keep keys and values, unless told not to

    def __init__(self, projection: nn.Module, scale: float = 1.0, softcap: float | None = None) -> None:
        super().__init__()
        self.projection, self.scale, self.softcap = projection, scale, softcap

    @property
    def weight(self) -> Tensor:
        """The matrix (vocabulary, width)."""
        return self.projection.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias (vocabulary,), or None."""
        return getattr(self.projection, "bias", None)

    def forward(self, hidden: Tensor) -> Tensor:
        """Make the logits."""
        logits = self.projection(hidden)
        logits = logits * self.scale if self.scale != 1.0 else logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def linear_of(head: nn.Module | None) -> nn.Linear | None:
    """Return the linear layer of an output projection, :class:`Head` or bare; None where it is another module."""
    layer = head.projection if isinstance(head, Head) else head
    plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward and "forward" not in vars(layer)
    return layer if plain else None  # type: ignore[return-value]


def hidden_rows(
    network: nn.Module, inputs: Mapping[str, Tensor], positions: Tensor | None
) -> tuple[Tensor, Head] | None:
    """Run a network up to its output projection; the hidden states at ``positions``, and the projection.

    ``positions`` (rows,) int64: places in (samples · positions); None: all. The hidden states are (rows, width).

    Returns None where the network has no output projection, is sharded (FSDP2), or makes other logits than this
    projection makes of its input. That is tried once for a network, on the inputs of the first call.
    """
    if network._compiled_call_impl is not None:  # the layer would be another one in each step
        return None
    if hasattr(network, "unshard"):  # FSDP2: the layer's weights are whole only while the network runs
        return None
    getter: Any = getattr(network, "get_output_embeddings", None)
    if callable(getter) and (layer := getter()) is not None and (layer._forward_hooks or layer._forward_pre_hooks):
        return None  # it is tapped: what it makes is wanted
    if network not in _HEADS:
        _HEADS[network] = _checked(network, inputs)
    head = _HEADS[network]
    return None if head is None else (_run(network, inputs, positions, head), head)


def _run(network: nn.Module, inputs: Mapping[str, Tensor], positions: Tensor | None, head: Head) -> Tensor:
    with _intercepted(head.projection, positions) as found:
        network(**inputs, **({"use_cache": False} if head.caches else {}))  # keys and values of a generation
    return found[0]


@contextmanager
def _intercepted(projection: nn.Module, positions: Tensor | None) -> Iterator[list[Tensor]]:
    """Put aside what the layer is given, and let it answer with logits over no vocabulary."""
    found: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, -2)
        rows = rows if positions is None else rows.index_select(0, positions)
        found.append(rows)
        return hidden.new_zeros(*hidden.shape[:-1], 0)

    given = projection.__dict__.get("forward")  # accelerate and others set one of their own
    projection.forward = forward
    try:
        yield found
    finally:
        if given is None:
            del projection.forward
        else:
            projection.forward = given


def _checked(network: nn.Module, inputs: Mapping[str, Tensor]) -> Head | None:
    """Return the output projection of a network, where it gives the network's own logits."""
    getter: Any = getattr(network, "get_output_embeddings", None)
    projection = getter() if callable(getter) else None
    if not isinstance(projection, nn.Module):
        return None
    config: Any = getattr(network, "config", None)
    scaling = getattr(config, "logits_scaling", None)
    scale = getattr(config, "logit_scale", None) or (1 / scaling if scaling else 1.0)
    head = Head(projection, float(scale), getattr(config, "final_logit_softcapping", None))
    head.caches = "use_cache" in inspect.signature(unwrapped(network).forward).parameters
    few = {name: tensor[:2] for name, tensor in inputs.items()}
    if all(tensor.ndim == 2 for tensor in few.values()):  # the whole's logits would be the run's peak of memory
        few = {name: tensor[:, :FEW] for name, tensor in few.items()}
        if "attention_mask" in few:  # of padding on the left alone some networks make no number
            few["attention_mask"] = torch.ones_like(few["attention_mask"])
    try:
        with in_eval(network), torch.no_grad():
            whole = network(**few)
            whole = whole["logits"] if isinstance(whole, Mapping) else getattr(whole, "logits", whole)
            logits = head(_run(network, few, None, head)).view_as(whole)
            same = (logits - whole).abs().max() <= CLOSE * whole.abs().max().clamp(min=1e-6)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, TypeError, AttributeError):  # it does not run on no vocabulary
        return None
    return head if bool(same) else None
