"""MobileNetV2 for small images: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.

As in the CRD tables: half width, expansion 6, ReLU for ReLU6, an expansion convolution also in the first block, the
stride of the 24-channel blocks is 1 for 2, and 1280 channels before the classifier whatever the width below 1.
"""

from __future__ import annotations

from torch import Tensor, nn

from kd.models.init import kaiming_fan_out, small_linear

# stage -> (expansion or None for the network's, channels at full width, blocks, stride of the first block)
SETTINGS: dict[str, list[tuple[int | None, int, int, int]]] = {
    "layer1": [(1, 16, 1, 1), (None, 24, 2, 1)],
    "layer2": [(None, 32, 3, 2)],
    "layer3": [(None, 64, 4, 2), (None, 96, 3, 1)],
    "layer4": [(None, 160, 3, 2), (None, 320, 1, 1)],
}


def conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Make a convolution without bias that pads to the same size, and its BN."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


class InvertedResidual(nn.Module):
    """(N, in, H, W) -> (N, out, H/stride, W/stride): widen, 3x3 depthwise, project without activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.skip = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *conv_bn(in_channels, width, 1),
            nn.ReLU(),
            *conv_bn(width, width, 3, stride, groups=width),
            nn.ReLU(),
            *conv_bn(width, out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps of the next block, (B, C, H, W) → (B, C', H', W')."""
        return x + self.conv(x) if self.skip else self.conv(x)


class MobileNetV2(nn.Module):
    """Images (N, C, H, W) -> logits (N, classes). ``fc:input`` is the pooled feature vector."""

    stages = tuple(SETTINGS)  # of 1/2, 1/4, 1/8, 1/16 resolution

    def __init__(self, width: float, expansion: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        channels = int(32 * width)
        self.stem = nn.Sequential(*conv_bn(in_channels, channels, 3, 2), nn.ReLU())
        for name, settings in SETTINGS.items():
            layer = nn.Sequential()
            for own_expansion, full, blocks, first_stride in settings:
                for position in range(blocks):
                    stride = first_stride if position == 0 else 1
                    layer.append(InvertedResidual(channels, int(full * width), stride, own_expansion or expansion))
                    channels = int(full * width)
            self.add_module(name, layer)
        last = max(1280, int(1280 * width))
        self.last = nn.Sequential(*conv_bn(channels, last, 1), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, num_classes)
        kaiming_fan_out(self)
        small_linear(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, C, H, W)."""
        x = self.stem(x)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(self.pool(self.last(x)).flatten(1))


def mobilenetv2(
    width: float = 0.5, expansion: int = 6, *, num_classes: int, input_shape: tuple[int, int, int]
) -> MobileNetV2:
    """Make MobileNetV2 with ``width`` times the channels of the paper and hidden layers ``expansion`` times wider.

    Raises ``ValueError`` when the width leaves no channel (below 1/16) or the expansion is below 1.
    """
    if int(16 * width) < 1:
        raise ValueError(f"width = {width} is not allowed for mobilenetv2: it must be 0.0625 or more")
    if expansion < 1:
        raise ValueError(f"expansion = {expansion} is not allowed for mobilenetv2: it must be 1 or more")
    return MobileNetV2(width, expansion, num_classes, input_shape[0])
