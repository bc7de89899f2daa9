"""ShuffleNet for small images: Zhang et al., "ShuffleNet: An Extremely Efficient CNN for Mobile Devices", CVPR 2018.

As in the CRD tables: 3 groups, widths 240-480-960, stages of 4, 8 and 4 units, a 1x1 stem without stride or pooling,
and a ReLU also after the depthwise convolution (the paper has none there). Initialised by torch's defaults, as there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GROUPS = 3


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Read the channels of (N, C, H, W), seen as ``groups`` rows, column by column. C must be a multiple of groups."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class Unit(nn.Module):
    """(N, in, H, W) -> (N, out, H, W), or with ``down`` half the size; the pooled input is then part of the output."""

    def __init__(self, in_channels: int, out_channels: int, down: bool, first_groups: int) -> None:
        super().__init__()
        own = out_channels - in_channels if down else out_channels  # channels that the convolutions make
        width = own // 4
        self.groups = first_groups
        self.conv1 = nn.Conv2d(in_channels, width, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 2 if down else 1, 1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, own, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(own)
        self.shortcut = nn.AvgPool2d(3, 2, 1) if down else None
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps of the next block, (B, C, H, W) → (B, C', H', W')."""
        y = channel_shuffle(self.act1(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(self.act2(self.bn2(self.conv2(y)))))
        return self.act(y + x if self.shortcut is None else torch.cat([y, self.shortcut(x)], dim=1))


def stage(in_channels: int, out_channels: int, units: int, first_groups: int = GROUPS) -> nn.Sequential:
    """Make one halving unit, then ``units - 1`` units of the same size."""
    rest = (Unit(out_channels, out_channels, False, GROUPS) for _ in range(units - 1))
    return nn.Sequential(Unit(in_channels, out_channels, True, first_groups), *rest)


class ShuffleNetV1(nn.Module):
    """Images (N, C, H, W) -> logits (N, classes). ``fc:input`` is the pooled feature vector."""

    stages = ("layer1", "layer2", "layer3")  # of 1/2, 1/4, 1/8 resolution

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.act1 = nn.ReLU()
        self.layer1 = stage(24, 240, 4, first_groups=1)  # 24 channels are too few to be grouped (sec. 3.2)
        self.layer2 = stage(240, 480, 8)
        self.layer3 = stage(480, 960, 4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(960, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, C, H, W)."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.pool(x).flatten(1))


def shufflenetv1(*, num_classes: int, input_shape: tuple[int, int, int]) -> ShuffleNetV1:
    """ShuffleNet 1x with 3 groups."""
    return ShuffleNetV1(num_classes, input_shape[0])
