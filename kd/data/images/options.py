"""The options that every data module takes, checked: one sentence for each that is not allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TEACHER_VIEWS = (None, "clean", "independent")


def whole(value: Any, least: int) -> bool:
    """Whether ``value`` is an integer, no bool, of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def number(value: Any) -> bool:
    """Whether ``value`` is a finite number, no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def common_problems(values: Mapping[str, Any]) -> list[str]:
    """One sentence for each option that is not allowed."""
    found: list[str] = []

    def need(key: str, fine: bool, rule: str) -> None:
        if not fine:
            value = str(values[key]).lower() if isinstance(values[key], bool) else values[key]
            found.append(f"data.{key} = {'null' if value is None else value} is not allowed: {rule}")

    for key, least in {"batch_size": 1, "eval_batch_size": 1, "seed": 0, "test_shift": 0}.items():
        need(key, whole(values[key], least), f"it must be a whole number, {least} or more")
    for key, least in {"split_seed": 0, "train_size": 1}.items():
        fine = values[key] is None or whole(values[key], least)
        need(key, fine, f"it must be null or a whole number, {least} or more")
    val, label = values["val_fraction"], values["label_fraction"]
    need("val_fraction", number(val) and 0 < val < 1, "it must lie between 0 and 1")
    need("label_fraction", number(label) and 0 < label <= 1, "it must be above 0 and at most 1")
    for key in ("keep_unlabelled", "shuffle", "drop_last"):
        need(key, isinstance(values[key], bool), "it must be true or false")
    dropped = values["drop_classes"]
    fine = isinstance(dropped, Sequence) and not isinstance(dropped, str) and all(whole(c, 0) for c in dropped)
    need("drop_classes", fine, "it must be a list of class numbers, such as [3]")
    for key in ("mean", "std"):
        value = values[key]
        fine = isinstance(value, Sequence) and len(value) > 0 and all(number(v) for v in value)
        fine = fine and (key == "mean" or all(v > 0 for v in value))
        need(key, fine, f"it must be a list of {'positive ' if key == 'std' else ''}numbers, one a channel")
    return found


def view_problems(values: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing that is wrong with ``teacher_view`` and ``mixup`` among a data set's options."""
    view, mixup, augment = values["teacher_view"], values["mixup"], values["augment"] or {}
    problems = []
    if view not in TEACHER_VIEWS:
        problems.append(f"data.teacher_view = {view} is not allowed: it must be null, clean or independent")
    if mixup is not None and not (number(mixup) and mixup > 0):
        problems.append(f"data.mixup = {mixup} is not allowed: it must be null or a number above 0 (1: uniform shares)")
    elif mixup is not None and view is not None:
        problems.append(f"data.mixup = {mixup} needs data.teacher_view = null: both networks see the same mixture")
    if view == "independent" and not (augment.get("pad") or augment.get("flip")):
        problems.append("data.teacher_view = independent needs something to draw: set data.augment.pad or flip")
    return problems
