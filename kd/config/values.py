"""Which values of a config are allowed, where that needs no torch: one sentence for each that is not."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from kd.config import recipe
from kd.config.rules import FLAG, list_of, number, one_of, refusals, whole

TEACHER = {  # its numbers matter where a network is measured as well
    "mean": list_of(number()).or_null,
    "std": list_of(number(above=0)).or_null,
    "weights": list_of(number(least=0)).or_null,
}
TRAINING = {
    "seed": whole(0, 2**32 - 1),
    "teacher.combine": one_of("probabilities", "logits"),
    "teacher.epoch": one_of("selected", "last", None),
    "student.epoch": one_of("selected", "last", None),
    "student.surgery.keep": one_of("uniform", "every_other", "first", "last", "ends", None),
    "student.surgery.embeddings": one_of("copied", "tied", "random", None),
    "protocol.mode": one_of("max", "min", None),
    "distiller.log_every": whole(1),
    "logger.wandb.timeout": number(above=0),  # seconds
}
TERM = {"temperature": number(above=0), "weight": number(least=0), "standardise": FLAG}


def of_every_use(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong whether a network is trained or measured: names, places, the teacher's numbers."""
    name = config["name"]
    if not name.strip() or not name.isprintable():
        yield f"name = {name!r} is not allowed: a text on one line, it is the folder of the runs below paths.runs"
    elif PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        yield f"name = {name} is not allowed: the run would lie outside of paths.runs (which says where runs go)"
    root = config["data"].get("root")
    if root is not None and not isinstance(root, str):
        yield f"data.root = {root} is not allowed: it must be the path of a folder, or null"
    augment = config["data"].get("augment")
    if not isinstance(augment, (Mapping, types.NoneType)) and str(config["data"].get("_target_")).startswith("kd."):
        yield f"data.augment = {augment} is not allowed: it must be a mapping, such as {{pad: 2, flip: true}}, or null"
    teacher = config["teacher"]
    for checkpoint in c if isinstance(c := teacher["checkpoint"], list) else [c]:
        if checkpoint is not None and not isinstance(checkpoint, str):
            yield f"teacher.checkpoint = {c} is not allowed: it must be a path, or a list of paths"
    yield from refusals("teacher.", teacher, TEACHER)


def of_a_training(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong for a run that trains."""
    yield from _of_the_loss(config["loss"])
    yield from recipe.problems(config)
    yield from refusals("", config, TRAINING)
    yield from _of_the_student(config)
    for role in ("teacher", "student"):
        epoch = config[role]["epoch"]
        if epoch in ("selected", "last") and config[role]["checkpoint"] is None:
            yield f"{role}.epoch = {epoch} needs {role}.checkpoint: the run directory whose epoch it chooses"


def _of_the_student(config: Mapping[str, Any]) -> Iterator[str]:
    model, surgery = config["student"]["model"], config["student"].get("surgery") or {}
    if config["student"].get("new_head") and config["student"]["checkpoint"] is None:
        yield "student.new_head = true needs student.checkpoint: the weights whose classifier is left out"
    cut = [key for key, value in surgery.items() if value is not None]
    if model is None and not cut:
        given = config["student"]["checkpoint"]
        weights = "" if given is None else f" (student.checkpoint = {given} gives weights, not their network)"
        yield (
            "student.model=null cannot be set: student.model has no _target_: choose a network with "
            f"model@student=NAME{weights}, or say what it keeps of its teacher (student.surgery.layers=3)"
        )
    if model is not None and cut:
        yield (
            f"student.surgery.{cut[0]} = {surgery[cut[0]]} needs a student that is made from its teacher: set "
            "model@student=none"
        )


def _of_the_loss(loss: Mapping[str, Any]) -> Iterator[str]:
    if all(node is None for node in loss.values()):
        yield "loss is empty: choose at least one term, for example loss=[ce]"
    yield from _of_the_terms("loss", loss)


def _of_the_terms(path: str, node: Mapping[str, Any]) -> Iterator[str]:
    yield from refusals(f"{path}.", node, TERM)
    for key, part in node.items():
        if isinstance(part, Mapping):
            yield from _of_the_terms(f"{path}.{key}", part)
