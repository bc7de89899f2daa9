"""timm networks take the shape of the data; wrong names and missing weights are one sentence."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from kd.config.compose import checked
from kd.models.base import stages
from kd.models.timm_model import first_part, timm_model

SHAPE = (1, 32, 32)


def test_channels_and_classes() -> None:
    model = timm_model("resnet18", num_classes=10, input_shape=SHAPE)
    assert model.eval()(torch.randn(2, *SHAPE)).shape == (2, 10)


def test_own_head() -> None:
    with torch.device("meta"):
        model = timm_model("resnet18", num_classes=None, input_shape=(3, 224, 224))
    assert model.get_classifier().out_features == 1000  # type: ignore[operator]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"])
def test_vit_takes_the_size_of_the_data(name: str) -> None:
    with torch.device("meta"):
        model: Any = timm_model(name, num_classes=10, input_shape=(3, 64, 64), patch_size=8)
        assert model.patch_embed.img_size == (64, 64)
        assert model.patch_embed.patch_size == (8, 8)
        assert timm_model(name, num_classes=10, input_shape=(3, 64, 32)).patch_embed.img_size == (64, 32)  # type: ignore[union-attr]


CUT = [  # name, arguments of timm's, channels that are left, a tensor that is gone
    ("tf_efficientnet_lite0", {"indices": [3], "extra_blocks": True}, 40, "blocks.3.0.conv_pw.weight"),
    ("resnet18", {"indices": [2]}, 128, "layer3.0.conv1.weight"),
    ("convnext_atto", {"indices": [1]}, 80, "stages.2.blocks.0.conv_dw.weight"),
    ("vit_tiny_patch16_224", {"indices": [1]}, 192, "blocks.2.attn.qkv.weight"),
]


@pytest.mark.parametrize(("name", "prune", "channels", "gone"), CUT)
def test_the_first_part_of_a_network(name: str, prune: dict[str, Any], channels: int, gone: str) -> None:
    cut: Any = timm_model(name, num_classes=5, input_shape=(3, 32, 32), prune=prune).eval()
    assert cut.get_classifier().in_features == channels
    assert gone in cut.pruned
    assert not cut.pruned & cut.state_dict().keys()
    assert cut(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    seen: list[torch.Tensor] = []
    for stage in stages(cut):
        cut.get_submodule(stage.name).register_forward_hook(lambda *given: seen.append(given[2]))
    cut(torch.randn(2, 3, 32, 32))
    assert seen
    assert not any(
        torch.equal(one, other) for one, other in pairwise(seen) if one.shape == other.shape
    )  # none is empty


def test_a_run_takes_the_keys_of_timm() -> None:
    student = ["model@student=timm", "student.model.prune.indices=[2]", "student.model.prune={indices:[2]}"]
    for typed in student[1:]:
        assert checked([student[0], typed])["student"]["model"]["prune"] == {"indices": [2]}


def test_what_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="is not allowed: feature index 9 is out of range"):
        timm_model("resnet18", num_classes=5, input_shape=SHAPE, prune={"indices": [9]})
    with pytest.raises(ValueError, match=r"is not allowed: .*unexpected keyword argument 'stages'"):
        timm_model("resnet18", num_classes=5, input_shape=SHAPE, prune={"indices": [2], "stages": 2})
    several: list[Any] = [[], [1, 2], [-1], [True], [1.0], "2", ["2"], 2, None]
    for wrong in (*({"indices": indices} for indices in several), {}, 3):
        with pytest.raises(
            ValueError, match=r"it must be \{indices: \[STAGE\]\}, the last stage that is kept, one number from 0"
        ):
            timm_model("resnet18", num_classes=5, input_shape=SHAPE, prune=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not allowed: "):
        timm_model("vit_base_patch16_siglip_224", num_classes=5, input_shape=(3, 224, 224), prune={"indices": [1]})
    with pytest.raises(ValueError, match="timm cannot cut Linear"):
        first_part(nn.Linear(2, 2), {"indices": [1]})


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"name = resnet81 is not a network of timm \(near: .*resnet18"):
        timm_model("resnet81", num_classes=10, input_shape=SHAPE)


def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def offline(name: str, **kwargs: Any) -> nn.Module:
        calls.append(kwargs)
        raise FileNotFoundError("cannot reach the hub.\nmore")  # huggingface_hub's LocalEntryNotFoundError is one

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr("kd.models.timm_model.online", lambda: True)
    sentence = r"weights of vit_tiny_patch16_224 cannot be had \(cannot reach the hub\): give .*teacher.checkpoint=FILE"
    with pytest.raises(ValueError, match=sentence):
        timm_model("vit_tiny_patch16_224", pretrained=True, num_classes=10, input_shape=SHAPE)
    assert calls == [{"pretrained": True, "in_chans": 1, "num_classes": 10}]  # no img_size: the weights have a size


def test_without_the_hub_nothing_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The sentence names the file; one that an earlier download has left is read."""
    monkeypatch.setattr("kd.models.timm_model.online", lambda: False)
    monkeypatch.setattr("kd.models.timm_model.try_to_load_from_cache", lambda hub, file: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    sentence = (
        r"hub cannot be reached\): give a file, model\.safetensors of https://huggingface\.co/timm/test_resnet\S+, as "
    )
    with pytest.raises(ValueError, match=sentence):
        timm_model("test_resnet", pretrained=True, num_classes=10, input_shape=SHAPE)
    kept = timm.create_model("test_resnet")
    save_file(kept.state_dict(), tmp_path / "model.safetensors")
    found = {"model.safetensors": str(tmp_path / "model.safetensors")}
    monkeypatch.setattr("kd.models.timm_model.try_to_load_from_cache", lambda hub, file: found.get(file))
    network = timm_model("test_resnet", pretrained=True, num_classes=10, input_shape=(3, 32, 32))
    assert torch.equal(network.state_dict()["conv1.0.weight"], kept.state_dict()["conv1.0.weight"])
