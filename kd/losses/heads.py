"""Class heads on intermediate features, of terms alone: the student that is deployed does not have them."""

from __future__ import annotations

from torch import Tensor, nn

from kd.losses.layouts import Tapped


class ClassHead(nn.Module):
    """Logits (B, classes) from a tapped feature.

    Of a map (B, C, H, W): depthwise-separable 3×3 convolutions of stride 2, each with twice the channels, batch norm
    and ReLU, until no side is larger than in ``grid`` (height, width; None: there is none), then the mean over the
    positions and a linear layer. Of tokens (B, N, D): layer norm, the mean over the tokens behind the prefix, and a
    linear layer. Of vectors (B, D): a linear layer.

    ``ValueError``, with the tap and its layout, for any other feature.
    """

    def __init__(self, what: str, tap: Tapped, classes: int, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.kind, self.prefix = tap.layout.kind, tap.layout.prefix
        steps: list[nn.Module] = []
        if self.kind == "NCHW":
            width, *sides = tap.shape[1:]
            while grid is not None and any(side > least for side, least in zip(sides, grid, strict=True)):
                steps += _halving(width)
                width, sides = 2 * width, [(side + 1) // 2 for side in sides]
            steps += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        elif self.kind == "tokens":
            width = tap.shape[2]
            steps += [nn.LayerNorm(width)]
        elif self.kind == "vector":
            width = tap.shape[1]
        else:
            raise ValueError(
                f"{what} cannot put a class head on {tap}: say its layout in the tap's name, "
                f"student_taps=[{tap.bare}@NCHW], or tap another module"
            )
        self.body, self.classifier = nn.Sequential(*steps), nn.Linear(width, classes)

    @property
    def normalised(self) -> bool:
        """Whether it has batch statistics."""
        return any(isinstance(module, nn.BatchNorm2d) for module in self.body)

    def forward(self, feature: Tensor) -> Tensor:
        """Map the feature → (B, classes)."""
        found = self.body(feature)
        return self.classifier(found[:, self.prefix :].mean(1) if self.kind == "tokens" else found)


def _halving(width: int) -> list[nn.Module]:
    depthwise = nn.Conv2d(width, width, kernel_size=3, stride=2, padding=1, groups=width, bias=False)
    pointwise = nn.Conv2d(width, 2 * width, kernel_size=1, bias=False)
    return [depthwise, pointwise, nn.BatchNorm2d(2 * width), nn.ReLU()]
