"""Wide residual networks WRN-d-k: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, table 1.

Pre-activation basic blocks (BN, ReLU, convolution, twice), without dropout, as in the CRD tables. Where the width
changes, the 1x1 shortcut reads the activated input; elsewhere the identity reads the raw one (as in the authors' code).
"""

from __future__ import annotations

from torch import Tensor, nn

from kd.models.init import kaiming_fan_out


class Block(nn.Module):
    """(N, in, H, W) -> (N, out, H/stride, W/stride), not activated."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps of the next block, (B, C, H, W) → (B, C', H', W')."""
        active = self.act1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(self.act2(self.bn2(self.conv1(active)))) + shortcut


def group(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    """Make ``blocks`` blocks of one resolution; the first one has the stride."""
    first = Block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(Block(out_channels, out_channels, 1) for _ in range(blocks - 1)))


class WideResNet(nn.Module):
    """Images (N, C, H, W) -> logits (N, classes). ``fc:input`` is the pooled feature vector."""

    stages = ("layer1", "layer2", "layer3")

    def __init__(self, blocks: int, width: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.layer1 = group(16, 16 * width, blocks, stride=1)
        self.layer2 = group(16 * width, 32 * width, blocks, stride=2)
        self.layer3 = group(32 * width, 64 * width, blocks, stride=2)
        self.bn = nn.BatchNorm2d(64 * width)
        self.act = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * width, num_classes)
        kaiming_fan_out(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, C, H, W)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.pool(self.act(self.bn(x))).flatten(1))


def wrn(depth: int, width: int, *, num_classes: int, input_shape: tuple[int, int, int]) -> WideResNet:
    """Make WRN-depth-width: three groups of (depth - 4) / 6 blocks with 16, 32 and 64 times ``width`` channels.

    Raises ``ValueError`` when the depth is not 6n + 4 or the width is below 1.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth = {depth} is not allowed for a WRN: it must be 6n + 4 (10, 16, 22, 28, 34, 40)")
    if width < 1:
        raise ValueError(f"width = {width} is not allowed for a WRN: it must be 1 or more")
    return WideResNet((depth - 4) // 6, width, num_classes, input_shape[0])
