"""Find the student alone among runs that belong to no study: the same run, by labels alone. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.records import record

SECTIONS = ("student", "teacher", "loss", "data", "hardware", "protocol")  # by which runs are told apart
LABELS = {"ce"}  # the terms of a student alone


def of_groups(runs: Sequence[tuple[str, Path]]) -> dict[str, str]:
    """Map each group of distilled runs to that of their student alone, where there is one; ``runs``: group, directory.

    A student alone is trained by cross-entropy, has the same student, data, recipe and protocol, and, where several
    have, the same teacher to be compared with.
    """
    configs: dict[str, Mapping[str, Any]] = {}
    for group, run_dir in runs:
        if group not in configs and (run_dir / record.CONFIG).is_file():
            given = record.read_config(run_dir)
            if {*SECTIONS} <= {*given}:
                configs[group] = given
    keys = {group: _without_loss(config) for group, config in configs.items()}
    alone = [group for group, config in configs.items() if _terms(config) == LABELS]
    found = {}
    for group, config in configs.items():
        same = [other for other in alone if keys[other] == keys[group]] if group not in alone else []
        taught = [other for other in same if configs[other]["teacher"] == config["teacher"]]
        if same:
            found[group] = (taught or same)[0]
    return found


def _terms(config: Mapping[str, Any]) -> set[str]:
    return {name for name, node in config["loss"].items() if node is not None}


def _without_loss(config: Mapping[str, Any]) -> str:
    """Return what runs share that differ by loss and teacher alone."""
    return record.config_hash({**config, "loss": {}, "teacher": {"checkpoint": None}})
