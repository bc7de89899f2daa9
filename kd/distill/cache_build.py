"""A cache of answers is made: by as many processes and jobs as need it, shard by shard, and goes on after a kill."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.data.base import as_batch
from kd.data.images.loader import Loader
from kd.distill import cache_shards as shards
from kd.distill.cache_forms import Arrays, Form, kept_projection, narrowed, put_together
from kd.distill.cache_key import difference, index_of, key_of
from kd.distill.cache_shards import Damaged
from kd.distill.teacher import Teacher
from kd.errors import KdError, named
from kd.losses.base import Batch, Output
from kd.records import lock
from kd.tasks.base import Task, Want

log = logging.getLogger(__name__)

TARGET = 1 << 26  # bytes of a shard, about
LEAST, MOST = 256, 16  # samples of a shard, at least; shards of a view that small data is divided into, at most
PAUSE = 0.1  # seconds between two looks at the shards that other processes make


@dataclass
class Builder:
    """Makes the shards of one cache that are not there.

    ``folder``: of the cache; ``facts``: of its key; ``loader``: view → batches of the training set, always in one
    order; ``index``: (samples,) that order; ``sample_bytes``: of the rows of a sample, about, None: not known;
    ``shard_samples``: samples of a shard, None: by these bytes.
    """

    folder: Path
    facts: Mapping[str, Any]
    teacher: Teacher
    task: Task
    form: Form
    loader: Callable[[int], Any]
    index: np.ndarray
    views: int
    device: torch.device
    sample_bytes: float | None = None
    shard_samples: int | None = None

    def complete(self) -> dict[str, Any]:
        """Make what is missing, together with whoever does so too, and return the manifest.

        ``MachineFailure`` where it cannot be written; what is there then stays, and is gone on with.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._plan()
            return self._manifest(self._shards())
        except OSError as error:
            raise named(error, self.folder) from error

    def _plan(self) -> None:
        """Read how the cache is divided, or decide it; a folder that is begun for something else is refused."""
        order = hashlib.blake2b(self.index.tobytes(), digest_size=8).hexdigest()
        with lock.held(self.folder / ".plan.lock", patience=60.0):
            plan = shards.read_json(self.folder / shards.PLAN)
            if plan is None:
                plan = {"facts": dict(self.facts), "samples": len(self.index), "views": self.views, "order": order}
                plan["shard_samples"] = self._shard_samples()
                shards.write_json(self.folder / shards.PLAN, plan)
        if differs := difference(plan["facts"], self.facts):  # another process has begun it meanwhile
            raise KdError(f"teacher.answers: {self.folder} {differs}")
        if plan["order"] != order:
            raise KdError(_ANOTHER_ORDER)
        self.plan, self.key = plan, key_of(plan["facts"])
        self.of_view = math.ceil(len(self.index) / plan["shard_samples"])
        self.source = Source(self.loader)

    def _shard_samples(self) -> int:
        if self.shard_samples is not None:
            return self.shard_samples
        some = max(LEAST, math.ceil(len(self.index) / MOST))
        return some if not self.sample_bytes else max(1, min(some, int(TARGET / self.sample_bytes)))

    def _shards(self) -> list[dict[str, Any]]:
        """Go over the missing shards, those that no other process makes at the moment, until all are there."""
        found: dict[int, dict[str, Any]] = {}
        count, made, logged = self.of_view * self.views, 0, False
        while True:
            before = len(found)
            for number in (n for n in range(count) if n not in found):
                entry, mine = self._shard(number)
                made += mine
                found |= {} if entry is None else {number: entry}
            if len(found) == count:
                break
            if len(found) == before:
                if not logged:
                    log.info("%d of %d shards of the answers are made by other processes", count - before, count)
                logged = True
                time.sleep(PAUSE)
        log.info("answers of the teacher: %d of %d shards made here, in %s", made, count, self.folder)
        return [found[number] for number in range(count)]

    def _shard(self, number: int) -> tuple[dict[str, Any] | None, bool]:
        """Return the entry of a shard that is there, or is made here (True); None: another process is making it."""
        file = self.folder / shards.name_of(number)
        if entry := self._whole(file, number):
            return entry, False
        try:
            with lock.held(self.folder / f".{file.stem}.lock"):
                if entry := self._whole(file, number):
                    return entry, False
                tensors, classes = self._answered(number)
                about = {"key": self.key, "number": str(number), "classes": str(classes or "")}
                return {**shards.write(file, tensors, about), "classes": classes}, True
        except BlockingIOError:
            return None, False

    def _whole(self, file: Path, number: int) -> dict[str, Any] | None:
        """Return the entry of a shard of this cache, of which every byte is right; None: it is to be made."""
        try:
            there = shards.File(file)
            there.verify()
        except Damaged as error:
            if file.exists():
                log.warning("%s: it is made anew", error)
            return None
        if (there.about.get("key"), there.about.get("number")) != (self.key, str(number)):
            return None
        entry = {"file": file.name, "bytes": there.bytes, "digest": there.about["digest"]}
        return {**entry, "classes": int(there.about["classes"]) if there.about["classes"] else None}

    def _answered(self, number: int) -> tuple[Arrays, int | None]:
        """Let the teacher answer the samples of a shard."""
        view, place = divmod(number, self.of_view)
        first = place * self.plan["shard_samples"]
        last = min(first + self.plan["shard_samples"], len(self.index))
        indices, counts, parts, classes = [], [], [], None
        for batch in self.source.read(view, first, last):
            batch = as_dtype(batch.to(self.device), self.teacher)
            rows = self.task.rows(batch)
            output = self.teacher.answer(rows, Want())
            arrays, classes = self.form.encode(output)
            self._keep_head(output)
            indices.append(index_of(batch).cpu())
            counts.append(rows_of_samples(self.task, batch, rows, len(next(iter(arrays.values())))))
            parts.append(arrays)
        index = torch.cat(indices)
        if not np.array_equal(index.numpy(), self.index[first:last]):
            raise KdError(_ANOTHER_ORDER)
        joined = narrowed(put_together(parts))
        return {"index": index, "counts": torch.cat(counts).to(torch.int32), **joined}, classes

    def _keep_head(self, output: Output) -> None:
        """Keep the output projection once, beside the hidden states."""
        file = self.folder / shards.HEAD
        if self.form.what != "hidden" or file.exists():
            return
        tensors, about = kept_projection(output.head)
        shards.write(file, tensors, {"key": self.key, **about})

    def _manifest(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        """Say that all is there, and clear up what killed processes have left."""
        classes = entries[0]["classes"]
        head = None
        if self.form.what == "hidden":
            file = shards.File(self.folder / shards.HEAD)
            head = {"file": shards.HEAD, "bytes": file.bytes, "digest": file.about["digest"]}
        listed = [{k: v for k, v in entry.items() if k != "classes"} for entry in entries]
        plan = {k: v for k, v in self.plan.items() if k != "version"}
        manifest = {**plan, "classes": classes, "head": head, "shards": listed}
        shards.write_json(self.folder / shards.MANIFEST, manifest)
        for left in (f for kind in (".*.lock", ".shard-*.tmp") for f in self.folder.glob(kind)):
            left.unlink(missing_ok=True)
        return manifest


class Source:
    """The samples of a training set by their place in its order; batches are cut at the borders of shards."""

    def __init__(self, loader: Callable[[int], Any]) -> None:
        self.loader = loader
        self.view = -1
        self.at = 0  # the place of the first sample of the batch that is next
        self.given: Any = None  # the loader that is read
        self.items: Iterator[Any] = iter(())
        self.batch: Batch | None = None

    def read(self, view: int, first: int, last: int) -> Iterator[Batch]:
        """Yield the samples ``first`` to ``last`` of one view. Later ones are cheapest to read after earlier ones."""
        if view != self.view or first < self.at or not self._near(first):
            self._begin(view, first)
        while self.at < last:
            if self.batch is None:
                item = next(self.items, None)
                if item is None:
                    raise KdError(f"the training set ends after {self.at} samples, there must be {last} or more")
                self.batch = as_batch(item)
            begin, end = self.at, self.at + len(self.batch)
            low, high = max(first, begin) - begin, min(last, end) - begin
            if low < high:
                yield cut(self.batch, low, high)
            if end > last:
                return
            self.at, self.batch = end, None

    def _near(self, first: int) -> bool:
        """Tell whether the batches in between are read sooner than those from the beginning are skipped."""
        return not isinstance(self.given, Loader) or first - self.at < 2 * self.given.batch_size

    def _begin(self, view: int, first: int) -> None:
        self.view, self.batch, self.at = view, None, 0
        self.given = self.loader(view)
        if isinstance(self.given, Loader):  # it does not make what it skips
            skipped = first // self.given.batch_size
            self.given.load_state_dict({"epoch": self.given.epoch, "batch": skipped})
            self.at = skipped * self.given.batch_size
        self.items = iter(self.given)


def cut(batch: Batch, first: int, last: int) -> Batch:
    """Cut some samples out of a batch that has not been through ``task.rows``."""
    whole = len(batch)
    if (first, last) == (0, whole):
        return batch
    return batch.map(lambda tensor: tensor[first:last] if tensor.ndim and len(tensor) == whole else tensor)


def as_dtype(batch: Batch, teacher: torch.nn.Module) -> Batch:
    """Cast the batch to the type of a network of half precision, as the training's batches are."""
    dtype = next((p.dtype for p in teacher.parameters()), torch.float32)
    if dtype not in (torch.float16, torch.bfloat16):
        return batch
    return batch.cast(dtype)


def rows_of_samples(task: Task, batch: Batch, rows: Batch, found: int) -> Tensor:
    """Count how many of the ``found`` rows belong to each sample, (samples,): they come sample after sample.

    ``batch``, ``rows``: before and after ``task.rows``. ``KdError`` where they are not distinct.
    """
    if rows is batch and found == len(batch):
        return torch.ones(found, dtype=torch.int64)
    positions = rows.extra.get("positions")
    if positions is not None and isinstance(batch.targets, Tensor) and batch.targets.ndim == 2:
        counts = torch.bincount(positions // batch.targets.shape[1], minlength=len(batch)).cpu()
    else:
        counts = torch.tensor([_count(task, cut(batch, n, n + 1)) for n in range(len(batch))])
    if int(counts.sum()) != found:
        raise KdError(
            f"teacher.answers keeps the rows of each sample, and {type(task).__name__} makes {found} rows of "
            f"{len(batch)} samples that it makes {int(counts.sum())} of one by one"
        )
    return counts


def _count(task: Task, one: Batch) -> int:
    rows = task.rows(one)
    return len(rows.targets) if rows.targets is not None else len(rows)


def order_of(batches: Any) -> np.ndarray:
    """Return the index (samples,) of all batches, in order."""
    found = [index_of(as_batch(batch)) for batch in batches]
    return torch.cat(found).numpy().astype(np.int64)


_ANOTHER_ORDER = (
    "teacher.answers needs training samples that come in one order whenever they are answered, the data gives them in "
    "another one each time: give the data module an answering_dataloader without shuffling"
)
