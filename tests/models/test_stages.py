"""Stage names come from the network, from timm, or not at all."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from kd.models.stages import stages


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["act1", "layer1", "layer2", "layer3", "layer4"]),
        ("vit_tiny_patch16_224", [f"blocks.{i}" for i in range(12)]),
        ("convnext_atto", [f"stages.{i}" for i in range(4)]),  # its attribute "stages" is a module
    ],
)
def test_timm(name: str, expected: list[str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert stages(model) == expected


def test_own_attribute_wins() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.stages = ("1",)  # type: ignore[assignment]
    assert stages(model) == ["1"]


def test_unknown() -> None:
    with pytest.raises(ValueError, match=r"Sequential does not say where its stages are: .* for example 0, 1$"):
        stages(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
