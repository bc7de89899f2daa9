"""What goes wrong with options of the user's own: a file without its outer key, another target on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kd.config import composition
from kd.config.composition import LISTS


def outer_keys(values: Mapping[str, Any], line: Mapping[str, str]) -> Iterator[str]:
    """Yield one sentence for each file of an option that lacks the outer key of its group, or has one too many.

    ``model/NAME.yaml`` has ``model:`` and a list's files the name of what they add; of the other groups there is none.
    """
    for role in ("student", "teacher"):
        if "_target_" in (values.get(role) or {}) and f"{role}._target_" not in line:
            file = _file("model", f"model@{role}")
            yield f"{file} lacks its outer key: a model's file has model:, and below it _target_ with its arguments"
    for group, kind in LISTS.items():
        if "_target_" in (values.get(group) or {}) and f"{group}._target_" not in line:
            yield (
                f"a file of {line.get(group, group)} lacks its outer key: each of the {kind} has a name, NAME:, and "
                "below it _target_ with its arguments"
            )
    for group in ("data", "task", "distiller"):
        node = values.get(group) or {}
        if "_target_" not in node and isinstance(node.get(group), Mapping) and "_target_" in node[group]:
            yield f"{_file(group, group)} has an outer key {group}: leave it out, _target_ and its arguments have none"


def _file(group: str, choice: str) -> str:
    """Name the file of the option that is chosen."""
    name = f"{group}/{composition.choices().get(choice, 'NAME')}.yaml"
    return next((str(root / name) for root in reversed(composition.roots()) if (root / name).is_file()), name)


def kept(path: str, target: str, keys: Sequence[str]) -> str:
    """Say that ``data._target_=mine.DM`` leaves ``keys`` of ``data=digits`` where they are, below another target."""
    section, _, name = path.partition(".")
    group, choice = ("model", f"model@{section}") if name == "model" else (section, section)
    option = composition.choices().get(choice, name)
    some = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    own = target.partition(".")[0]
    advice = f"leave them out, ~{path}.{keys[0]} for example"
    if name == "optimizer":
        advice = f"set {' '.join(f'{path}.{key}=null' for key in keys)}"
    if group in ("loss", "model", "data", "task", "distiller"):
        chosen = f"loss=[{own}]" if group == "loss" else f"{choice}={own}"
        outer = {"loss": f"{own}:, below it ", "model": "model:, below it "}.get(group, "")
        advice = (
            f"write conf/{group}/{own}.yaml with {outer}_target_: {target} and its own arguments, and choose it with "
            f"--config-dir conf {chosen}"
        )
    return (
        f"{path}._target_={target} leaves the keys of {choice}={option} below it, and {target} does not take {some}: "
        f"{advice}"
    )
