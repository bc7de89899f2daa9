"""The options that every data module takes, checked: one sentence for each that is not allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd.config.rules import FLAG, list_of, number, one_of, refusals, whole

SHARE = number(above=0, below=1)
RULES = {
    **dict.fromkeys(("batch_size", "eval_batch_size"), whole(1)),
    **dict.fromkeys(("seed", "test_shift"), whole(0)),
    "split_seed": whole(0).or_null,
    "train_size": whole(1).or_null,
    "val_fraction": SHARE,
    "label_fraction": number(above=0, most=1),
    **dict.fromkeys(("keep_unlabelled", "shuffle", "drop_last"), FLAG),
    "drop_classes": list_of(whole(0), least=0),
    "mean": list_of(number()),
    "std": list_of(number(above=0)),
    "teacher_view": one_of(None, "clean", "independent"),
    "mixup": number(above=0).or_null,  # 1: uniform shares
}


def common_problems(values: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each option that is not allowed, alone or beside another."""
    problems = refusals("data.", values, RULES)
    view, mixup, augment = values["teacher_view"], values["mixup"], values["augment"] or {}
    if mixup is not None and view is not None:
        problems.append(f"data.mixup = {mixup} needs data.teacher_view = null: both networks see the same mixture")
    if view == "independent" and not (augment.get("pad") or augment.get("flip")):
        problems.append("data.teacher_view = independent needs something to draw: set data.augment.pad or flip")
    return problems
