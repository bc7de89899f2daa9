"""What a network says of itself: its stages, the layout of any tensor in it, its classifier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from kd.losses.layouts import NCHW, UNKNOWN, VECTOR, Layout, parse_layout
from kd.losses.networks import Classifier as Classifier
from kd.losses.networks import classifier as classifier
from kd.losses.networks import with_module as with_module

MAPS: tuple[type[nn.Module], ...] = (
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.Dropout2d,
    nn.Upsample,
)
MAPS += (nn.PixelShuffle, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
PREFIX = ("cls_token", "class_token", "dist_token", "distillation_token", "reg_token", "register_tokens")
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish)


class Stage(NamedTuple):
    """One stage: the module that ends it, and the layout of its output."""

    name: str
    layout: Layout


# ---------------------------------------------------------------------- stages


def stages(network: nn.Module) -> list[Stage]:
    """Return the stages from the input to the output: module names, and the layouts of these modules' outputs.

    Networks of ``kd.models`` say so in their attribute ``stages``; timm's in ``feature_info`` (a ViT: its blocks).
    Those of transformers are numbered as ``hidden_states`` are: the output of the embeddings, which goes into the first
    layer (``encoder.layer.0:input``), then that of each layer; of an encoder with a decoder those of the encoder. A
    user's network needs nothing but ``self.stages = ("layer1", "layer2")``; see :func:`layout` for its layouts.

    Raises ``ValueError`` with one sentence when the network says nothing.
    """
    known = [name for name, _ in network.named_modules() if name]
    own = getattr(network, "stages", None)  # timm's ConvNeXt has a module of this name
    found = [str(name) for name in own] if isinstance(own, (tuple, list)) else None
    found = [name for name in _feature_info(network) if name in known] if found is None else found
    found = _hidden_states(network) if not found and not isinstance(own, (tuple, list)) else found
    if found or isinstance(own, (tuple, list)):
        return [Stage(name, layout(network, name)) for name in found]
    some = [name for name in known if name.count(".") <= 1][:8]
    raise ValueError(
        f"{type(network).__name__} does not say where its stages are: name the taps yourself, "
        f"for example {', '.join(some) if some else 'after giving it submodules'}"
    )


def _hidden_states(network: nn.Module) -> list[str]:
    """Name the layers of a network of transformers, and before them what goes into the first; empty: it is none."""
    depths = (getattr(getattr(module, "config", None), "num_hidden_layers", None) for module in network.modules())
    depth = next((number for number in depths if isinstance(number, int)), 0)
    lists = [n for n, m in network.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth > 0]
    return [f"{lists[0]}.0:input", *(f"{lists[0]}.{i}" for i in range(depth))] if lists else []


def _feature_info(network: nn.Module) -> dict[str, int | None]:
    """Module → channels, as timm's networks list their stages."""
    info = getattr(network, "feature_info", None)
    entries = [entry for entry in info if isinstance(entry, Mapping) and "module" in entry] if info else []
    return {entry["module"]: entry.get("num_chs") for entry in entries}


# ---------------------------------------------------------------------- layouts


def layout(network: nn.Module, tap: str, shape: Sequence[int] | None = None) -> Layout:
    """Find the layout of a tap (``MODULE``, ``MODULE:input``, ``MODULE:output.1``, each with ``@LAYOUT`` or without).

    ``shape``: of the recorded tensor, where it is there. With it the answer is certain: what the network says holds
    for tensors of that many dimensions only, and (B, D) is a vector. Sources, the first that says something:

    - ``@NCHW``, ``@NHWC``, ``@tokens``, ``@tokens2`` (with two prefix tokens) or ``@vector`` in the tap's name;
    - a module inside an attention block: unknown; convolutions, batch norms and 2-d pooling: NCHW;
    - of the innermost network around it the attributes ``layout`` or ``output_fmt`` (timm's Swin: NHWC) and
      ``num_prefix_tokens`` (timm's ViT; tokens), prefix tokens among its parameters, ``config.hidden_size`` of
      transformers; timm's ``feature_info``: NCHW unless the channels are the last dimension;
    - a network with convolutions, in which nothing near the tap works on the last dimension: NCHW.

    ``ValueError`` for a declared layout that does not exist, or does not fit the shape.
    """
    place, _, declared = tap.partition("@")
    name, _, port = place.partition(":")
    around = list(_around(network, name))
    prefix = next((count for module, _ in around if (count := _prefix(module)) is not None), None)
    if declared:
        return _declared(tap, declared, prefix or 0, shape)
    module = around[0][0]
    is_attention = name != "" and _is_attention(module, name)
    if any(part and _is_attention(inner, part) for inner, part in _above(network, name)):
        return UNKNOWN
    if is_attention and "." in port and not port.endswith(".0"):  # weights, beside the features
        return UNKNOWN
    if shape is not None and len(shape) == 2:
        return VECTOR
    rank = len(shape) if shape is not None else None
    takes_images = port.startswith("input") and name.rpartition(".")[2] in ("", "patch_embed")
    if isinstance(module, MAPS) or (takes_images and rank == 4):
        return NCHW if rank in (4, None) else UNKNOWN
    if rank is None and name == _classifier_name(network):
        return VECTOR
    if rank in (3, None) and prefix is not None:
        return Layout("tokens", 0 if any(part.startswith("patch_embed") for part in name.split(".")) else prefix)
    return _map_layout(network, around, name, port, shape) if rank in (4, None) else UNKNOWN


def _declared(tap: str, text: str, prefix: int, shape: Sequence[int] | None) -> Layout:
    found = parse_layout(text, prefix)
    if shape is not None and len(shape) != found.rank:
        raise ValueError(f"tap {tap} has shape {tuple(shape)}: it is not {text}, which has {found.rank} dimensions")
    return found


def _map_layout(
    network: nn.Module, around: Sequence[tuple[nn.Module, str]], name: str, port: str, shape: Sequence[int] | None
) -> Layout:
    """Find the layout of a tensor of four dimensions."""
    for module, inside in around:
        if (order := _order(module)) is not None:
            return order
        stages_here = _feature_info(module) if not port.startswith("input") else {}
        if inside in stages_here:
            return _by_channels(stages_here[inside], shape)
    convolves = any(isinstance(m, nn.Conv2d) for m in network.modules())
    return NCHW if convolves and not _works_on_last(network, name) else UNKNOWN


def _by_channels(channels: int | None, shape: Sequence[int] | None) -> Layout:
    """Find the layout of one of timm's stages.

    They are NCHW; the few without ``output_fmt`` that are not (SAM, VOLO) differ in the place of C.
    """
    if shape is None or channels is None or shape[1] == channels:
        return NCHW
    return Layout("NHWC") if shape[3] == channels else UNKNOWN


def _order(module: nn.Module) -> Layout | None:
    """Return what a network says of its maps in ``layout`` or ``output_fmt`` (a word, or timm's ``Format``)."""
    for attribute in ("layout", "output_fmt"):
        value = getattr(module, attribute, None)
        value = getattr(value, "value", value)
        if isinstance(value, str) and value in ("NCHW", "NHWC"):
            return Layout(value)
    return None


def _prefix(module: nn.Module) -> int | None:
    """Count the prefix tokens that a network has; None where nothing says that it works on tokens."""
    if isinstance(module, nn.ModuleList):  # several networks, or blocks
        return None
    count = getattr(module, "num_prefix_tokens", None)
    if isinstance(count, int):
        return count
    tokens = [p for name, p in module.named_parameters() if name.rpartition(".")[2] in PREFIX and p.ndim == 3]
    width = getattr(getattr(module, "config", None), "hidden_size", None)
    says = getattr(module, "layout", None) == "tokens" or getattr(module, "output_fmt", None) == "NLC"
    return sum(p.shape[1] for p in tokens) if tokens or says or isinstance(width, int) else None


def _around(network: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    """Yield the module itself, and all around it to the network, each with the name that the module has inside it."""
    parts = name.split(".") if name else []
    for length in range(len(parts), -1, -1):
        yield network.get_submodule(".".join(parts[:length])), ".".join(parts[length:])


def _above(network: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    """Yield all modules around a module but the network, with their own names."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        yield network.get_submodule(".".join(parts[:length])), ".".join(parts[:length])


def _is_attention(module: nn.Module, name: str) -> bool:
    words = (type(module).__name__.lower(), name.rpartition(".")[2].lower())
    named = any(word.endswith(("attention", "attn")) for word in words)
    return named or isinstance(module, nn.MultiheadAttention) or hasattr(module, "fused_attn")


def _works_on_last(network: nn.Module, name: str) -> bool:
    """Tell whether a module, or its neighbours in a block, read the last dimension: linear layers, norms, attention."""
    module = network.get_submodule(name)
    if any(_is_last_norm(m) or _is_attention(m, n) for n, m in module.named_modules()):
        return True
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        block = network.get_submodule(".".join(parts[:length]))
        if not isinstance(block, (nn.Sequential, nn.ModuleList)):
            return any(_is_last_norm(m) or isinstance(m, nn.Linear) for m in _children(block))
    return isinstance(module, nn.Linear)


def _children(block: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a block, those in sequences as well."""
    for child in block.children():
        yield from _children(child) if isinstance(child, nn.Sequential) else (child,)


def _is_last_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) and "2d" not in type(module).__name__.lower()


# ---------------------------------------------------------------------- beside the stages


def before_classifier(network: nn.Module) -> str:
    """Return the tap of the features that the classifier reads, ``NAME:input``. ``ValueError`` where there is none."""
    return f"{classifier(network).name}:input"


def before_activation(network: nn.Module, stage: str) -> str:
    """Return the tap of what enters the activation that ends a stage; the stage itself where none ends it.

    It is the last layer of a sequence, or of the last block of the stage the child named ``act``, or the activation
    behind its last convolution, as in timm's ResNets. Stages of pre-activation networks and of MobileNetV2 end without.
    """
    module = network.get_submodule(stage)
    name = stage
    while isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module):
        last = len(module) - 1
        name, module = f"{name}.{last}", module[last]
    if isinstance(module, ACTIVATIONS):
        return f"{name}:input"
    found = "act" if isinstance(getattr(module, "act", None), ACTIVATIONS) else None
    for part, child in module.named_children() if found is None else ():
        if isinstance(child, ACTIVATIONS):
            found = part
        elif isinstance(child, nn.Conv2d):
            found = None
    return stage if found is None else f"{name}.{found}:input"


def _classifier_name(network: nn.Module) -> str | None:
    try:
        return classifier(network).name
    except ValueError:
        return None
