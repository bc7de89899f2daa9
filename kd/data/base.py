"""What a run needs of any data, and a user's own data module or loaders with what they lack of it found out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Protocol

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DistributedSampler

from kd.errors import KdError, framed
from kd.losses.base import Batch

SPLITS = ("train", "val", "test")
LABELS = ("labels", "label", "targets", "target")  # keys of a batch that is a mapping, in the order they are looked for
INDEX = ("index", "indices", "idx")


class RunData(Protocol):
    """The data of a run: loaders of :class:`~kd.losses.base.Batch`, and what is known about the sets behind them.

    ``num_classes``: outputs of a row, None where that means nothing; ``input_shape``: of a sample without the batch;
    ``mean``, ``std``: that the inputs were normalised by, [] where they were not; ``mixup``: the option that mixes
    samples, None where there is none.
    """

    num_classes: int | None
    input_shape: tuple[int, ...]
    class_names: list[str]
    mean: list[float]
    std: list[float]
    drop_last: bool
    mixup: float | None

    @property
    def sizes(self) -> Mapping[str, int | None]:
        """Samples of train, val and test, and those of train that are ``labelled``; None where it is not known."""

    @property
    def split_facts(self) -> Mapping[str, Any]:
        """What decides which sample is in which split."""

    @property
    def random_view(self) -> str | None:
        """The option that gives a teacher another view in every epoch, if there is one."""

    @property
    def train_index(self) -> Tensor | None:
        """The index (samples,) of the training set."""

    @property
    def train_targets(self) -> Tensor | None:
        """The targets of the training set, by sample."""

    def example(self) -> Any:
        """Return inputs of one sample, a batch of one: for counting operations and measuring latency."""

    def train_dataloader(self) -> Any:
        """Return batches of train, shuffled anew in each epoch."""

    def val_dataloader(self) -> Any:
        """Return batches of val, in order."""

    def test_dataloader(self) -> Any:
        """Return batches of test, in order."""

    def answering_dataloader(self) -> Any:
        """Return batches of train once, in order, as a teacher answers them."""


class AdaptedData(LightningDataModule):
    """A user's ``LightningDataModule``, or three loaders, as :class:`RunData`.

    Batches may be :class:`~kd.losses.base.Batch`, ``(inputs, targets)``, ``(inputs, targets, index)``, or a mapping
    with ``labels`` (and ``index``), whose other entries are the inputs. What the module has under the names of
    :class:`RunData` counts; the rest is found out or left open. ``name``: how errors call it.
    """

    def __init__(self, own: Any, name: str = "data") -> None:
        super().__init__()
        self.own, self.called = own, name
        lacking = [f"{split}_dataloader" for split in SPLITS if not _defines(own, f"{split}_dataloader")]
        if lacking:
            raise KdError(f"{name} lacks {', '.join(lacking)}: a run trains, validates and tests on splits of its own")
        first = next(iter(self.train_dataloader()))
        one, self._labels = first.few(1).inputs, first.targets is not None
        self._example = one
        shape = tuple(one.shape[1:]) if isinstance(one, Tensor) else ()
        self.num_classes: int | None = getattr(own, "num_classes", None)
        self.input_shape: tuple[int, ...] = tuple(getattr(own, "input_shape", None) or shape)
        self.class_names = [str(c) for c in getattr(own, "class_names", None) or range(self.num_classes or 0)]
        self.mean, self.std = (list(getattr(own, name, None) or ()) for name in ("mean", "std"))
        self.drop_last = bool(getattr(own, "drop_last", False))
        self.mixup: float | None = getattr(own, "mixup", None) or None
        self.random_view: str | None = getattr(own, "random_view", name)  # whether views change is not known
        self.split_facts: Mapping[str, Any] = getattr(own, "split_facts", None) or {}
        self.train_index: Tensor | None = getattr(own, "train_index", None)
        self.train_targets: Tensor | None = getattr(own, "train_targets", None)
        self.content, self.seen = getattr(own, "content", None), getattr(own, "seen", None)
        self.tokenizer: Any = getattr(own, "tokenizer", None)  # of texts: networks are made to fit its vocabulary

    @property
    def sizes(self) -> dict[str, int | None]:
        """Samples of each split, as far as the loaders know their data set."""
        if hasattr(self.own, "sizes"):
            return dict(self.own.sizes)
        loaders = {split: getattr(self.own, f"{split}_dataloader")() for split in SPLITS}
        counts = {split: 0 if loader is None else _count(loader) for split, loader in loaders.items()}
        return {**counts, "labelled": counts["train"] if self._labels else 0}

    def example(self) -> Any:
        """Return inputs of the first training sample, a batch of one."""
        return self.own.example() if hasattr(self.own, "example") else self._example

    def prepare_data(self) -> None:
        """Call the own module's."""
        self.own.prepare_data()

    def setup(self, stage: str) -> None:
        """Give the own module its trainer, whose number of processes it may ask for.

        It was set up when this was made. One that splits at random in ``setup`` would split otherwise each time.
        """
        self.own.trainer = self.trainer

    def teardown(self, stage: str) -> None:
        """Call the own module's."""
        self.own.teardown(stage)

    def train_dataloader(self) -> Batches:
        """Return the own module's batches, made into :class:`~kd.losses.base.Batch`."""
        return Batches(self.own.train_dataloader(), self.called)

    def val_dataloader(self) -> Batches:
        """Return the batches of val, made as in :meth:`train_dataloader`."""
        return Batches(self.own.val_dataloader(), self.called)

    def test_dataloader(self) -> Batches:
        """Return the batches of test, made as in :meth:`train_dataloader`."""
        return Batches(self.own.test_dataloader(), self.called)

    def answering_dataloader(self) -> Batches:
        """Return the training set once: for answers that are kept by their index."""
        return self.train_dataloader()


class Loaders(LightningDataModule):
    """Three loaders as a data module; ``facts``: attributes of :class:`RunData` that the user knows."""

    def __init__(self, train: Any, val: Any, test: Any, **facts: Any) -> None:
        super().__init__()
        self._loaders = {"train": train, "val": val, "test": test}
        for name, value in facts.items():
            if value is not None:
                setattr(self, name, value)

    def train_dataloader(self) -> Any:
        """Return the loader of the training set."""
        return self._loaders["train"]

    def val_dataloader(self) -> Any:
        """Return the loader that picks the checkpoint."""
        return self._loaders["val"]

    def test_dataloader(self) -> Any:
        """Return the loader that is read once; None: there is no test set."""
        return self._loaders["test"]


class Batches:
    """The batches of a loader, each made into a :class:`~kd.losses.base.Batch`. ``name``: how errors call it."""

    def __init__(self, loader: Any, name: str) -> None:
        self.loader, self.name = loader, name
        self.epoch = 0
        self._handed, self._ended = 0, False
        self._resume: dict[str, Any] | None = None
        if _length(loader) is not None:
            self.__class__ = _SizedBatches  # Lightning asks for a length by the class alone

    def __iter__(self) -> Iterator[Batch]:
        resume, self._resume = self._resume, None
        if resume is None:
            return self._made(iter(self.loader), 0)
        if resume["epoch"] == 0 and not resume["ended"]:  # begun before the epoch's seed is set, as it was then
            return self._made(self._rest(iter(self.loader), resume), resume["batch"])
        return self._later(resume)

    def _later(self, resume: dict[str, Any]) -> Iterator[Batch]:
        """Begin when the first batch is fetched: the seed of its epoch is set by then, as it was without the resume."""
        same = resume["epoch"] == self.epoch
        items = self._rest(iter(self.loader), resume) if same else iter(self.loader)
        yield from self._made(items, resume["batch"] if same else 0)

    def _rest(self, items: Iterator[Any], resume: dict[str, Any]) -> Iterator[Any]:
        return islice(items, resume["batch"], None)

    def _made(self, items: Iterator[Any], handed: int) -> Iterator[Batch]:
        self._handed, self._ended = handed, False
        try:
            for item in items:
                self._handed += 1
                yield as_batch(item, self.name)
        except (KdError, OSError):
            raise
        except Exception as error:
            raise framed(self.name, error) from error
        self._ended = True

    def state_dict(self) -> dict[str, Any]:
        """Return epoch and batches trained on, for a checkpoint in the middle of an epoch."""
        trained = self._handed - self._ahead()
        return {"epoch": self.epoch, "batch": trained, "ended": self._ended or trained == self._length()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skip what was trained on already, if the next iteration is over that same epoch."""
        self._resume = state

    def _ahead(self) -> int:
        """Count the batches that Lightning has fetched and not trained on.

        One, where it cannot know the last one by a length.
        """
        return 0 if self._ended or not self._handed else 1

    def _length(self) -> int | None:
        return None

    batch_sampler = None  # Lightning asks for it wherever there is a sampler

    @property
    def sampler(self) -> Batches:
        """Itself: Lightning calls ``loader.sampler.set_epoch(epoch)`` before each epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Tell the loader, or its sampler, which epoch begins, where it wants to know."""
        self.epoch = epoch
        parts: list[Any] = [self.loader, getattr(self.loader, "sampler", None)]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)


class _SizedBatches(Batches):
    def __len__(self) -> int:
        return len(self.loader)

    def _ahead(self) -> int:
        return 0

    def _length(self) -> int | None:
        return len(self)


def as_batch(item: Any, name: str = "data") -> Batch:
    """Make a :class:`~kd.losses.base.Batch` of what a loader gives. ``KdError`` when it is nothing known."""
    if isinstance(item, Batch):
        return item
    if isinstance(item, Tensor):
        return Batch(item)
    if isinstance(item, Mapping):
        rest = dict(item)
        targets = next((rest.pop(key) for key in LABELS if key in rest), None)
        index = next((rest.pop(key) for key in INDEX if key in rest), None)
        attended = rest.get("attention_mask")
        mask = attended.bool() if isinstance(attended, Tensor) and attended.ndim == 2 else None
        return Batch(rest, targets, index, mask)
    if isinstance(item, (tuple, list)) and 1 <= len(item) <= 3 and isinstance(item[0], (Tensor, Mapping)):
        return Batch(*item)
    raise KdError(
        f"{name} gives batches of type {type(item).__name__}: a batch must be (inputs, targets), (inputs, targets, "
        "index), a mapping with labels, or a kd.losses.base.Batch(inputs, targets, index)"
    )


def bad_inputs(loader: Iterable[Any] | None, seconds: float = 10.0) -> str:
    """Say that inputs of a loader are not finite, and in which batch, "" if none was found in that time.

    It reads the loader again: for the end of a run that has failed, where it says what a check of every step would.
    """
    end = time.monotonic() + seconds
    with suppress(KdError):  # no batches: several loaders, in a trainer of the user's own
        for number, item in enumerate(loader or ()):
            inputs = as_batch(item).inputs
            parts = inputs.values() if isinstance(inputs, Mapping) else [inputs]
            if any(isinstance(p, Tensor) and p.is_floating_point() and not bool(p.isfinite().all()) for p in parts):
                return (
                    f": the inputs themselves are not finite (NaN or infinity, in batch {number + 1} when read again)"
                )
            if time.monotonic() > end:
                break
    return ""


def refuse_unsharded(loader: Any, split: str, processes: int) -> None:
    """Raise ``KdError`` for a loader that gives each of several processes the same batches."""
    inner = loader.loader if isinstance(loader, Batches) else loader
    sharded = isinstance(getattr(inner, "sampler", None), DistributedSampler)
    sampler: Any = getattr(inner, "sampler", None)
    if processes > 1 and sharded and split != "train" and sampler.total_size != len(sampler.dataset):
        raise KdError(
            f"the {split} loader repeats samples so that all {processes} processes have equally many: they would count "
            "twice. Give it lightning.pytorch.overrides.distributed.UnrepeatedDistributedSampler"
        )
    if processes > 1 and not sharded and not hasattr(inner, "world_size"):
        raise KdError(
            f"the {split} loader gives each of the {processes} processes the whole set: give it a "
            "torch.utils.data.DistributedSampler, or train in one process"
        )


def _length(loader: Any) -> int | None:
    """Count the batches; None of a stream: a loader of an ``IterableDataset`` has a length that raises."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _defines(own: Any, method: str) -> bool:
    made = getattr(own, method, None)
    return made is not None and getattr(made, "__func__", None) is not getattr(LightningDataModule, method)


def _count(loader: Any) -> int | None:
    dataset: Any = getattr(loader, "dataset", None)
    if isinstance(dataset, Sequence) or hasattr(dataset, "__len__"):
        return len(dataset)
    return None
