"""ShuffleNetV2 for small images.

Ma, Zhang, Zheng, Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018, table 5.
As in the CRD tables: a 1x1 stem without stride or pooling; initialised by torch's defaults.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd.models.shufflenetv1 import channel_shuffle

WIDTHS = {  # size: channels of the three stages and of the last convolution
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}


def pointwise(in_channels: int, out_channels: int) -> list[nn.Module]:
    """Make a 1x1 convolution, BN, ReLU."""
    return [nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]


def depthwise(channels: int, stride: int) -> list[nn.Module]:
    """Make a 3x3 depthwise convolution, BN."""
    conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


class Unit(nn.Module):
    """(N, C, H, W) -> (N, C, H, W): one half of the channels passes by, the other is convolved, both are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.right = nn.Sequential(*pointwise(half, half), *depthwise(half, 1), *pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps of the next block, (B, C, H, W) → (B, C', H', W')."""
        left, right = x.chunk(2, dim=1)
        return channel_shuffle(torch.cat([left, self.right(right)], dim=1), 2)


class DownUnit(nn.Module):
    """(N, in, H, W) -> (N, out, H/2, W/2): both branches see all channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.left = nn.Sequential(*depthwise(in_channels, 2), *pointwise(in_channels, half))
        self.right = nn.Sequential(*pointwise(in_channels, half), *depthwise(half, 2), *pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps of the next block, (B, C, H, W) → (B, C', H', W')."""
        return channel_shuffle(torch.cat([self.left(x), self.right(x)], dim=1), 2)


def stage(in_channels: int, out_channels: int, units: int) -> nn.Sequential:
    """Make one halving unit, then ``units - 1`` units of the same size."""
    return nn.Sequential(DownUnit(in_channels, out_channels), *(Unit(out_channels) for _ in range(units - 1)))


class ShuffleNetV2(nn.Module):
    """Images (N, C, H, W) -> logits (N, classes). ``fc:input`` is the pooled feature vector."""

    stages = ("layer1", "layer2", "layer3")  # of 1/2, 1/4, 1/8 resolution

    def __init__(self, widths: tuple[int, int, int, int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*pointwise(in_channels, 24))
        self.layer1 = stage(24, widths[0], 4)
        self.layer2 = stage(widths[0], widths[1], 8)
        self.layer3 = stage(widths[1], widths[2], 4)
        self.last = nn.Sequential(*pointwise(widths[2], widths[3]))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, C, H, W)."""
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(self.pool(self.last(x)).flatten(1))


def shufflenetv2(size: float = 1.0, *, num_classes: int, input_shape: tuple[int, int, int]) -> ShuffleNetV2:
    """Make ShuffleNetV2 of ``size`` 0.5, 1, 1.5 or 2; else ``ValueError``."""
    if size not in WIDTHS:
        raise ValueError(f"size = {size} is not allowed for shufflenetv2: it must be 0.5, 1, 1.5 or 2")
    return ShuffleNetV2(WIDTHS[size], num_classes, input_shape[0])
