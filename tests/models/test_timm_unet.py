"""U-Nets on timm's networks: which resolutions and layouts they take, and what they answer by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kd.losses.layouts import NCHW
from kd.models.base import classifier, layout, stages
from kd.models.timm_unet import timm_unet

SMALL = {"num_classes": 5, "input_shape": (3, 64, 64), "width": 8}


@pytest.mark.parametrize(
    ("name", "reduction", "levels"),
    [("test_efficientnet", 2, 4), ("test_convnext", 4, 3), ("swin_tiny_patch4_window7_224", 4, 3), ("test_vit", 16, 2)],
)
def test_any_network_that_gives_maps_is_an_encoder(name: str, reduction: int, levels: int) -> None:
    small = {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 1, 1)} if name.startswith("swin") else {}
    net = timm_unet(name, **SMALL, **small).eval()
    found = net(torch.randn(2, 3, 64, 64))
    assert found.shape == (2, 5, 64 // reduction, 64 // reduction)
    assert [stage.name for stage in stages(net)] == [f"decoder.{level}" for level in range(levels)]
    assert layout(net, "decoder.0", (2, 8, 4, 4)) == NCHW
    assert classifier(net).name == "classifier"


def test_a_decoder_puts_each_level_beside_what_is_below_it() -> None:
    net = timm_unet("test_efficientnet", **SMALL).eval()
    images = torch.randn(2, 3, 64, 48)
    *above, found = net.encoder(images)
    found = net.bottom(found)
    for level, skip in zip(net.decoder, above[::-1], strict=True):
        rows = torch.arange(skip.shape[2]) * found.shape[2] // skip.shape[2]
        columns = torch.arange(skip.shape[3]) * found.shape[3] // skip.shape[3]
        both = torch.cat([skip, found[:, :, rows][:, :, :, columns]], 1)
        found = F.relu(level[1](F.conv2d(both, level[0].weight, padding=1)))
    torch.testing.assert_close(net(images), net.classifier(found))


def test_channels_of_the_data_and_arguments_of_the_encoder_arrive() -> None:
    net = timm_unet("resnet10t", 4, num_classes=2, input_shape=(1, 32, 32), channels=(4, 8, 8, 8), stem_width=4)
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 2, 16, 16)
    assert sum(p.numel() for p in net.parameters()) < 20_000


def test_what_is_no_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^name = resnet81 is not a network of timm \(near: .*resnet18"):
        timm_unet("resnet81", **SMALL)
    with pytest.raises(ValueError, match=r"^name = inception_v3 gives no maps of features \(.*\): choose another"):
        timm_unet("inception_v3", **SMALL, aux_logits=True)
    with pytest.raises(ValueError, match=r"^width = 0 is not allowed: it must be 1 or more"):
        timm_unet("test_efficientnet", 0, num_classes=5, input_shape=(3, 64, 64))
