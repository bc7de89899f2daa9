"""What a weights file says of its network: it may come from anybody, so it must not become code by itself.

A description builds what ``kd.models``, timm, torchvision or transformers offer, and what the user's own configuration
names by the same ``_target_``. Anything else is refused, with the ways to allow it. The configuration itself, a command
line or the ``config.yaml`` of a run that is resumed or evaluated, names code as a script does, and is not checked here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from kd.config.instantiate import DOTTED, found, module_of
from kd.config.keys import targets
from kd.errors import KdError

LIBRARIES = ("kd.models", "timm", "torchvision.models", "transformers")
# arguments of their factories that fetch something, or read another file than the one with the weights
FETCHING = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_backbone", "use_pretrained_backbone"),
    *("weights", "weights_backbone", "checkpoint_path", "cache_dir", "trust_remote_code", "auto_map", "hf_hub_id"),
)
OF_TRANSFORMERS = "kd.models.transformers_model.transformers_model"
SELF_MADE = (
    *("_target_", "pretrained", "name", "config", "architecture", "pooling", "lora", "num_classes", "tokenizer"),
    "typed",
)
HARMLESS = ("_target_", "_convert_", "_recursive_")  # keys of Hydra; _args_ would hide arguments from the checks
ALLOW = "set teacher.trust=true if you trust the file, or name the network yourself (model@teacher=NAME)"


def network(node: Any, source: str, named: Collection[str] = (), trust: bool = False) -> dict[str, Any]:
    """Check the description of a network in the file ``source``: ``KdError`` when building it could run other code.

    ``named``: every ``_target_`` that the user's own configuration gives to a network; ``trust``: whether the user
    allows others. Weights are never fetched for it: they are in the file.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise KdError(f"{source} cannot be read: what it says of its network has no _target_")
    for key, value in _leaves(node):
        if isinstance(value, str) and "${" in value:
            raise KdError(f"{source} is refused: of its network {key} = {value} is an interpolation, not a value")
    for _, part in targets(node):
        target = part["_target_"]
        if not isinstance(target, str) or not DOTTED.fullmatch(target):
            raise KdError(f"{source} is refused: its network's _target_ = {target} is not the path of a network")
        if _of_the_system(target):
            raise _never(source, target)
        if not trust and target not in named and not _offered(target):
            raise KdError(
                f"{source} says that its network is made by {target}, which is not in {', '.join(LIBRARIES[:-1])} or "
                f"{LIBRARIES[-1]}, and code is not run because a file says so: {ALLOW}"
            )
        if (made := found(target)) is not None and _of_the_system(module_of(made)):
            raise _never(source, target)  # reached through another module: mymodule.os.system
    description = _without_weights(node)
    if not trust:
        _refuse_fetching(description, source)
        _refuse_more(description, source)
    return description


def _never(source: str, target: str) -> KdError:
    return KdError(
        f"{source} is refused: it says that its network is made by {target}, which makes no network and may run "
        "anything; no setting allows that (a network of your own: model@teacher=NAME)"
    )


def _of_the_system(path: str) -> bool:
    """Tell whether a dotted path lies in Python itself, or in parts of libraries that run what they are given."""
    top = path.partition(".")[0]
    if top == "torch":
        return not path.startswith("torch.nn.")
    return top in sys.stdlib_module_names or top in ("", "hydra", "omegaconf")


def _offered(target: str) -> bool:
    """Tell whether a library offers this as a network: a class of it, or a factory that it lists."""
    root = next((root for root in LIBRARIES if target.startswith(f"{root}.")), None)
    made = None if root is None else found(target)
    if root is None or made is None or not f"{module_of(made)}.".startswith(f"{root}."):
        return False
    name = target.rpartition(".")[2]
    if inspect.isclass(made):
        config = root == "transformers" and any("config" in base.__name__.lower() for base in made.__mro__)
        return issubclass(made, nn.Module) or config
    if root == "timm":
        import timm  # start-up: of timm's networks alone

        return made is timm.create_model or (timm.is_model(name) and made is timm.model_entrypoint(name))
    if root == "torchvision.models":
        import torchvision  # start-up: of its networks alone

        listed = name in torchvision.models.list_models()
        return made is torchvision.models.get_model or (listed and made is torchvision.models.get_model_builder(name))
    return root == "kd.models" and inspect.isfunction(made)


def _refuse_fetching(node: Mapping[str, Any], source: str) -> None:
    for _, part in targets(node):
        if not part["_target_"].startswith(tuple(f"{root}." for root in LIBRARIES)):
            continue
        for key, value in part.items():
            key = str(key)
            hidden = key.startswith("_") and key not in HARMLESS
            elsewhere = key in ("name", "model_name") and ":" in str(value)  # hf-hub:…, local-dir:…
            if hidden or elsewhere or (key in FETCHING and value not in (None, False)):
                raise KdError(
                    f"{source} is refused: of its network {key} = {value} would fetch or run something else than the "
                    f"weights in the file: {ALLOW}"
                )


def _without_weights(node: Mapping[str, Any]) -> dict[str, Any]:
    """Let the node of a network fetch no weights: they are in the file. The default of transformers' is to fetch.

    What a library's configuration says there nobody has typed: it may have keys that the library does not know.
    """
    if node["_target_"] == OF_TRANSFORMERS:
        return {**node, "pretrained": False, "typed": False}
    timm_flag = str(node["_target_"]).startswith(("kd.models.", "timm.")) and "pretrained" in node
    return {**node, "pretrained": False} if timm_flag else dict(node)


def _refuse_more(node: Any, source: str) -> None:
    """Refuse, of our own factory of transformers' networks, all but a configuration without a place to fetch from."""
    for _, part in targets(node):
        if part["_target_"] != OF_TRANSFORMERS:
            continue
        more = [key for key in part if key not in SELF_MADE]
        if more or part.get("name") is not None or not isinstance(part.get("config"), Mapping):
            raise KdError(
                f"{source} is refused: of its network {more[0] if more else 'name'} would fetch or run something else "
                f"than the weights in the file: {ALLOW}"
            )
        for key, value in _leaves(part):
            if not set(FETCHING).isdisjoint(key.split(".")) and key != "pretrained" and value not in (None, False):
                raise KdError(f"{source} is refused: of its network {key} = {value} would run code: {ALLOW}")


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _leaves(value, path)
    else:
        yield path, node
