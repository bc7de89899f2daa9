"""Whether a run directory still holds what its record names: the config it began with, the weights it measured.

No torch at import.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.errors import KdError
from kd.records import record, weight_files

if TYPE_CHECKING:
    from torch import Tensor


def config_changed(config: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """Say what differs between a run's config and its record, as ``seed = 7, 0 in result.json``; "" when nothing does.

    "" as well where that is not known: the hash counts what the run read, which is gone or other weights now.
    """
    try:
        hashed = record.config_hash(config)
        now = {"config_hash": hashed, "seed": config["seed"], "data_seeds": record.data_seeds(config)}
    except (KeyError, TypeError, AttributeError):
        return "a section is missing"
    differ = [key for key, value in now.items() if before.get(key) not in (None, value)]
    if not differ or weight_files.absent(config) or weight_files.changed(before, config):
        return ""
    return f"{differ[0]} = {now[differ[0]]}, {before[differ[0]]} in {record.FILE}"


def read_weights(path: str | Path, epoch: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read as :func:`kd.run.weights.read`; ``KdError`` for weights of a finished run that are not its record's."""
    from kd.run import weights  # start-up: torch

    file = weight_files.locate(path, epoch)
    state, about = weights.read(file)
    measured = weight_files.recorded_of(file).get("digest")
    if measured is not None and weights.digest(state) != measured:
        raise KdError(
            f"{file} holds other weights than those that its run measured: the numbers in {record.FILE} beside it are "
            "not of these; put that file back, or copy this one to a folder of its own and give it as a file"
        )
    return state, about
