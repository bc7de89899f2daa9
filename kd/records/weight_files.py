"""Where the weights of a run lie, and which weights a file holds. No torch."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from kd.errors import KdError
from kd.records import record

SELECTED = "student.safetensors"  # of a run directory: the weights that the validation split picked
LAST = "student_last.safetensors"
TERMS = "terms.safetensors"  # what terms have learned or kept: adapters, banks
FILES = {"selected": SELECTED, "last": LAST}
CHECKPOINT = Path("checkpoints") / "last.ckpt"
TRAINED_ALONG = "trained along, not kept"  # in a record: of a teacher whose weights the run changed


def locate(path: str | Path, epoch: str | None = None) -> Path:
    """Find the file that holds the weights: the path itself, or in a run directory the student of an epoch.

    ``epoch``: "selected" (by validation) or "last"; null: selected, or what there is of a run that did not end.
    Raises ``KdError`` when there is none.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        for candidate in [given / LAST] if epoch == "last" else [given / SELECTED, given / LAST, given / CHECKPOINT]:
            if candidate.is_file():
                return candidate
        name = LAST if epoch == "last" else SELECTED
        raise KdError(f"{given} holds no weights: there is no {name} in it{_why_none(given)}")
    if not given.is_file():
        raise KdError(f"{given} does not exist: give a run directory, a .ckpt, a .safetensors or a state dict")
    if epoch is not None and given.name != FILES[epoch]:
        raise KdError(f"{given} is one file: the {epoch} epoch can be chosen of a run directory only")
    return given


def _why_none(run_dir: Path) -> str:
    """Say why a directory holds no weights, as far as its record knows."""
    try:
        there = record.read(run_dir)
    except KdError:
        return ""
    if there["status"] == "failed" and there.get("error"):
        return f"; that run failed: {str(there['error']).splitlines()[0]}"
    return " (did that run finish an epoch?)"


def epoch_of(file: Path) -> str | None:
    """Name the epoch whose student a file of a run directory holds: "selected", "last", or null for other files."""
    return next((epoch for epoch, name in FILES.items() if file.name == name), None)


def source_of(checkpoint: str | Path, epoch: str | None) -> dict[str, Any]:
    """Say which weights of a run these are: ``{"weights": "selected" | "last", "epoch": 99, "val": {…}}``.

    ``epoch`` of the result counts from 0, ``val`` are the metrics that the run recorded for it. Empty for other files.
    """
    file = locate(checkpoint, epoch)
    part = recorded_of(file)
    try:
        return {"weights": epoch_of(file), "epoch": int(part["epoch"]), "val": dict(part["val"])}
    except (KeyError, TypeError, ValueError):
        return {}


def recorded_of(file: Path) -> dict[str, Any]:
    """Read what the record beside a file of a run says of its student.

    Empty for other files, or a run that did not end.
    """
    try:
        return dict(record.read(file.parent)["student"][epoch_of(file)])
    except (KdError, KeyError, TypeError, ValueError):
        return {}


def paths(checkpoint: Any) -> list[str]:
    """List what a config gives as ``teacher.checkpoint`` or ``student.checkpoint``: null, a path or a list."""
    return [str(c) for c in (checkpoint if isinstance(checkpoint, (list, tuple)) else [checkpoint]) if c is not None]


def read_by(config: Mapping[str, Any]) -> dict[str, list[str | None]]:
    """Return which weights a run of this config reads: key → fingerprints, None for a file that is not there (yet)."""
    found = {f"{role}.checkpoint": _fingerprints(config[role]) for role in ("student", "teacher")}
    return {key: given for key, given in found.items() if given}


def changed(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return a sentence when the weights that a run of this record has read are others now; "" when not, or not known.

    ``config``: of the run, or as much of it as says ``{role: {checkpoint: …, epoch: …}}``.
    """
    there = record.get("weights_read") or {}
    for key, old in there.items():
        section = config.get(key.partition(".")[0]) or {}
        given = zip(paths(section.get("checkpoint")), old, _fingerprints(section), strict=False)
        for path, before, now in given:
            if before and now and before != now:
                return f"{key} = {path} holds other weights than when the run began"
    return ""


def _fingerprints(section: Mapping[str, Any]) -> list[str | None]:
    return [_fingerprint_at(path, section.get("epoch")) for path in paths(section.get("checkpoint"))]


def absent(config: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> str:
    """Return the first checkpoint of a config that does not exist, as ``teacher.checkpoint = PATH``; "" when all do.

    ``record``: of a run of this config; " (fingerprint …)" says which weights it read there, if that is known.
    """
    there = (record or {}).get("weights_read") or {}
    for key in ("student.checkpoint", "teacher.checkpoint"):
        given = paths(config[key.partition(".")[0]]["checkpoint"])
        for path, read in itertools.zip_longest(given, (there.get(key) or ())[: len(given)]):
            if not Path(path).exists():
                return f"{key} = {path}{f' (fingerprint {read})' if read else ''}"
    return ""


def network(path: str) -> Any:
    """Read the network that a safetensors file names, a node with a ``_target_``; None where it names none."""
    return about(path).get("model")


def about(path: str, epoch: str | None = None) -> dict[str, Any]:
    """Read what a safetensors file of a run says of itself: model, data, seed; {} of other files, or where none is."""
    try:
        with locate(path, epoch).open("rb") as content:
            metadata = json.loads(content.read(int.from_bytes(content.read(8), "little")))["__metadata__"]
        found = json.loads(metadata["kd"])
        return found if isinstance(found, dict) else {}
    except (KdError, OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError, RecursionError):
        return {}


def _fingerprint_at(path: str, epoch: str | None) -> str | None:
    try:
        file = locate(path, epoch)
        about = file.stat()
    except (KdError, OSError):
        return None
    return _fingerprint(file, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=256)
def _fingerprint(file: Path, changed: int, size: int) -> str:
    """Hash a file's content to twelve hex digits; read again only when the file has changed.

    Of safetensors without the metadata: the same weights may say other things about themselves.
    """
    digest = hashlib.sha256()
    with file.open("rb") as content:
        if file.suffix == ".safetensors":
            digest.update(_header(content))
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]


def _header(content: BinaryIO) -> bytes:
    """Read names, types, shapes and places of the tensors of a safetensors file; nothing of one that is broken."""
    try:
        length = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(length))
        return json.dumps({k: v for k, v in header.items() if k != "__metadata__"}, sort_keys=True).encode()
    except (ValueError, AttributeError, MemoryError, OverflowError):
        content.seek(0)
        return b""
