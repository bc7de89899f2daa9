"""A U-Net for segmentation: a timm network contracts, a light decoder expands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd.models.timm_model import timm_model


class TimmUNet(nn.Module):
    """The U-Net of Ronneberger et al. (MICCAI 2015, arXiv 1505.04597) with a timm network as its contracting half.

    ``encoder``: gives maps of falling resolution, as timm's ``features_only`` does, NCHW or NHWC. The deepest one goes
    through a 1×1 convolution to ``width`` channels; on each level above it is enlarged to that level's map (nearest
    pixel), put beside it, and both go through one 3×3 convolution to ``width`` channels, batch norm and ReLU: one where
    the paper has two, and one width for all levels, so that the decoder is small beside the encoder. A 1×1 convolution
    makes the logits.

    It answers (B, classes, H', W') at the encoder's highest resolution, a half of the input's for ResNets, a quarter
    for ConvNeXt and Swin, a sixteenth for a ViT: ``task=segmentation`` resizes them to the masks.

    ``stages``: the levels of the decoder, the finest one last (-1: what the classifier reads). Taps of the logits are
    ``classifier``.
    """

    layout = "NCHW"

    def __init__(self, encoder: nn.Module, num_classes: int, width: int) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width = {width} is not allowed: it must be 1 or more")
        self.encoder = encoder
        info: Any = encoder.feature_info
        order = getattr(encoder, "output_fmt", None)
        self.last = str(getattr(order, "value", order)) == "NHWC"  # channels
        *above, deepest = info.channels()
        self.bottom = nn.Conv2d(deepest, width, 1)
        self.decoder = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels + width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
            for channels in reversed(above)
        )
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.stages = tuple(f"decoder.{level}" for level in range(len(above)))
        self.pretrained_cfg: Any = getattr(encoder, "pretrained_cfg", None)

    def get_classifier(self) -> nn.Module:
        """Return the layer that makes the logits, as timm's networks do."""
        return self.classifier

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, classes, H', W')."""
        maps = self.encoder(images)
        if self.last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        *above, deepest = maps
        found = self.bottom(deepest)
        for level, beside in zip(self.decoder, reversed(above), strict=True):
            enlarged = F.interpolate(found, beside.shape[2:], mode="nearest")
            found = level(torch.cat([beside, enlarged], 1))
        return self.classifier(found)


def timm_unet(
    name: str,
    width: int = 64,
    pretrained: bool = False,
    *,
    num_classes: int,
    input_shape: tuple[int, int, int],
    **kwargs: Any,
) -> TimmUNet:
    """Make a :class:`TimmUNet` on the timm network ``name``; ``kwargs`` go to ``timm.create_model``.

    ``width``: channels of the decoder; ``pretrained``: the encoder's weights, for images of the statistics in its
    ``pretrained_cfg``.

    Raises ``ValueError`` with one sentence when timm has no such network, or it gives no maps.
    """
    try:
        encoder = timm_model(name, pretrained, input_shape=input_shape, features_only=True, **kwargs)
    except (RuntimeError, AssertionError, AttributeError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"name = {name} gives no maps of features ({reason}): choose another encoder") from error
    return TimmUNet(encoder, num_classes, width)
