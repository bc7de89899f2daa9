"""The files of a cache of answers: shards of rows that are there whole or not at all, mapped into memory.

A shard is one .safetensors file: ``index`` (samples,), ``counts`` (samples,) rows of each, and the arrays of the rows,
one after the other. Its metadata name the cache that it belongs to and a digest of its numbers. ``plan.json`` says what
is to be kept and how it is divided; ``manifest.json``, the last file that is written, that all of it is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from kd.errors import KdError
from kd.records.durable import mark, replacing

ABOUT = "kd"  # the entry of the metadata
SMALL = 1 << 28  # bytes of a cache that is held on the device of the training
VERSION, FIRST = 2, 1  # of the files; the first one differs in the digests of texts alone
PLAN, MANIFEST, HEAD = "plan.json", "manifest.json", "head.safetensors"
TYPES = {"F16": "<f2", "BF16": "<i2", "F32": "<f4", "U8": "|u1", "U16": "<u2", "I32": "<i4", "I64": "<i8"}


class Damaged(Exception):
    """A file is not what was written; the message is a sentence that names it."""


def name_of(number: int) -> str:
    """Name the file of a shard."""
    return f"shard-{number:05}.safetensors"


def write(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> dict[str, Any]:
    """Write a file whole or not at all (``MachineFailure``: no space), and return its entry for the manifest."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    digest = _digest({name: _bytes(tensor) for name, tensor in tensors.items()})
    whole = save(tensors, {ABOUT: json.dumps({**about, "digest": digest}, sort_keys=True)})  # one: the order is random
    with replacing(file, f".{mark()}") as temporary:
        temporary.write_bytes(whole)
    return {"file": file.name, "bytes": len(whole), "digest": digest}


class File:
    """One file of a cache, mapped into memory. ``Damaged`` where it is not whole, by its size and header.

    ``arrays``: by name, bfloat16 as int16; ``halves``: the names of those; ``about``: its metadata.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length < size else None
        except FileNotFoundError:
            raise Damaged(f"{path} is missing") from None
        except (OSError, ValueError) as error:
            raise Damaged(f"{path} cannot be read ({str(error).splitlines()[0]})") from None
        try:
            entries = dict(header or {})
            self.about: dict[str, str] = json.loads(entries.pop("__metadata__")[ABOUT])
            due = 8 + length + max(entry["data_offsets"][1] for entry in entries.values())
            if size != due:
                raise Damaged(
                    f"{path} is truncated: {size:,} of {due:,} bytes" if size < due else f"{path} is too long"
                )
            data = np.asarray(np.memmap(path, np.uint8, "r", offset=8 + length)) if due > 8 + length else np.empty(0)
            self.arrays = {name: _array(data, entry) for name, entry in entries.items()}
        except (KeyError, TypeError, ValueError, AttributeError, OSError):
            raise Damaged(f"{path} is truncated or no file of answers") from None
        self.halves = {name for name, entry in entries.items() if entry["dtype"] == "BF16"}
        self.bytes = size

    def verify(self) -> None:
        """Read all of it: ``Damaged`` where a bit is another one than when it was written."""
        if (
            _digest({name: array.reshape(-1).view(np.uint8) for name, array in self.arrays.items()})
            != self.about["digest"]
        ):
            raise Damaged(f"{self.path} is damaged: its bytes are others than when it was written")

    def tensor(self, name: str, array: np.ndarray | None = None) -> Tensor:
        """Return an array, or rows of it, as a tensor of the type that was written; it is copied."""
        found = torch.from_numpy(np.array(self.arrays[name] if array is None else array))
        return found.view(torch.bfloat16) if name in self.halves else found


def _array(data: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    first, last = entry["data_offsets"]
    return data[first:last].view(TYPES[entry["dtype"]]).reshape(entry["shape"])


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)


def _digest(parts: Mapping[str, np.ndarray]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(parts):
        found.update(f"{name} {len(parts[name])} ".encode())
        found.update(np.ascontiguousarray(parts[name]).data)
    return found.hexdigest()


def read_json(file: Path) -> dict[str, Any] | None:
    """Return what a file says; None where there is none. ``Damaged`` where it is no such file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Damaged(f"{file} cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict) or found.get("version") not in (VERSION, FIRST):
        raise Damaged(f"{file} is of another version of kd, or no file of answers")
    return found


def write_json(file: Path, about: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    with replacing(file, f".{mark()}") as temporary:
        temporary.write_text(json.dumps({"version": VERSION, **about}, indent=1), encoding="utf-8")


class Rows:
    """A complete cache: the rows of any samples, by their index and view.

    ``Damaged`` where a file is missing, truncated or of another cache; with ``verify`` every byte is read.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], verify: bool = False) -> None:
        self.folder, self.manifest = folder, manifest
        self.classes: int | None = manifest["classes"]
        self.views = int(manifest["views"])
        self.shards = [File(folder / entry["file"]) for entry in manifest["shards"]]
        self.head = File(folder / HEAD) if manifest["head"] else None
        entries = [*manifest["shards"], *([manifest["head"]] if manifest["head"] else [])]
        for file, entry in zip([*self.shards, *([self.head] if self.head else [])], entries, strict=True):
            if (file.bytes, file.about.get("digest")) != (entry["bytes"], entry["digest"]):
                raise Damaged(f"{file.path} is not the file that the manifest of its cache names")
            if verify:
                file.verify()
        self.names = [name for name in self.shards[0].arrays if name not in ("index", "counts")]
        counts = np.concatenate([file.arrays["counts"] for file in self.shards])
        self.begin = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        rows = [len(file.arrays[self.names[0]]) for file in self.shards]
        self.shard_begin = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        if self.begin[-1] != self.shard_begin[-1]:
            raise Damaged(f"{folder} does not hold the rows of all its samples")
        self._look_up(np.concatenate([file.arrays["index"] for file in self.shards]))

    def _look_up(self, index: np.ndarray) -> None:
        """Sort the indices of each view, to find samples by them."""
        places = np.split(np.arange(len(index)), self.views)  # as many samples in each
        self.order = [part[np.argsort(index[part], kind="stable")] for part in places]
        self.sorted = [index[order] for order in self.order]

    def samples(self, index: np.ndarray, view: int = 0) -> np.ndarray:
        """Return the numbers of samples in the cache. ``KdError`` names the first one that is not there."""
        known = self.sorted[view]
        places = np.minimum(np.searchsorted(known, index), len(known) - 1)
        wrong = known[places] != index
        if wrong.any():
            raise KdError(f"{self.folder} has no answer to sample {int(index[wrong][0])} of the training set")
        return self.order[view][places]

    def read(self, index: np.ndarray, view: int = 0) -> dict[str, Tensor]:
        """Return the rows of these samples, in their order, as tensors on the CPU."""
        samples = self.samples(index, view)
        first, counts = self.begin[samples], self.begin[samples + 1] - self.begin[samples]
        ends = np.cumsum(counts)
        rows = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - counts), counts)
        return self._gathered(rows)

    def _gathered(self, rows: np.ndarray) -> dict[str, Tensor]:
        which = np.searchsorted(self.shard_begin, rows, side="right") - 1
        used: Sequence[int] = np.unique(which).tolist() or [0]
        if len(used) == 1:
            file, places = self.shards[used[0]], rows - self.shard_begin[used[0]]
            found = {name: file.arrays[name][places] for name in self.names}
        else:
            found = {}
            chosen = [(s, which == s) for s in used]
            for name in self.names:
                like = self.shards[0].arrays[name]
                found[name] = np.empty((len(rows), *like.shape[1:]), np.int32 if name == "ids" else like.dtype)
                for s, mine in chosen:
                    found[name][mine] = self.shards[s].arrays[name][rows[mine] - self.shard_begin[s]]
        if "ids" in found:  # of each shard in another type
            found["ids"] = found["ids"].astype(np.int32, copy=False)
        halves = self.shards[0].halves
        tensors = {name: torch.from_numpy(array) for name, array in found.items()}
        return {name: t.view(torch.bfloat16) if name in halves else t for name, t in tensors.items()}


class Held:
    """A small cache with one row a sample, whole on a device: reading it moves nothing and waits for nothing."""

    def __init__(self, rows: Rows, device: torch.device) -> None:
        self.folder, self.device = rows.folder, device
        whole = {name: [file.tensor(name) for file in rows.shards] for name in rows.names}
        types = {name: torch.int32 if name == "ids" else parts[0].dtype for name, parts in whole.items()}
        with torch.autocast("cpu", enabled=False):  # which knows no float16
            joined = {name: torch.cat([p.to(types[name]) for p in parts]) for name, parts in whole.items()}
        self.rows = {name: tensor.to(device) for name, tensor in joined.items()}
        self.order, self.sorted = (
            [torch.from_numpy(part).to(device) for part in parts] for parts in (rows.order, rows.sorted)
        )

    def read(self, index: Tensor, view: int = 0) -> dict[str, Tensor]:
        """Read as :meth:`Rows.read`; samples that are not there are found out on the CPU alone."""
        known = self.sorted[view]
        places = torch.searchsorted(known, index).clamp_(max=len(known) - 1)
        if self.device.type == "cpu" and not torch.equal(known[places], index):
            wrong = int(index[known[places] != index][0])
            raise KdError(f"{self.folder} has no answer to sample {wrong} of the training set")
        samples = self.order[view][places]
        return {name: tensor.index_select(0, samples) for name, tensor in self.rows.items()}


def held(rows: Rows, device: torch.device, known: bool) -> Held | None:
    """Return a small cache with one row a sample on the device; None of others. ``known``: that it has all samples."""
    small = sum(file.bytes for file in rows.shards) <= SMALL
    plain = bool((np.diff(rows.begin) == 1).all())
    return Held(rows, device) if small and plain and (known or device.type == "cpu") else None
