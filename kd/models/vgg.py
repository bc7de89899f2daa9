"""VGG with BN for small images: Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015, table 1.

As in the CRD tables: five groups of 3x3 convolutions with bias, BN and ReLU, and one linear layer instead of three.
The last pooling before the fifth group is left out below 64 pixels, so 32x32 images end in 4x4 maps.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kd.models.init import kaiming_fan_out, small_linear

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {  # depth: convolutions in each of the five groups; the linear layer(s) make up the name's number
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


def group(in_channels: int, out_channels: int, convolutions: int) -> nn.Sequential:
    """Make layers (N, in, H, W) -> (N, out, H, W); the last module is the ReLU."""
    layers = nn.Sequential()
    for _ in range(convolutions):
        layers.extend([nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()])
        in_channels = out_channels
    return layers


class VGG(nn.Module):
    """Images (N, C, H, W) of 8x8 pixels or more -> logits (N, classes). ``fc:input`` is the pooled feature vector."""

    stages = ("layer1", "layer2", "layer3", "layer4")  # of 1/2, 1/4, 1/8, 1/8 (from 64 pixels on: 1/16) resolution

    def __init__(
        self,
        convolutions: tuple[int, ...],
        widths: Sequence[int],
        num_classes: int,
        input_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.layer0 = group(input_shape[0], widths[0], convolutions[0])
        self.layer1 = group(widths[0], widths[1], convolutions[1])
        self.layer2 = group(widths[1], widths[2], convolutions[2])
        self.layer3 = group(widths[2], widths[3], convolutions[3])
        self.layer4 = group(widths[3], widths[4], convolutions[4])
        self.halve = nn.MaxPool2d(2)
        self.halve_last = nn.MaxPool2d(2) if min(input_shape[1:]) >= 64 else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[4], num_classes)
        kaiming_fan_out(self)
        small_linear(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, C, H, W)."""
        x = self.halve(self.layer0(x))
        x = self.halve(self.layer1(x))
        x = self.halve(self.layer2(x))
        x = self.layer4(self.halve_last(self.layer3(x)))
        return self.fc(self.pool(x).flatten(1))


def vgg(depth: int, widths: Sequence[int] = WIDTHS, *, num_classes: int, input_shape: tuple[int, int, int]) -> VGG:
    """VGG of ``depth`` 8 (one convolution a group, from the CRD tables), 11, 13, 16 or 19.

    ``widths``: channels of the five groups. Raises ``ValueError`` for another depth, and for widths that are not five
    positive numbers.
    """
    if depth not in CONVOLUTIONS:
        raise ValueError(
            f"depth = {depth} is not allowed for a vgg: it must be one of {', '.join(map(str, CONVOLUTIONS))}"
        )
    if len(widths) != len(WIDTHS) or min(widths) < 1:
        raise ValueError(f"widths = {list(widths)} is not allowed: it must be five positive numbers")
    return VGG(CONVOLUTIONS[depth], widths, num_classes, input_shape)
