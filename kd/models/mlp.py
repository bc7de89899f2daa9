"""Fully connected ReLU nets: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 3.

Dropout and the norm constraint: Hinton et al., "Improving neural networks by preventing co-adaptation of feature
detectors", 2012; Srivastava et al., "Dropout", JMLR 2014, sec. 5.1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn


class MaxNormLinear(nn.Linear):
    """A linear layer, (N, in) -> (N, out), in which no unit's incoming weight vector is longer than ``max_norm`` (L2).

    The optimiser moves the plain ``weight``; it is projected back before anything reads it: in the training forward,
    on ``train()`` and ``eval()``, and in ``state_dict()``. Evaluation and export see an ordinary linear layer.
    """

    def __init__(self, in_features: int, out_features: int, max_norm: float) -> None:
        super().__init__(in_features, out_features)
        self.max_norm = max_norm
        self.register_state_dict_pre_hook(_project)

    def project(self) -> None:
        """Shorten the weight vectors that are too long, in place."""
        weight = self.weight.data  # so that the second of two forwards before one backward does not count as a change
        norm = weight.norm(dim=1, keepdim=True)
        # a hair inside, so that projecting once more changes no bit (torch.renorm_ may)
        weight.mul_(torch.where(norm > self.max_norm, self.max_norm * (1 - 1e-6) / norm, 1.0))

    def train(self, mode: bool = True) -> MaxNormLinear:
        """Project, then change the mode."""
        self.project()
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, out) of (N, in)."""
        if self.training:
            self.project()
        return super().forward(input)


def _project(layer: Any, *_: Any) -> None:
    layer.project()


class MLP(nn.Sequential):
    """Inputs (N, ...) -> logits (N, classes). Modules: flatten, fc1, relu1, fc2, relu2, ..., fc; dropouts if any."""

    stages: tuple[str, ...]


def mlp(
    hidden: Sequence[int],
    dropout: float = 0.0,
    input_dropout: float = 0.0,
    max_norm: float | None = None,
    *,
    num_classes: int,
    input_shape: tuple[int, int, int],
) -> MLP:
    """Make an MLP with ``hidden`` ReLU layers of these widths; its stages are the outputs of the ReLUs.

    ``dropout`` (after each ReLU) and ``input_dropout`` (of the pixels) are probabilities in [0, 1).
    ``max_norm``: the longest incoming weight vector (L2) of every hidden and output unit, above 0; ``None``: free.
    Raises ``ValueError`` when a number is outside its range.
    """
    if isinstance(hidden, str) or not all(isinstance(width, int) and width >= 1 for width in hidden):
        raise ValueError(f"hidden = {hidden} is not allowed: it must be a list of widths, whole numbers of 1 or more")
    for name, value in (("dropout", dropout), ("input_dropout", input_dropout)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} = {value} is not allowed: it must be 0 or more and below 1")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm = {max_norm} is not allowed: it must be above 0, or null")

    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs) if max_norm is None else MaxNormLinear(inputs, outputs, max_norm)

    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    if input_dropout > 0:
        layers["input_dropout"] = nn.Dropout(input_dropout)
    width = prod(input_shape)
    for number, units in enumerate(hidden, start=1):
        layers[f"fc{number}"] = linear(width, units)
        layers[f"relu{number}"] = nn.ReLU()
        if dropout > 0:
            layers[f"dropout{number}"] = nn.Dropout(dropout)
        width = units
    layers["fc"] = linear(width, num_classes)
    model = MLP(layers)
    model.stages = tuple(f"relu{number}" for number in range(1, len(hidden) + 1))
    return model
