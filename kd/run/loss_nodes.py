"""The losses of a run from Python, in short: completed by the files of ``conf/loss``, with the checks of a config."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from torch import Tensor

from kd.config import composition
from kd.config.keys import OBJECTIVE_KEYS
from kd.config.signature import arguments
from kd.errors import KdError, did_you_mean
from kd.losses.base import Batch, Output, Term


class Plain(Term):
    """A term of a plain function (student's :class:`~kd.losses.base.Output`, teacher's, batch) → scalar tensor.

    It reads the logits of both sides and the labels; what reads taps or has adapters is a term of its own. Without a
    teacher the function gets an empty output.
    """

    needs_teacher = False
    needs_labels = True

    def __init__(self, function: Callable[[Output, Output, Batch], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Return what the function returns."""
        return self.function(student, teacher, batch)


def complete(loss: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return ``{name: node}`` as the section ``loss`` of a config has it, for :func:`kd.run.build.objective`.

    A value is a weight; a mapping of ``weight``, ``schedule`` (a function or a node), ``standardise`` and arguments of
    the term; or a :class:`~kd.losses.base.Term`, or a plain function (:class:`Plain`), alone or as ``term`` in a
    mapping. What it does not say is as in ``conf/loss/NAME.yaml``; a term of one's own may also be named,
    ``{"_target_": "mymodule.MyTerm"}``.

    Raises ``KdError`` with near names for an unknown term or key.
    """
    if not isinstance(loss, Mapping) or not loss:
        raise KdError(f"loss = {loss} is not allowed: it must be a mapping of names to weights, such as {{'ce': 1.0}}")
    return {str(name): _node(str(name), value) for name, value in loss.items()}


def _node(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, type) and issubclass(value, Term):
        raise KdError(f"loss.{name} is the class {value.__name__}: give an object of it, {value.__name__}()")
    if isinstance(value, Term) or (callable(value) and not isinstance(value, type)):
        value = {"term": value}
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        value = {"weight": value}
    if not isinstance(value, Mapping):
        raise KdError(
            f"loss.{name} = {value!r} is not allowed: a weight, a mapping of options, a kd.losses.base.Term, or a "
            "function of (student, teacher, batch)"
        )
    if "term" in value:
        term = value["term"]
        own = {**value, "term": term if isinstance(term, Term) else Plain(term)}
        return _checked(name, own, ("term", "weight", "schedule", "standardise"))
    node = {**({} if "_target_" in value else _file(name)), **value}
    try:
        known = arguments(node["_target_"])
    except LookupError as error:
        raise KdError(f"loss.{name}._target_ = {node['_target_']} cannot be found: {error}") from None
    return node if known.any else _checked(name, node, ("_target_", *OBJECTIVE_KEYS, *known.names))


def _file(name: str) -> dict[str, Any]:
    """Read the node of ``conf/loss/NAME.yaml``."""
    options = composition.options("loss", [composition.CONF])
    if name not in options:
        raise KdError(
            f"loss.{name} does not exist{did_you_mean(name, options)}: there are {', '.join(options)}; a term of your "
            f"own is given as an object, {{'{name}': MyTerm()}}"
        )
    text = (composition.CONF / "loss" / f"{name}.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text)[name])


def _checked(name: str, node: dict[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    for key in node:
        if key not in known:
            near = did_you_mean(key, [k for k in known if k != "_target_"])
            raise KdError(f"there is no option loss.{name}.{key}{near}")
    return node


def described(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the same without objects, as they are written into ``config.yaml``."""
    return {
        name: {key: plain(value) for key, value in node.items() if key != "term"} | _of_term(node)
        for name, node in nodes.items()
    }


def _of_term(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the class of a term that was given as an object, and the settings among its attributes."""
    if "term" not in node:
        return {}
    term = node["term"]
    made = term.function if isinstance(term, Plain) else type(term)
    settings = {} if isinstance(term, Plain) else {k: plain(v) for k, v in vars(term).items() if _is_setting(k, v)}
    return {"_target_": f"{made.__module__}.{getattr(made, '__qualname__', type(made).__qualname__)}", **settings}


def _is_setting(name: str, value: Any) -> bool:
    scalars = (str, int, float, bool, type(None))
    parts = value if isinstance(value, (list, tuple)) else [value]
    return not name.startswith("_") and name != "training" and all(isinstance(part, scalars) for part in parts)


def plain(value: Any) -> Any:
    """Make a value one of YAML: an object by its ``repr`` without addresses, which differ from process to process."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
