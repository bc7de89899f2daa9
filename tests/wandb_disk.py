"""Reads back what W&B wrote offline."""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Kept:
    """One ``.wandb`` file: the run's record, its config (top-level keys), history rows, summary, and its exit code;
    ``kinds`` counts its records."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    kinds: Counter[str] = field(default_factory=Counter)


def records(file: Path) -> list[Any]:
    """The records of a W&B file, in order: protobufs in a LevelDB log (blocks of 32 KiB)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, parts, found = 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no room for a header: the rest of the block is padding
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of several fragments
            record = Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def values(items: Any) -> dict[str, Any]:
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}


def read_back(file: Path) -> Kept:
    kept = Kept()
    for record in records(file):
        kind = record.WhichOneof("record_type")
        kept.kinds[kind] += 1
        if kind == "run":
            kept.run = record.run
            kept.config.update(values(record.run.config.update))
        elif kind == "config":
            kept.config.update(values(record.config.update))
        elif kind == "history":
            kept.history.append(values(record.history.item))
        elif kind == "summary":
            kept.summary.update(values(record.summary.update))
        elif kind == "exit":
            kept.exit_code = record.exit.exit_code
    return kept


def only(directory: Path) -> Kept:
    """What the one W&B file of a directory holds."""
    (file,) = directory.glob("wandb/*run-*/*.wandb")
    return read_back(file)
