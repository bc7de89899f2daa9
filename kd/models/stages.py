"""Where the stage feature maps of a network are: the names that feature losses tap when the user names none."""

from __future__ import annotations

from torch import nn


def stages(model: nn.Module) -> list[str]:
    """Module names, from the input to the output, whose outputs are the stage feature maps of ``model``.

    Networks of ``kd.models`` say so in their attribute ``stages``; timm's in ``feature_info`` (a ViT: its blocks).
    A user's network needs nothing but ``self.stages = ("layer1", "layer2")``.

    Raises ``ValueError`` with one sentence when the network says nothing.
    """
    known = [name for name, _ in model.named_modules() if name]
    own = getattr(model, "stages", None)  # timm's ConvNeXt has a module of this name
    if isinstance(own, (tuple, list)):
        return [str(name) for name in own]
    info = [entry["module"] for entry in getattr(model, "feature_info", None) or ()]
    found = [name for name in info if name in known]
    if found:
        return found
    some = [name for name in known if name.count(".") <= 1][:8]
    raise ValueError(
        f"{type(model).__name__} does not say where its stages are: name the taps yourself, "
        f"for example {', '.join(some) if some else 'after giving it submodules'}"
    )
