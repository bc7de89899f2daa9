"""What a weights file says of its network is data: it builds networks of the libraries, and runs nothing else."""

from __future__ import annotations

import copy
import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kd.config.compose import checked
from kd.errors import KdError
from kd.models.transformers_model import description, transformers_model
from kd.run import build, described, networks

STATE = {"fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)}
OWN = """
import os
import sys

import torch
from torch import nn


def own_net(*, num_classes, input_shape):
    open("built.txt", "w").close()
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""
OPEN = {"_target_": "builtins.open", "file": "victim.txt", "mode": "w"}
HUB = {"_target_": "torch.hub.load", "repo_or_dir": "hub", "model": "net", "source": "local", "trust_repo": True}
MLP = {"_target_": "kd.models.mlp.mlp", "hidden": [8]}
TIMM = {"_target_": "kd.models.timm_model.timm_model"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file to lose, a hubconf that empties it, and an importable module of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ownmodule", raising=False)
    (tmp_path / "victim.txt").write_text("precious")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text("open('victim.txt', 'w').close()\ndef net(**kw): pass\n")
    (tmp_path / "ownmodule.py").write_text(OWN)
    return tmp_path


def written(node: object, kind: str = "safetensors", **about: object) -> str:
    """A weights file that describes its network so."""
    content = {"model": node, **about}
    if kind == "safetensors":
        save_file(STATE, "evil.safetensors", {"kd": json.dumps(content)})
    else:
        torch.save({"state_dict": STATE, "kd": {"about": content}}, f"evil.{kind}")
    return f"evil.{kind}"


@functools.cache
def composed() -> tuple[dict, object]:
    """A config and its data, once for all tests."""
    config = checked(["loss=[kd]", "hardware=cpu"])
    return config, build.datamodule(config)


def teacher(file: str, student: object = None, **section: object) -> torch.nn.Module:
    """What a run builds of this file, with more said in the teacher's section and another student's network."""
    config, data = copy.deepcopy(composed()[0]), composed()[1]
    config["teacher"].update(section, checkpoint=file)
    config["student"]["model"] = student or config["student"]["model"]
    built = networks.teacher(config, data, build.task(config))
    assert built is not None
    return built.root


ATTACKS = {
    "builtins": OPEN,
    "hub": HUB,
    "nested": {**MLP, "hidden": [OPEN]},
    "deeper": {**MLP, "dropout": {"a": [{"b": HUB}]}},
    "through_own_package": {**HUB, "_target_": "kd.models.mlp.torch.hub.load"},
    "through_timm": {**HUB, "_target_": "timm.models.vision_transformer.torch.hub.load"},
    "os": {"_target_": "os.truncate", "path": "victim.txt", "length": 0},
    "pathlib": {"_target_": "pathlib.Path.write_text", "_args_": [{"_target_": "pathlib.Path", "_args_": ["v"]}, ""]},
    "torch": {"_target_": "torch.load", "f": "x.pt", "weights_only": False},
    "hydra": {"_target_": "hydra.utils.instantiate", "config": OPEN},
}


@pytest.mark.parametrize("trust", [None, True])
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_file_runs_code(folder, attack, kind, trust) -> None:
    """Not even when the file is trusted: a network of the user's own is never made by Python itself or torch.hub."""
    with pytest.raises(KdError) as refused:
        teacher(written(ATTACKS[attack], kind), trust=trust)
    assert f"evil.{kind}" in str(refused.value)
    assert (folder / "victim.txt").read_text() == "precious"


@pytest.mark.parametrize("attack", ["builtins", "hub"])
def test_kd_eval_refuses_with_the_file_and_the_target(kd, folder, attack) -> None:
    said = kd("eval", "who=teacher", f"teacher.checkpoint={written(ATTACKS[attack])}", "hardware=cpu")
    assert said.code == 1
    assert "evil.safetensors" in said.err
    assert ATTACKS[attack]["_target_"] in said.err
    assert "Traceback" not in said.err
    assert (folder / "victim.txt").read_text() == "precious"


def test_a_network_of_ones_own_teaches_when_it_is_trusted_or_named(folder, monkeypatch) -> None:
    monkeypatch.setitem(globals(), "STATE", {"1.weight": torch.zeros(10, 64), "1.bias": torch.zeros(10)})
    file = written({"_target_": "ownmodule.own_net"})
    with pytest.raises(KdError, match=r"ownmodule\.own_net.*teacher\.trust=true.*model@teacher=NAME"):
        teacher(file)
    assert not (folder / "built.txt").exists()
    assert "ownmodule" not in sys.modules
    own = {"_target_": "ownmodule.own_net"}
    for allowed in ({"trust": True}, {"student": own}, {"model": own}):
        (folder / "built.txt").unlink(missing_ok=True)
        assert isinstance(teacher(file, **allowed), torch.nn.Sequential)
        assert (folder / "built.txt").exists()


@pytest.mark.parametrize("reached", ["os.system", "sys.modules.clear", "torch.hub.load", "torch.load"])
def test_trust_does_not_reach_the_system_through_a_module_of_ones_own(folder, reached) -> None:
    with pytest.raises(KdError, match=rf"ownmodule\.{reached}.*no setting allows that"):
        described.network({"_target_": f"ownmodule.{reached}"}, "evil", trust=True)


@pytest.mark.parametrize(
    ("node", "named"),
    [
        ({**TIMM, "name": "hf-hub:evil/net"}, "name = hf-hub:evil/net"),
        ({**TIMM, "name": "local-dir:evil"}, "name = local-dir:evil"),
        ({**TIMM, "name": "resnet18", "checkpoint_path": "x.pth"}, "checkpoint_path = x.pth"),
        ({**TIMM, "name": "resnet18", "pretrained_cfg": {"url": "http://evil"}}, "pretrained_cfg = "),
        ({**TIMM, "_args_": ["hf-hub:evil/net"]}, "_args_ = "),
        ({"_target_": "timm.create_model", "model_name": "hf_hub:evil/net"}, "model_name = hf_hub:evil/net"),
        ({"_target_": "torchvision.models.resnet18", "weights": "DEFAULT"}, "weights = DEFAULT"),
        ({**MLP, "hidden": "${oc.env:HOME}"}, "${oc.env:HOME} is an interpolation"),
    ],
)
def test_nothing_is_fetched_because_a_file_says_so(node, named) -> None:
    for names in ((), (node["_target_"],)):  # also where the user's own network has the same factory
        with pytest.raises(KdError) as refused:
            described.network(node, "evil.safetensors", names)
        assert named in str(refused.value)
        assert "evil.safetensors" in str(refused.value)


@pytest.mark.parametrize(
    "target",
    [
        *("kd.models.mlp.mlp", "kd.models.cifar_resnet.resnet", "timm.create_model", "timm.models.resnet.resnet18"),
        *("torchvision.models.resnet18", "torchvision.models.get_model", "timm.models.vision_transformer.Attention"),
    ],
)
def test_what_the_libraries_offer_is_built(target) -> None:
    assert described.network({"_target_": target, "depth": 8}, "file") == {"_target_": target, "depth": 8}


@pytest.mark.parametrize(
    "target",
    [
        *(
            "timm.models.load_checkpoint",
            "timm.utils.clip_grad.dispatch_clip_grad",
            "kd.models.mlp.prod",
            "kd.cli.main.main",
        ),
        *("torchvision.models.nowhere", "transformers.pipeline", "numpy.load", "kd.models.mlp", "mlp", "a b.c", 7),
    ],
)
def test_what_is_no_network_of_theirs_is_refused(target) -> None:
    with pytest.raises(KdError, match=str(target).replace(".", r"\.")):
        described.network({"_target_": target}, "file")


def test_transformers_offers_its_models_and_their_configurations(monkeypatch) -> None:
    from types import ModuleType

    class Config:
        __module__ = "transformers.configuration"

    class Model(torch.nn.Module):
        __module__ = "transformers.modeling"

    fake = ModuleType("transformers")
    fake.Config, fake.Model = type("ViTConfig", (Config,), {"__module__": "transformers.vit"}), Model
    fake.pipeline = lambda **kw: None
    monkeypatch.setitem(sys.modules, "transformers", fake)
    node = {"_target_": "transformers.Model", "config": {"_target_": "transformers.Config", "depth": 2}}
    assert described.network(node, "file") == node
    for bad in ({**node, "trust_remote_code": True}, {"_target_": "transformers.pipeline"}):
        with pytest.raises(KdError):
            described.network(bad, "file")


def test_weights_are_not_fetched_for_a_network_that_a_file_brings(monkeypatch) -> None:
    node = {**TIMM, "name": "resnet18", "pretrained": True}  # as a run with a pretrained student records it
    assert described.network(node, "file")["pretrained"] is False


@pytest.mark.parametrize(
    "about",
    [{"model": [1]}, {"model": {"a": 1}}, {"model": MLP, "data": 3}, {"model": MLP, "data": {"input_shape": "x"}}],
)
def test_a_description_that_is_none_is_a_sentence(folder, about) -> None:
    with pytest.raises(KdError, match=r"evil\.safetensors cannot be read"):
        teacher(written(about["model"], data=about.get("data", {})))


OURS = "kd.models.transformers_model.transformers_model"
TINY_BERT = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    "more",
    [
        {"name": "a/folder"},
        {"config": {**TINY_BERT, "trust_remote_code": True}},
        {"config": {**TINY_BERT, "auto_map": {"AutoConfig": "evil.Evil"}}},
        {"config": None},
        {"weights_only": False},
        {"revision": "main"},
    ],
)
def test_a_network_of_transformers_is_made_from_its_configuration_alone(more: dict[str, Any]) -> None:
    node = {"_target_": OURS, "config": TINY_BERT, "architecture": "masked_lm"}
    assert described.network(node, "FILE")["pretrained"] is False
    with pytest.raises(KdError, match="FILE is refused"):
        described.network({**node, **more}, "FILE")


def test_a_configuration_from_elsewhere_may_have_keys_that_transformers_does_not_know() -> None:
    """It keeps them: of a GGUF file ``_model_name_or_path``, of some BERTs ``pooler_num_attention_heads``."""
    made = transformers_model(config=TINY_BERT, architecture="masked_lm")
    made.config.pooler_num_attention_heads, made.config._model_name_or_path = 2, ""
    node = description(made)
    assert node is not None
    assert {"pooler_num_attention_heads", "_model_name_or_path"} <= node["config"].keys()
    again = networks.network(described.network(node, "FILE"), "teacher.model", None, (8,))
    assert again.state_dict().keys() == made.state_dict().keys()
    with pytest.raises(KdError, match=r"config\.pooler_num_attention_heads is no key of bert"):
        networks.network(node, "student.model", None, (8,))
