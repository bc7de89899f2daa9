"""Weight initialisation shared by the convolutional networks."""

from __future__ import annotations

from torch import nn


def kaiming_fan_out(model: nn.Module) -> None:
    """Draw every convolution from N(0, 2 / fan_out), biases 0 (He 2015); other layers keep torch's defaults.

    fan_out is ``out_channels * k * k``, also in grouped convolutions, as in the authors' code of WRN and MobileNetV2.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def small_linear(layer: nn.Linear) -> None:
    """Draw a classifier from N(0, 0.01²), bias 0: as in VGG and MobileNetV2."""
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
