"""Any network of timm (Wightman, "PyTorch Image Models")."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from kd.errors import did_you_mean


def timm_model(
    name: str,
    pretrained: bool = False,
    *,
    num_classes: int | None = None,
    input_shape: tuple[int, int, int],
    **kwargs: Any,
) -> nn.Module:
    """The timm network ``name``, for example ``resnet18`` or ``vit_tiny_patch16_224.augreg_in21k_ft_in1k``.

    ``num_classes``: ``None`` keeps the network's own head. ``kwargs`` go to ``timm.create_model``.
    Networks of a fixed input size (ViT, Swin, Mixer) are built for the size of the data, unless ``pretrained``.

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
        return timm.create_model(name, **arguments)
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except (OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"the pretrained weights of {name} cannot be had ({reason}): "
            "give a file as teacher.checkpoint=FILE or student.checkpoint=FILE with pretrained=false, or be online"
        ) from error
