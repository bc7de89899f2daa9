"""ResNets for small images: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, sec. 4.2.

The sizes are those of the CRD tables (Tian, Krishnan, Isola, ICLR 2020): a projection (1x1 convolution and BN) where
the width or the resolution changes (He's option B, while He used the parameter-free A on CIFAR); "x4" nets have
the widths 32-64-128-256. The stem keeps the resolution; every stage but the first halves it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from kd.models.init import kaiming_fan_out


class Residual(nn.Module, ABC):
    """(N, in, H, W) -> (N, out, H/stride, W/stride). Tap ``act:input`` for what enters the last ReLU."""

    expansion: int

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    @abstractmethod
    def residual(self, x: Tensor) -> Tensor:
        """Compute the branch beside the shortcut, (B, C, H, W) → (B, C', H', W')."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps of the next block, (B, C, H, W) → (B, C', H', W')."""
        return self.act(self.residual(x) + self.shortcut(x))


class Basic(Residual):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__(in_channels, width, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def residual(self, x: Tensor) -> Tensor:
        """Compute the branch beside the shortcut, (B, C, H, W) → (B, C', H', W')."""
        return self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))


class Bottleneck(Residual):
    """1x1, 3x3 (with the stride), 1x1 convolutions; four times wider at its ends than in the middle."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__(in_channels, 4 * width, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)

    def residual(self, x: Tensor) -> Tensor:
        """Compute the branch beside the shortcut, (B, C, H, W) → (B, C', H', W')."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class ResNet(nn.Module):
    """Images (N, C, H, W) -> logits (N, classes). ``fc:input`` is the pooled feature vector."""

    def __init__(
        self,
        block: type[Basic] | type[Bottleneck],
        blocks: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        stem, *stage_widths = widths
        self.conv1 = nn.Conv2d(in_channels, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.act1 = nn.ReLU()
        channels = stem
        names = []
        for number, (count, width) in enumerate(zip(blocks, stage_widths, strict=True), start=1):
            layer = nn.Sequential()
            for position in range(count):
                layer.append(block(channels, width, stride=2 if position == 0 and number > 1 else 1))
                channels = width * block.expansion
            names.append(f"layer{number}")
            self.add_module(names[-1], layer)
        self.stages = tuple(names)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        kaiming_fan_out(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, C, H, W)."""
        x = self.act1(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(self.pool(x).flatten(1))


def resnet(
    depth: int, widths: Sequence[int] = (16, 16, 32, 64), *, num_classes: int, input_shape: tuple[int, int, int]
) -> ResNet:
    """Make the CIFAR ResNet of ``depth`` layers: three stages of (depth - 2) / 6 basic blocks.

    ``widths``: channels of the stem and of the three stages; (32, 64, 128, 256) makes resnet8x4 and resnet32x4.
    Raises ``ValueError`` when the depth is not 6n + 2 or the widths are not four positive numbers.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(
            f"depth = {depth} is not allowed for a CIFAR resnet: it must be 6n + 2 (8, 14, 20, 32, 44, 56, 110)"
        )
    if len(widths) != 4 or min(widths) < 1:
        raise ValueError(f"widths = {list(widths)} is not allowed: it must be four positive numbers, the stem's first")
    return ResNet(Basic, [(depth - 2) // 6] * 3, widths, num_classes, input_shape[0])


def resnet50(*, num_classes: int, input_shape: tuple[int, int, int]) -> ResNet:
    """Make ResNet-50 (He 2016, table 1) with the CIFAR stem.

    The stem is a 3x3 convolution without stride or pooling; four stages follow it.
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), (64, 64, 128, 256, 512), num_classes, input_shape[0])
