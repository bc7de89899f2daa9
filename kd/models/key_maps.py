"""Weights of other libraries for timm's networks: the same tensors under other names, recognised by these names alone.

- EfficientNet-PyTorch (Melas-Kyriazi), with or without squeeze-and-excitation, so the EfficientNet-Lites as well;
- torchvision: VGG, MobileNetV2 and V3, EfficientNet, ConvNeXt, ViT, and DenseNets as they were saved until 2018. Its
  ResNets, ResNeXts, wide ResNets and later DenseNets have timm's names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

COUNTER = "num_batches_tracked"  # of batch norms: files of before PyTorch 0.4.1 have none, and none is needed
TF_EPS = 1e-3  # of the batch norms of networks that came from TensorFlow


@dataclass(frozen=True)
class Mapped:
    """A state dict in a network's own names.

    ``names``: own name → that in the file; ``library``: whose names these are; ``eps``: of the batch norms that the
    weights were trained with, where it may be another than the network's.
    """

    state: dict[str, Tensor]
    names: dict[str, str]
    library: str
    eps: float | None = None


def mapped(state: Mapping[str, Tensor], network: nn.Module) -> Mapped | None:
    """Give a state dict the names of a network, where these are others and the file's are known; None: they are not.

    Tensors keep their values; fully connected layers that are 1 × 1 convolutions in timm, and the reverse, are
    reshaped. Whether all fits is not checked here.
    """
    if not state.keys() - network.state_dict().keys():
        return None
    for library, mark, names_of in SOURCES:
        if any(re.fullmatch(mark, name) for name in state) and (names := names_of(state, network)):
            own = network.state_dict()
            put = {new: _shaped(state[old], own.get(new)) for new, old in names.items()}
            return Mapped(put, names, library, _eps(library, state))
    return None


def eps_of(network: nn.Module) -> float | None:
    """Return the eps of a network's first batch norm; None without one."""
    return next((module.eps for module in network.modules() if isinstance(module, _BatchNorm)), None)


def _shaped(tensor: Tensor, own: Tensor | None) -> Tensor:
    """Reshape (out, in) ↔ (out, channels, height, width), (C,) ↔ (C, 1, 1); what has other numbers stays as it is."""
    same = own is not None and own.shape != tensor.shape and own.shape[:1] == tensor.shape[:1]
    return tensor.reshape(own.shape) if same and own is not None and own.numel() == tensor.numel() else tensor


def _eps(library: str, state: Mapping[str, Tensor]) -> float | None:
    """Return the eps of the batch norms.

    Of torchvision's MobileNetV3 (its classifier has two layers) and EfficientNets from B5 on it is TensorFlow's.
    """
    if library == EFFICIENTNET:
        return TF_EPS
    if library != MOBILE or "features.0.1.running_mean" not in state:
        return None
    blocks = {found[0] for name in state if (found := re.match(r"features\.\d+\.\d+\.block", name))}
    return TF_EPS if "classifier.3.weight" in state or len(blocks) > 32 else 1e-5


# ---------------------------------------------------------------------- EfficientNet-PyTorch

ENDS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2", **SQUEEZE}
OTHERS = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_project_conv": "conv_pwl", "_bn2": "bn3", **SQUEEZE},
}


def _efficientnet(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, str]:
    """Name what ``_blocks.N`` has by the stage and the place in it of timm's N-th block."""
    names = (*network.state_dict(), *getattr(network, "pruned", ()))  # of the whole network, if it was cut
    there = {(int(at[1]), int(at[2])) for name in names if (at := re.match(r"blocks\.(\d+)\.(\d+)\.", name))}
    places = [f"blocks.{stage}.{place}" for stage, place in sorted(there)]
    found = {}
    for name in state:
        module, _, leaf = name.rpartition(".")
        inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)", module)
        if inside is None:
            new = ENDS.get(module)
        else:
            parts = OTHERS if f"_blocks.{inside[1]}._expand_conv.weight" in state else FIRST
            place = places[int(inside[1])] if int(inside[1]) < len(places) else None
            new = f"{place}.{parts[inside[2]]}" if place and inside[2] in parts else None
        if new is None:
            return {}
        found[f"{new}.{leaf}"] = name
    return found


# ---------------------------------------------------------------------- torchvision

RENAMED = {  # the names of a ViT
    r"class_token": "cls_token",
    r"encoder\.pos_embedding": "pos_embed",
    r"conv_proj\.(\w+)": r"patch_embed.proj.\1",
    r"encoder\.ln\.(\w+)": r"norm.\1",
    r"heads\.head\.(\w+)": r"head.\1",
    r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.(\w+)": r"blocks.\1.norm\2.\3",
    r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(\w+)": r"blocks.\1.attn.qkv.\2",
    r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.(\w+)": r"blocks.\1.attn.proj.\2",
    r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.(\w+)": r"blocks.\1.mlp.fc1.\2",
    r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.(\w+)": r"blocks.\1.mlp.fc2.\2",
}
OLD_DENSENET = {r"(.*\.denselayer\d+\.(?:norm|conv))\.([12]\.\w+)": r"\1\2", r"(.*)": r"\1"}


def _by_rule(rules: Mapping[str, str]) -> Callable[[Mapping[str, Tensor], nn.Module], dict[str, str]]:
    """Make a function that renames by the first regular expression that is a whole name; all must be of one."""

    def names_of(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, str]:
        found = {}
        for name in state:
            rule = next((rule for rule in rules if re.fullmatch(rule, name)), None)
            if rule is None:
                return {}
            found[re.sub(rule, rules[rule], name, count=1)] = name
        return found

    return names_of


def _by_order(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, str]:
    """Pair layers in the order of the forward pass: torchvision numbers them so, timm defines them so.

    {} unless there are as many with the same kinds of tensors, each of as many numbers; of the last layer, which may
    have other classes, that is not asked.
    """
    theirs: dict[str, dict[str, str]] = {}
    for name in sorted(state, key=_place):
        module, _, leaf = name.rpartition(".")
        theirs.setdefault(module, {})[leaf] = name
    ours: dict[str, dict[str, str]] = {}
    own = network.state_dict()
    for name in own:
        module, _, leaf = name.rpartition(".")
        ours.setdefault(module, {})[leaf] = name
    ordered = {name: ours[name] for name, _ in network.named_modules() if name in ours}
    found: dict[str, str] = {}
    pairs = list(zip(ordered.values(), theirs.values(), strict=False))
    for number, (mine, their) in enumerate(pairs):
        leaves = [leaf for leaf in mine if leaf != COUNTER]
        if len(mine) == len(their) == 1:  # a layer's scale: gamma, layer_scale
            pairing = [(next(iter(mine.values())), next(iter(their.values())))]
        elif {*leaves} != their.keys() - {COUNTER}:
            return {}
        else:
            pairing = [(mine[leaf], their[leaf]) for leaf in mine if leaf in their]
        last = number == len(pairs) - 1
        if any(own[new].numel() != state[old].numel() for new, old in pairing) and not last:
            return {}
        found.update(pairing)
    return found if len(ordered) == len(theirs) else {}


def _place(name: str) -> tuple[tuple[int, int, str], ...]:
    """Order names by their numbers, the classifier last."""
    parts = name.rpartition(".")[0].split(".")
    return (
        (int(parts[0] == "classifier"), 0, ""),
        *((0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts[1:]),
    )


EFFICIENTNET, MOBILE = "EfficientNet-PyTorch", "torchvision (features.N.N)"
SOURCES = (  # whose names, a name that nobody else gives, and how they are called in timm
    (EFFICIENTNET, r"_blocks\.0\._depthwise_conv\.weight", _efficientnet),
    (MOBILE, r"features\.0\.0\.weight", _by_order),
    ("torchvision (VGG)", r"classifier\.6\.weight", _by_order),
    ("torchvision (ViT)", r"encoder\.pos_embedding", _by_rule(RENAMED)),
    ("torchvision until 2018 (DenseNet)", r"features\..*\.denselayer1\.norm\.1\.weight", _by_rule(OLD_DENSENET)),
)
