"""The networks have the published sizes, and every file of conf/model builds one that answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from kd.losses.layouts import NCHW
from kd.models.base import before_classifier, layout, stages
from kd.models.cifar_resnet import resnet
from kd.models.mobilenetv2 import mobilenetv2
from kd.models.shufflenetv2 import WIDTHS, shufflenetv2
from kd.models.vgg import vgg
from kd.models.wrn import wrn

CONF = Path(__file__).parents[2] / "conf" / "model"
CIFAR, MNIST, DIGITS = (3, 32, 32), (1, 28, 28), (1, 8, 8)

# Parameters with 100 classes, counted on the networks of the CRD tables (github.com/HobbitLong/RepDistiller)
PARAMETERS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "resnet50_cifar": 23_705_252,
    "wrn16_1": 180_916,
    "wrn16_2": 703_284,
    "wrn40_1": 569_780,
    "wrn40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
}
LAYERS = ["layer1", "layer2", "layer3", "layer4"]
RELUS = ["relu1", "relu2"]
OTHERS = {  # name: data shape, stage names
    "mlp": (DIGITS, RELUS),
    "mlp_teacher": (DIGITS, RELUS),
    "mlp_800": (MNIST, RELUS),
    "mlp_1200": (MNIST, RELUS),
    "timm": (CIFAR, ["act1", *LAYERS]),
    "timm_resnet18": (CIFAR, ["act1", *LAYERS]),
    "vit_tiny": (CIFAR, [f"blocks.{i}" for i in range(12)]),
}
# (channels, height) of the stage feature maps on 32x32 images
MAPS = {
    "resnet20": [(16, 32), (32, 16), (64, 8)],
    "resnet8x4": [(64, 32), (128, 16), (256, 8)],
    "resnet50_cifar": [(256, 32), (512, 16), (1024, 8), (2048, 4)],
    "wrn40_2": [(32, 32), (64, 16), (128, 8)],
    "vgg13": [(128, 16), (256, 8), (512, 4), (512, 4)],
    "mobilenetv2": [(12, 16), (16, 8), (48, 4), (160, 2)],
    "shufflenetv1": [(240, 16), (480, 8), (960, 4)],
    "shufflenetv2": [(116, 16), (232, 8), (464, 4)],
}


def build(name: str, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    cfg: Any = OmegaConf.load(CONF / f"{name}.yaml")
    return instantiate(cfg.model, num_classes=num_classes, input_shape=input_shape)


def tapped(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The answer, the stage outputs, and copies of them made on the spot."""
    seen: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for name, _ in stages(model):

        def hook(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            seen[name], copies[name] = output, output.clone()

        model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        return model(x), seen, copies


def test_every_file_is_tested() -> None:
    of_images = {path.stem for path in CONF.glob("*.yaml") if "transformers_model" not in path.read_text()}
    of_masks = {"timm_unet"}  # tests/models/test_timm_unet.py; of texts: tests/test_text_runs.py
    assert of_images == {*PARAMETERS, *OTHERS, *of_masks, "none"}
    assert OmegaConf.load(CONF / "none.yaml") == {"model": None}


@pytest.mark.parametrize("name", PARAMETERS)
def test_cifar_network(name: str) -> None:
    model = build(name, 100, CIFAR)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    logits, seen, copies = tapped(model.eval(), torch.randn(2, *CIFAR))
    assert logits.shape == (2, 100)
    assert logits.isfinite().all()
    assert list(seen) == [stage.name for stage in stages(model)] == LAYERS[: len(seen)]
    assert all(torch.equal(seen[key], copies[key]) for key in seen), "an in-place operation overwrites a tap"
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    for stage in stages(model):
        assert stage.layout == layout(model, stage.name, seen[stage.name].shape) == NCHW
    assert before_classifier(model) == "fc:input"
    if name in MAPS:
        assert [(f.shape[1], f.shape[2]) for f in seen.values()] == MAPS[name]


@pytest.mark.parametrize("name", OTHERS)
def test_other_network(name: str) -> None:
    shape, names = OTHERS[name]
    model = build(name, 10, shape).eval()
    logits, seen, _ = tapped(model, torch.randn(2, *shape))
    assert logits.shape == (2, 10)
    assert list(seen) == names


@pytest.mark.parametrize("shape", [MNIST, DIGITS])
@pytest.mark.parametrize(
    "name", ["resnet8", "resnet8x4", "wrn16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"]
)
def test_small_grey_images(name: str, shape: tuple[int, int, int]) -> None:
    model = build(name, 10, shape)
    logits = model(torch.randn(4, *shape))
    assert logits.shape == (4, 10)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_vgg_pools_once_more_from_64_pixels_on() -> None:
    _, seen, _ = tapped(vgg(8, num_classes=10, input_shape=(3, 64, 64)), torch.randn(2, 3, 64, 64))
    assert [f.shape[2] for f in seen.values()] == [32, 16, 8, 4]


@pytest.mark.parametrize("size", WIDTHS)
def test_shufflenetv2_sizes(size: float) -> None:
    assert shufflenetv2(size, num_classes=10, input_shape=CIFAR)(torch.randn(2, *CIFAR)).shape == (2, 10)


def test_convolutions_are_drawn_for_relu() -> None:
    torch.manual_seed(0)
    conv = wrn(16, 2, num_classes=10, input_shape=CIFAR).get_submodule("layer3.1.conv2")
    assert isinstance(conv, nn.Conv2d)
    assert conv.weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


REFUSED = [
    (resnet, {"depth": 21}, "depth = 21 is not allowed for a CIFAR resnet: it must be 6n [+] 2"),
    (resnet, {"depth": 2}, "depth = 2 is not allowed"),
    (resnet, {"depth": 20, "widths": [16, 32, 64]}, r"widths = \[16, 32, 64\] is not allowed: it must be four"),
    (wrn, {"depth": 17, "width": 2}, "depth = 17 is not allowed for a WRN: it must be 6n [+] 4"),
    (wrn, {"depth": 16, "width": 0}, "width = 0 is not allowed for a WRN: it must be 1 or more"),
    (vgg, {"depth": 9}, "depth = 9 is not allowed for a vgg: it must be one of 8, 11, 13, 16, 19"),
    (vgg, {"depth": 8, "widths": [8, 16, 0, 24, 24]}, r"widths = \[8, 16, 0, 24, 24\] is not allowed: it must be five"),
    (mobilenetv2, {"width": 0.01}, "width = 0.01 is not allowed"),
    (mobilenetv2, {"expansion": 0}, "expansion = 0 is not allowed"),
    (shufflenetv2, {"size": 3.0}, "size = 3.0 is not allowed for shufflenetv2: it must be 0.5, 1, 1.5 or 2"),
]


@pytest.mark.parametrize(("factory", "arguments", "sentence"), REFUSED)
def test_refused(factory: Any, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        factory(**arguments, num_classes=10, input_shape=CIFAR)
