"""Gradient checkpointing: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016, arXiv 1604.06174."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

METHODS: dict[str, dict[str, Any]] = {  # by which a network switches it on, the first that it has
    "activation_checkpointing_enable": {"activation_checkpointing_kwargs": {"use_reentrant": False}},
    "gradient_checkpointing_enable": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},  # transformers < 5.20
    "set_grad_checkpointing": {},  # timm
}


def checkpoint_gradients(network: nn.Module) -> None:
    """Let a network keep the inputs of its layers only, and compute the rest again in the backward pass.

    It is done by a method of the network, of transformers (also inside of a
    :class:`~kd.models.transformers_model.SentenceEncoder`, or around LoRA) or of timm. The gradients are the same. In
    eval mode nothing changes, so that generation keeps its cache of keys and values.

    ``ValueError`` for a network without such a method, and for one with batch norm: its running statistics would move
    twice a step.
    """
    if any(isinstance(module, _BatchNorm) and module.track_running_stats for module in network.modules()):
        raise ValueError("its batch norm would see each batch twice")
    for owner in (network, getattr(network, "encoder", None)):
        for method in METHODS:
            if hasattr(owner, method):
                try:
                    return getattr(owner, method)(**METHODS[method])
                except (AssertionError, ValueError) as error:  # the class has the method, the network cannot
                    raise ValueError(f"{type(owner).__name__}: {str(error).splitlines()[0]}") from error
    raise ValueError(f"{type(network).__name__} is neither of transformers nor of timm, which can do it")
