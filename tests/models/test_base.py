"""Stages, layouts and classifiers come from the network, from timm, or not at all."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torchvision import models

from kd.losses.layouts import NCHW, UNKNOWN, VECTOR, Layout
from kd.models.base import before_classifier, classifier, layout, stages

TINY_SWIN = {"img_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 2}


def make(name: str, **arguments: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


@pytest.mark.parametrize(
    ("name", "expected", "of"),
    [
        ("resnet18", ["act1", "layer1", "layer2", "layer3", "layer4"], NCHW),
        ("vit_tiny_patch16_224", [f"blocks.{i}" for i in range(12)], Layout("tokens", 1)),
        ("convnext_atto", [f"stages.{i}" for i in range(4)], NCHW),  # its attribute "stages" is a module
        ("swin_tiny_patch4_window7_224", [f"layers.{i}" for i in range(4)], Layout("NHWC")),
        ("deit_tiny_distilled_patch16_224", [f"blocks.{i}" for i in range(12)], Layout("tokens", 2)),
        ("vit_small_patch14_reg4_dinov2", [f"blocks.{i}" for i in range(12)], Layout("tokens", 5)),
    ],
)
def test_timm(name: str, expected: list[str], of: Layout) -> None:
    assert stages(make(name)) == [(stage, of) for stage in expected]


def test_transformers_begin_with_the_embeddings() -> None:
    import transformers

    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    names = ["bert.encoder.layer.0:input", *(f"bert.encoder.layer.{i}" for i in range(3))]
    assert stages(model) == [(name, Layout("tokens")) for name in names]
    assert [stage.name for stage in stages(nn.ModuleDict({"inner": model}))] == [f"inner.{name}" for name in names]
    assert layout(model, "bert.encoder.layer.0.attention.self.query", (2, 5, 8)) == UNKNOWN


def test_own_attribute_wins() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.stages = ("1",)  # type: ignore[assignment]
    assert [stage.name for stage in stages(model)] == ["1"]


def test_unknown() -> None:
    with pytest.raises(ValueError, match=r"Sequential does not say where its stages are: .* for example 0, 1$"):
        stages(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


# ---------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "test_convnext", "test_maxvit", "test_mambaout", "swin_tiny_patch4_window7_224"]
)
def test_the_channels_are_where_the_layout_says(name: str) -> None:
    """timm tells the channels of each stage: a second source."""
    model = make(name, **(TINY_SWIN if name.startswith("swin") else {})).eval()
    shapes: dict[str, tuple[int, ...]] = {}
    channels = {entry["module"]: entry["num_chs"] for entry in model.feature_info}
    for stage, _ in stages(model):

        def hook(module: nn.Module, args: object, output: torch.Tensor, stage: str = stage) -> None:
            shapes[stage] = tuple(output.shape)

        model.get_submodule(stage).register_forward_hook(hook)
    size = model.default_cfg["input_size"] if not name.startswith("swin") else (3, 32, 32)
    with torch.no_grad():
        model(torch.empty(2, *size, device="meta"))
    for stage, said in stages(model):
        assert layout(model, stage, shapes[stage]) == said
        place = {"NCHW": 1, "NHWC": 3, "tokens": 2}[said.kind]
        assert shapes[stage][place] == channels[stage]


def test_timm_stages_that_do_not_say_that_they_are_nhwc() -> None:
    """VOLO has no ``output_fmt``."""
    model = make("volo_d1_224")
    assert layout(model, "network.2", (2, 14, 14, 384)) == Layout("NHWC")
    assert layout(model, "network.2", (2, 14, 14, 14)) == UNKNOWN


@pytest.mark.parametrize(
    ("name", "tap", "shape", "expected"),
    [
        ("test_vit", "patch_embed", (2, 4, 64), Layout("tokens")),
        ("test_vit", "patch_embed.proj", (2, 64, 2, 2), NCHW),
        ("test_vit", "norm", (2, 5, 64), Layout("tokens", 1)),
        ("test_vit", "head:input", (2, 64), VECTOR),
        ("test_vit", "head:input", None, VECTOR),
        ("test_vit", "blocks.0.attn", (2, 5, 64), Layout("tokens", 1)),
        ("test_vit", "blocks.0.attn.attn_drop", (2, 4, 5, 5), UNKNOWN),
        ("test_vit", "blocks.0.attn.qkv", (2, 5, 192), UNKNOWN),
        ("test_vit", "blocks.0.attn:output.1", (2, 5, 5), UNKNOWN),
        ("test_vit", "blocks.0.attn.attn_drop@NCHW", (2, 4, 5, 5), NCHW),
        ("test_vit", "blocks.0@tokens3", (2, 7, 64), Layout("tokens", 3)),
        ("test_vit", "blocks.0@tokens", (2, 5, 64), Layout("tokens", 1)),
        ("swin_tiny_patch4_window7_224", "layers.0.blocks.0", (2, 8, 8, 8), Layout("NHWC")),
        ("swin_tiny_patch4_window7_224", "layers.0.blocks.0.attn", (32, 4, 8), UNKNOWN),  # windows
        ("swin_tiny_patch4_window7_224", "layers.0.blocks.0.attn.softmax", (32, 2, 4, 4), UNKNOWN),
        ("swin_tiny_patch4_window7_224", "patch_embed.proj", (2, 8, 8, 8), NCHW),
        ("swin_tiny_patch4_window7_224", "patch_embed:input", (2, 3, 32, 32), NCHW),
        ("swin_tiny_patch4_window7_224", ":input", (2, 3, 32, 32), NCHW),
        ("test_resnet", "layer2.0.act1:input", (2, 8, 4, 4), NCHW),
        ("test_resnet", "fc:input", (2, 8), VECTOR),
        ("test_convnext", "stages.0.blocks.0.conv_dw", (2, 8, 4, 4), NCHW),
        ("test_convnext", "stages.0.blocks.0.norm", (2, 4, 4, 8), UNKNOWN),
        ("test_convnext", "stages.0.blocks.0.mlp.act", (2, 4, 4, 8), UNKNOWN),
    ],
)
def test_layout(name: str, tap: str, shape: tuple[int, ...] | None, expected: Layout) -> None:
    model = make(name, **(TINY_SWIN if name.startswith("swin") else {"img_size": 32} if name == "test_vit" else {}))
    assert layout(model, tap, shape) == expected


def test_a_network_of_several() -> None:
    """What a network says holds inside of it."""
    both = nn.ModuleList([make("test_vit"), make("test_resnet"), make("swin_tiny_patch4_window7_224")])
    assert layout(both, "0.blocks.1") == Layout("tokens", 1)
    assert layout(both, "1.layer2") == NCHW
    assert layout(both, "2.layers.1") == Layout("NHWC")


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Identity()
        self.head = nn.Linear(4, 2)


def test_own_attributes() -> None:
    net = Own()
    assert layout(net, "body", (2, 3, 4, 4)) == layout(net, "body", (2, 3, 4)) == UNKNOWN
    net.layout = "NHWC"
    assert layout(net, "body", (2, 3, 4, 4)) == Layout("NHWC")
    assert layout(net, "body", (2, 3, 4)) == UNKNOWN
    net.layout = "tokens"
    assert layout(net, "body", (2, 3, 4)) == Layout("tokens")
    net.num_prefix_tokens = 2
    assert layout(net, "body") == Layout("tokens", 2)


def test_torchvision() -> None:
    with torch.device("meta"):
        vit, swin, resnet = models.vit_b_16(), models.swin_t(), models.resnet18()
    assert layout(vit, "encoder.layers.encoder_layer_3", (2, 197, 768)) == Layout("tokens", 1)
    assert layout(swin, "features.1", (2, 56, 56, 96)) == UNKNOWN  # it does not say
    assert layout(swin, "features.1@NHWC", (2, 56, 56, 96)) == Layout("NHWC")
    assert layout(resnet, "layer2.0.relu", (2, 128, 28, 28)) == NCHW


@pytest.mark.parametrize(
    ("tap", "sentence"),
    [
        ("body@CHW", r"layout = CHW is not allowed: it must be NCHW, NHWC, vector, tokens, or tokens1"),
        ("body@tokens", r"tap body@tokens has shape \(2, 3, 4, 4\): it is not tokens, which has 3 dimensions"),
    ],
)
def test_wrong_declarations(tap: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        layout(Own(), tap, (2, 3, 4, 4))


# ---------------------------------------------------------------------- classifier


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_resnet", "fc"),
        ("test_vit", "head"),
        ("swin_tiny_patch4_window7_224", "head.fc"),
        ("deit_tiny_distilled_patch16_224", "head"),  # the first of two
        ("test_efficientnet", "classifier"),
    ],
)
def test_timm_classifier(name: str, expected: str) -> None:
    model = make(name)
    found = classifier(model)
    assert found == (expected, model.get_submodule(expected))
    assert before_classifier(model) == f"{expected}:input"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "fc"),
        ("vgg11", "classifier.6"),
        ("mobilenet_v3_small", "classifier.3"),
        ("vit_b_16", "heads.head"),
        ("swin_t", "head"),
        ("convnext_tiny", "classifier.2"),
    ],
)
def test_torchvision_classifier(name: str, expected: str) -> None:
    with torch.device("meta"):
        assert classifier(getattr(models, name)()).name == expected


def test_other_classifiers() -> None:
    assert classifier(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))).name == "2"
    with pytest.raises(ValueError, match="Sequential has no classifier"):
        classifier(nn.Sequential(nn.ReLU()))
    assert classifier(Own()).name == "head"
