"""What a search varies by itself: depth and width of the student that the config names, and its recipe. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.config.composition import key_of
from kd.errors import KdError

MODEL, SURGERY = "student.model", "student.surgery"
AXES: Mapping[str, Mapping[str, str]] = {  # what makes the student → its keys and the values that are tried
    "kd.models.mlp.mlp": {"hidden": "[8],[16],[32],[64],[128],[16,16],[32,32],[64,64],[128,128],[32,32,32]"},
    "kd.models.cifar_resnet.resnet": {
        "depth": "8,14,20,32",
        "widths": "[8,8,16,32],[16,16,32,64],[24,24,48,96],[32,64,128,256]",
    },
    "kd.models.wrn.wrn": {"depth": "10,16,22,28", "width": "1,2,4"},
    "kd.models.transformers_model.transformers_model": {
        "config.num_hidden_layers": "1,2,3,4",
        "config.intermediate_size": "128,256,512",
    },
}
SHARES = (0.25, 0.5, 0.75, 1.0)  # of a teacher's layers and widths that a cut student keeps
STEP = 5  # the learning rate is searched from a fifth to five times the one of the recipe
TEMPERATURES = "1,2,4,8"
LAYERS, HEADS = ("num_hidden_layers", "n_layers", "n_layer"), ("num_attention_heads", "n_heads", "n_head")
HIDDEN, INNER = ("hidden_size", "dim", "n_embd"), ("intermediate_size", "hidden_dim", "n_inner")


def axes(config: Mapping[str, Any], given: Sequence[str]) -> list[str]:
    """Return the sweeps over the student and its recipe that the arguments ``given`` neither set nor sweep.

    ``config``: of the arguments without their sweeps. ``KdError`` for a student whose sizes are not known, where the
    arguments sweep nothing of it.
    """
    keys = {key_of(argument) for argument in given}
    swept = [key for key in keys if key.startswith("student.") or key in ("model@student", "student")]
    found = {} if any(_sweeps(argument) for argument in given if key_of(argument) in swept) else _of_student(config)
    lr = (config["recipe"].get("optimizer") or {}).get("lr")
    if isinstance(lr, (int, float)) and lr > 0:
        found["recipe.optimizer.lr"] = f"tag(log,interval({lr / STEP:.3g},{lr * STEP:.3g}))"
    if (config["loss"].get("kd") or {}).get("temperature") is not None:
        found["loss.kd.temperature"] = TEMPERATURES
    return [f"{key}={values}" for key, values in found.items() if key not in keys]


def _sweeps(argument: str) -> bool:
    """Tell whether an argument lists several values, or an interval, outside of brackets."""
    value, depth = argument.partition("=")[2], 0
    for letter in value:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            return True
    return value.startswith(("choice(", "range(", "interval(", "int(", "tag("))


def _of_student(config: Mapping[str, Any]) -> dict[str, str]:
    section = config["student"]
    if section["model"] is None:
        return _of_surgery(config)
    target = section["model"]["_target_"]
    known = AXES.get(target, {})
    found = {f"{MODEL}.{key}": values for key, values in known.items()}
    if target.endswith(".transformers_model") and not section["model"].get("config"):
        found = {}  # one by name: its shape is what it is
    if not found:
        raise KdError(
            f"kd search does not know which sizes of {target} to try: sweep some of its keys yourself, for example "
            "model@student=NAME,NAME or student.model.name=NAME,NAME"
        )
    return found


def _of_surgery(config: Mapping[str, Any]) -> dict[str, str]:
    """Return layers and widths that a student may keep of a teacher of transformers, from its run's config.json."""
    checkpoint = config["teacher"]["checkpoint"]
    files = [Path(str(checkpoint)) / folder / "config.json" for folder in ("selected", "last", "")]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        raise KdError(
            f"kd search cannot read the size of teacher.checkpoint = {checkpoint}, from which the student is cut: it "
            f"must be a run of a network of transformers, or sweep {SURGERY}.layers and {SURGERY}.hidden yourself"
        )
    try:
        node = json.loads(file.read_text(encoding="utf-8"))
        layers, heads, hidden = (int(_first(node, names)) for names in (LAYERS, HEADS, HIDDEN))
    except (OSError, ValueError, TypeError):
        raise KdError(f"{file} does not say how many layers and heads the teacher has") from None
    head = node.get("head_dim") or hidden // heads
    kept = {
        "layers": sorted({max(1, round(share * layers)) for share in SHARES}),
        "hidden": sorted({head * max(1, round(share * heads)) for share in SHARES}),
    }
    if inner := _first(node, INNER):
        kept["intermediate"] = sorted({max(1, round(share * inner)) for share in SHARES})
    return {f"{SURGERY}.{key}": ",".join(map(str, values)) for key, values in kept.items() if len(values) > 1}


def _first(node: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return what a configuration of transformers has under the first of some names; None where it has none."""
    return next((node[name] for name in names if node.get(name)), None)
