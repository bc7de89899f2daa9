"""A user's own map-style datasets of torch, ``(input, label)`` each, as a data module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from kd.config.rules import FLAG, number, refusals, refuse, whole
from kd.data.split import generator, round_half_up, stratified
from kd.errors import KdError

SPLITS = ("train", "val", "test")
SHARE = number(above=0, below=1)
RULES = {
    **dict.fromkeys(("batch_size", "eval_batch_size"), whole(1)),
    **dict.fromkeys(("seed", "num_workers"), whole(0)),
    **dict.fromkeys(("num_classes", "split_seed"), whole(0).or_null),
    "val_fraction": SHARE,
    "test_fraction": SHARE.or_null,
    **dict.fromkeys(("shuffle", "drop_last"), FLAG),
}


class Indexed(Dataset[tuple[Any, Any, int]]):
    """The rows ``index`` (n,) of a dataset, each item with its row."""

    def __init__(self, dataset: Any, index: Tensor) -> None:
        self.dataset, self.index = dataset, index

    def __getitem__(self, place: int) -> tuple[Any, Any, int]:
        """Give input, label and row of one sample."""
        row = int(self.index[place])
        inputs, label, *_ = self.dataset[row]
        return inputs, label, row

    def __len__(self) -> int:
        return len(self.index)


class TorchDatasets(lightning.LightningDataModule):
    """``train``, ``val`` and ``test``: map-style datasets whose items are ``(tensor, label)``, of any shape.

    What is not given is cut from train: val by ``val_fraction``, test by ``test_fraction`` (null: that is an error), in
    equal shares of the classes where the dataset lists them as ``targets`` (torchvision's do), drawn by ``split_seed``
    (null: ``seed``). A cut of a dataset that augments is augmented as well: give val a dataset of its own then.

    ``num_classes``, ``class_names``: null: of the dataset's ``classes``, else of its ``targets``; ``mean``, ``std``:
    that its images were normalised by, where a teacher was trained on other statistics
    """

    def __init__(
        self,
        *,
        train: Any = None,
        val: Any = None,
        test: Any = None,
        val_fraction: float = 0.1,
        test_fraction: float | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        seed: int = 0,
        split_seed: int | None = None,
        num_workers: int = 0,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        refuse(refusals("data.", locals(), RULES))
        self.given = {"train": train, "val": val, "test": test}
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.split_seed = seed if split_seed is None else split_seed
        self.mean, self.std, self.shuffle, self.drop_last = list(mean), list(std), shuffle, drop_last
        self.num_classes, self.class_names = num_classes, list(map(str, class_names or ()))
        self.parts: dict[str, Indexed] = {}

    def setup(self, stage: str | None = None) -> None:
        """Cut the splits and find the classes, once."""
        if self.parts:
            return
        for split, dataset in self.given.items():
            _check(split, dataset)
        train = self.given["train"]
        rows, labels = torch.arange(len(train)), _targets(train)
        for split in ("test", "val"):
            if (own := self.given[split]) is not None:
                self.parts[split] = Indexed(own, torch.arange(len(own)))
            else:
                chosen, rest = self._cut(split, rows, labels)
                self.parts[split], rows = Indexed(train, rows[chosen]), rows[rest]
                labels = None if labels is None else labels[rest]
        self.parts["train"] = Indexed(train, rows)
        self.train_index, self.train_targets = rows, labels
        classes = list(map(str, getattr(train, "classes", ())))
        self.class_names = self.class_names or classes
        found = len(self.class_names) or (int(labels.max()) + 1 if labels is not None and len(labels) else None)
        self.num_classes = found if self.num_classes is None else self.num_classes
        if not self.class_names:
            self.class_names = list(map(str, range(self.num_classes or 0)))

    def _cut(self, split: str, rows: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Choose places in ``rows`` for a split, and those that stay."""
        fraction = self.fractions[split]
        if fraction is None:
            raise KdError("there is no test set: set data.test, or cut it from train with data.test_fraction=0.2")
        total = round_half_up(fraction * len(rows))
        if not 0 < total < len(rows):
            raise KdError(f"data.{split}_fraction = {fraction} leaves nothing for {split}, or to train on")
        if labels is not None and bool((labels >= 0).all()):
            return stratified(labels, total, self.split_seed, split)
        order = torch.randperm(len(rows), generator=generator(self.split_seed, split))
        return order[:total].sort().values, order[total:].sort().values

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of train, shuffled; each of several processes has a part."""
        return self._loader("train", self.batch_size // self._processes())

    def val_dataloader(self) -> DataLoader[Any]:
        """Return batches of val, in order."""
        return self._loader("val", self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return batches of test, in order."""
        return self._loader("test", self.eval_batch_size)

    def _processes(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    def _loader(self, split: str, batch_size: int) -> DataLoader[Any]:
        self.setup()
        part, train, count = self.parts[split], split == "train", self._processes()
        order: dict[str, Any] = {"shuffle": train and self.shuffle}
        if count > 1:
            kind: Any = DistributedSampler if train else UnrepeatedDistributedSampler
            rank = self.trainer.global_rank if self.trainer is not None else 0
            order = {"sampler": kind(part, num_replicas=count, rank=rank, shuffle=train and self.shuffle)}
        order |= {"drop_last": train and self.drop_last, "num_workers": self.num_workers}
        return DataLoader(part, batch_size, **order)


def _check(split: str, dataset: Any) -> None:
    """Raise ``KdError`` for what is no map-style dataset of tensors and labels, by its first item."""
    if dataset is None and split == "train":
        raise KdError("data.train = null is not allowed: it must be a dataset, {_target_: mymodule.MyDataset, …}")
    if dataset is None:
        return
    name = type(dataset).__name__
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise KdError(f"data.{split} is a {name}: it must be a map-style dataset, with __getitem__ and __len__")
    if not len(dataset):
        raise KdError(f"data.{split}, a {name}, is empty")
    item = dataset[0]
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise KdError(f"data.{split}, a {name}, gives items of type {type(item).__name__}: each must be (input, label)")
    if not isinstance(item[0], Tensor):
        raise KdError(
            f"data.{split}, a {name}, gives a {type(item[0]).__name__} as an input: it must be a tensor (of an image: "
            "give the dataset a transform that makes one)"
        )


def _targets(dataset: Any) -> Tensor | None:
    """Return the labels (n,) int64 that a dataset lists as ``targets``; None: it does not."""
    listed = getattr(dataset, "targets", None)
    if listed is None or len(listed) != len(dataset):
        return None
    found = torch.as_tensor(listed)
    return None if found.is_floating_point() or found.ndim != 1 else found.long()
