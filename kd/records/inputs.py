"""What a run reads beside its data, weights and own code, and whether that is other now. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd.records import sources, weight_files

KEYS = ("weights_read", "code_read")  # in the record of a run


def read_by(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return which weights and which own code a run of this config reads, as its record says it."""
    teacher = config["teacher"]  # without a network in the config its weights bring theirs along
    paths = weight_files.paths(teacher["checkpoint"]) if teacher.get("model") is None else ()
    code = sources.read_by(config, [weight_files.network(path) for path in paths])
    return {"weights_read": weight_files.read_by(config), "code_read": code}


def changed(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return a sentence when something that a run of this record has read is other now; "" when not, or not known.

    ``config``: of the run, or as much of it as says ``{role: {checkpoint: …}}``.
    """
    return weight_files.changed(record, config) or sources.changed(record)
