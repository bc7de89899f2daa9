"""Any network of timm (Wightman, "PyTorch Image Models")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import PretrainedCfg
from torch import nn

from kd.config.hub import online
from kd.errors import did_you_mean


def timm_model(
    name: str,
    pretrained: bool = False,
    *,
    num_classes: int | None = None,
    input_shape: tuple[int, int, int],
    prune: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Make the timm network ``name``, for example ``resnet18`` or ``vit_tiny_patch16_224.augreg_in21k_ft_in1k``.

    ``num_classes``: ``None`` keeps the network's own head. ``kwargs`` go to ``timm.create_model``.
    Networks of a fixed input size (ViT, Swin, Mixer) are built for the size of the data, unless ``pretrained``.

    ``prune``: keep the first part of the network alone, with a new classifier on it: arguments of timm's
    ``prune_intermediate_layers``, ``{indices: [2]}``, as ``kd.models.timm_model.first_part``.

    Raises ``ValueError`` with one sentence when timm has no such network, or its weights cannot be had.
    """
    on_hub = ":" in name  # hf-hub:owner/name, local-dir:folder: the configuration, too, is fetched
    if not on_hub and not timm.is_model(name):
        raise ValueError(f"name = {name} is not a network of timm{did_you_mean(name, timm.list_models())}")
    channels, *size = input_shape
    arguments: dict[str, Any] = {"in_chans": channels, **kwargs}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    config = None if on_hub else timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size and not pretrained and list(config.input_size[1:]) != size:
        arguments.setdefault("img_size", size[0] if size[0] == size[1] else tuple(size))
    if not (pretrained or on_hub):
        return first_part(timm.create_model(name, **arguments), prune)
    if name.partition(":")[0] != "local-dir" and not online():  # the libraries would try for minutes
        file = _cached(name, config)
        if file is None:
            raise ValueError(_unreachable(name, config, "the Hugging Face hub cannot be reached"))
        arguments |= {} if on_hub else {"pretrained_cfg_overlay": {"file": file}}
    try:
        network = timm.create_model(name, pretrained=pretrained, **arguments)
    except (OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(_unreachable(name, config, reason)) from error
    return first_part(network, prune)


def first_part(network: nn.Module, prune: Mapping[str, Any] | None) -> nn.Module:
    """Cut a network of timm behind one of its stages, in place, with a new classifier on what is kept.

    ``prune``: ``indices``, a list of one stage, the last one that is kept, from 0, and what else timm's
    ``prune_intermediate_layers`` takes (EfficientNet: ``extra_blocks``, groups of blocks, the stem is 0); None: nothing
    is. timm takes several stages as well, the largest of which decides, and negative ones: they are refused. ``pruned``
    of the network names the tensors that are gone, which a file of the whole network still has.

    Raises ``ValueError`` for a network that timm cannot cut, and for stages that are not there.
    """
    if prune is None:
        return network
    if not hasattr(network, "prune_intermediate_layers"):
        raise ValueError(f"prune = {prune} is not allowed: timm cannot cut {type(network).__name__}")
    indices = prune.get("indices") if isinstance(prune, Mapping) else None
    stages = list(indices) if isinstance(indices, Sequence) else []
    if len(stages) != 1 or type(stages[0]) is not int or stages[0] < 0:
        raise ValueError(
            f"prune = {prune} is not allowed: it must be {{indices: [STAGE]}}, the last stage that is kept, one number "
            "from 0"
        )
    whole, classes = set(network.state_dict()), network.num_classes
    pool = getattr(network, "global_pool", None) or getattr(getattr(network, "head", None), "global_pool", None)
    try:
        network.prune_intermediate_layers(**{**prune, "indices": stages})  # type: ignore[operator]
        network.reset_classifier(classes, getattr(pool, "pool_type", pool))  # type: ignore[operator]
    except (AssertionError, TypeError, IndexError) as error:
        reason = (str(error).splitlines() or ["there is no such stage"])[0].rstrip(".")
        raise ValueError(f"prune = {dict(prune)} is not allowed: {reason}") from error
    if not isinstance(getattr(network, "stages", None), nn.Module):  # timm goes on listing stages that are empty now
        there = {
            name for name, part in network.named_modules() if not (isinstance(part, nn.Sequential) and not len(part))
        }
        listed = [entry["module"] for entry in network.feature_info]  # type: ignore[union-attr]
        network.stages = tuple(name for name in listed if name in there)  # type: ignore[assignment]
    network.pruned = whole - set(network.state_dict())  # type: ignore[assignment]
    return network


def _unreachable(name: str, config: PretrainedCfg | None, reason: str) -> str:
    """Say that pretrained weights cannot be had, which file they are, and how to give it."""
    hub = getattr(config, "hf_hub_id", None)
    place = f" model.safetensors of https://huggingface.co/{hub}" if hub else ""
    return (
        f"the pretrained weights of {name} cannot be had ({reason}): give a file,{place or ' theirs'}, as "
        "student.checkpoint=FILE (with student.new_head=true for other classes) or teacher.checkpoint=FILE, with "
        "pretrained=false, or be online"
    )


def _cached(name: str, config: PretrainedCfg | None) -> str | None:
    """Return the file of pretrained weights that an earlier download left; None: there is none."""
    hub = name.partition(":")[2] if config is None else config.hf_hub_id
    for file in ("model.safetensors", "pytorch_model.bin"):
        found = None if hub is None else try_to_load_from_cache(hub, file)
        if isinstance(found, str):
            return found
    url = getattr(config, "url", None)
    there = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2] if url else None
    return str(there) if there is not None and there.is_file() else None
