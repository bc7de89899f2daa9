"""The data module every set derives from: options and their checks, splits, withheld labels, loaders."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning
import torch
from torch import Tensor

from kd.config.rules import refuse
from kd.data import content
from kd.data.images.augment import Augment, augment_problems, shifted
from kd.data.images.loader import Loader, TensorLoader
from kd.data.images.options import common_problems
from kd.data.images.parts import Part, Source, content_of, whole
from kd.data.split import round_half_up, stratified
from kd.errors import KdError
from kd.losses.base import UNLABELLED


class DataModule(lightning.LightningDataModule, ABC):
    """Train, val and test of one set, always apart: val is carved from train, test is read by ``test_dataloader`` only.

    A subclass sets ``num_classes``, ``input_shape`` and ``class_names`` (in its constructor, or in ``load``) and
    defines ``load() -> Source``. A batch is ``kd.losses.base.Batch``: inputs (B, C, H, W) float32, normalised; targets
    and index (B,) int64, index the position in the original array or folder listing, whatever the options are.

    Options, all of which name themselves in the error when they are wrong (``KdError``):

    ``root``: folder of data sets
    ``batch_size``: samples a step, over all processes together; ``eval_batch_size``: samples a batch and process
    ``seed``: order, augmentation, and the choice of labels and of ``train_size``; ``split_seed``: what goes to val
    (null: ``seed``)
    ``val_fraction``: part of the training set used for validation, in (0, 1), stratified
    ``label_fraction``: part of the training set that keeps its label, in (0, 1], stratified, at least one a class
    ``keep_unlabelled``: whether the others stay, as UNLABELLED transfer set, or are removed
    ``drop_classes``: classes without any training image; val and test keep them and ``num_classes`` does not change
    ``train_size``: at most this many training images, stratified; null: all
    ``test_shift``: move every test image by a fixed random offset of up to this many pixels, never (0, 0)
    ``augment``: see :class:`kd.data.images.augment.Augment`
    ``teacher_view``: what the teacher sees of a training image: "clean", not augmented; "independent", under a crop and
    flip of its own; null: what the student sees
    ``mixup``: mix each training image with another, shares from Beta(mixup, mixup), 1 is uniform; null: do not
    ``mean``, ``std``: a value a channel, or one for all, on the 0..1 scale
    ``shuffle``, ``drop_last``: of the training batches
    """

    num_classes: int
    input_shape: tuple[int, int, int]
    class_names: list[str]
    reads_files = False  # whether augment.scale means anything
    augmentation_off: Sequence[str] = ()  # options that have no effect on these images; recorded

    def __init__(
        self,
        *,
        root: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        seed: int = 0,
        split_seed: int | None = None,
        val_fraction: float = 0.1,
        label_fraction: float = 1.0,
        keep_unlabelled: bool = True,
        drop_classes: Sequence[int] = (),
        train_size: int | None = None,
        test_shift: int = 0,
        augment: Mapping[str, Any] | None = None,
        teacher_view: str | None = None,
        mixup: float | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        problems = [*common_problems(locals()), *augment_problems(augment or {})]
        if not self.reads_files and augment and augment.get("scale") is not None:
            problems.append("data.augment.scale is for image files only (data=imagefolder): use data.augment.pad")
        refuse(problems)
        self.root, self.batch_size, self.eval_batch_size = root, batch_size, eval_batch_size
        self.seed, self.split_seed = seed, seed if split_seed is None else split_seed
        self.val_fraction, self.label_fraction, self.keep_unlabelled = val_fraction, label_fraction, keep_unlabelled
        self.drop_classes, self.train_size, self.test_shift = list(drop_classes), train_size, test_shift
        self.augment = Augment(**(augment or {}))
        self.teacher_view, self.mixup = teacher_view, mixup
        self.mean, self.std = list(mean), list(std)
        self.shuffle, self.drop_last = shuffle, drop_last
        self.test_fraction = 0.0  # of sets without a test set of their own
        self.parts: dict[str, Part] = {}

    @abstractmethod
    def load(self) -> Source:
        """Read the set. Raises ``KdError`` when it is missing or damaged."""

    def setup(self, stage: str | None = None) -> None:
        """Read and split the set, once; ``stage`` makes no difference."""
        if self.parts:
            return
        source = self.load()
        self._check_shape()
        if self.num_classes < 2:
            raise KdError(f"the data has {self.num_classes} class ({', '.join(self.class_names)}): it needs 2 or more")
        every = [part for part in (source.train, source.val, source.test) if part is not None]
        labels = b"".join(part.label_bytes() for part in every) + "|".join(self.class_names).encode()
        self.digest = hashlib.sha256(labels).hexdigest()[:12]
        self.content = content.digest([content_of(part) for part in every], labels)
        train, val, test = self._split(source)
        self.parts = {"train": self._withhold(self._shrink(train)), "val": val, "test": self._shifted(test)}

    def _split(self, source: Source) -> tuple[Part, Part, Part]:
        train = whole(source.train)
        test, train = self._carve(train, "test") if source.test is None else (whole(source.test), train)
        val, train = self._carve(train, "val") if source.val is None else (whole(source.val), train)
        return train, val, test

    def _carve(self, part: Part, name: str) -> tuple[Part, Part]:
        fraction, count = getattr(self, f"{name}_fraction"), len(part.targets)
        chosen, rest = self.cut(part, fraction, name)
        if not len(chosen) or not len(rest):
            lacking = f"no image for {'validation' if name == 'val' else 'the test set'}"
            left = "none to train on" if len(chosen) else lacking
            raise KdError(f"data.{name}_fraction = {fraction} leaves {left}: the training set has {count:,} images")
        return part.take(chosen), part.take(rest)

    def cut(self, part: Part, fraction: float, name: str) -> tuple[Tensor, Tensor]:
        """Choose the rows of ``part`` that become the split ``name``, and those that stay; stratified."""
        total = min(round_half_up(fraction * len(part.targets)), len(part.targets))
        return stratified(part.targets, total, self.split_seed, name)

    def _shrink(self, train: Part) -> Part:
        """Leave out the dropped classes, and keep no more than ``train_size``."""
        wrong = [c for c in self.drop_classes if not 0 <= c < self.num_classes]
        if wrong:
            raise KdError(f"data.drop_classes = {wrong} is not allowed: classes are 0 to {self.num_classes - 1}")
        dropped = torch.tensor(self.drop_classes, dtype=torch.int64)
        train = train.take((~torch.isin(train.targets, dropped)).nonzero().flatten())
        count = len(train.targets)
        if count == 0:
            raise KdError(f"data.drop_classes = {self.drop_classes} leaves no image to train on")
        if self.train_size is None:
            return train
        if self.train_size > count:
            raise KdError(f"data.train_size = {self.train_size} is not allowed: there are {count:,} training images")
        return train.take(stratified(train.targets, self.train_size, self.seed, "train_size")[0])

    def _withhold(self, train: Part) -> Part:
        """Keep labels for ``label_fraction`` of the images only."""
        if self.label_fraction < 1:
            total = round_half_up(self.label_fraction * len(train.targets))
            labelled, rest = stratified(train.targets, total, self.seed, "labels", minimum=1)
            if not self.keep_unlabelled:
                train = train.take(labelled)
            else:
                train = replace(train, targets=train.targets.index_fill(0, rest, UNLABELLED))
        if self.drop_last and len(train.targets) < self.batch_size:
            raise KdError(
                f"data.drop_last = true leaves no batch: {len(train.targets):,} training images are fewer than "
                f"data.batch_size = {self.batch_size}"
            )
        return train

    def _shifted(self, test: Part) -> Part:
        if not self.test_shift:
            return test
        if not isinstance(test.inputs, Tensor):
            raise KdError(f"data.test_shift = {self.test_shift} needs images in memory: set data.in_memory=true")
        return replace(test, inputs=shifted(test.inputs, self.test_shift))

    def _check_shape(self) -> None:
        channels, height, width = self.input_shape
        for key in ("mean", "std"):
            values = getattr(self, key)
            if len(values) not in (1, channels):
                raise KdError(f"data.{key} = {values} is not allowed: the images have {channels} channel(s)")
            setattr(self, key, values * channels if len(values) == 1 else values)
        edge = min(height, width)
        if self.augment.pad >= edge:  # a crop could hold nothing of the image; nor can that be mirrored
            size = f"the images are {height} x {width}"
            raise KdError(f"data.augment.pad = {self.augment.pad} is not allowed: it must be less than {edge}, {size}")
        if self.test_shift >= edge:
            raise KdError(f"data.test_shift = {self.test_shift} is not allowed: the images are {height} x {width}")

    @property
    def sizes(self) -> dict[str, int]:
        """Images in train, val and test, and ``labelled``: those of train that have a label."""
        self.setup()
        labelled = int((self.parts["train"].targets != UNLABELLED).sum())
        return {**{name: len(part.targets) for name, part in self.parts.items()}, "labelled": labelled}

    @property
    def train_index(self) -> Tensor:
        """Index (n,) int64 of the training images."""
        self.setup()
        return self.parts["train"].index

    @property
    def train_targets(self) -> Tensor:
        """Targets (n,) int64 of the training images, in the order of :attr:`train_index`."""
        self.setup()
        return self.parts["train"].targets

    def example(self) -> Tensor:
        """Return one black image, a batch of one."""
        return torch.zeros(1, *self.input_shape)

    @property
    def title(self) -> str:
        """What people call the set: in reports."""
        return type(self).__name__

    @property
    def split_facts(self) -> dict[str, Any]:
        """What decides which image is in which split: two runs of one set with equal facts share their splits."""
        self.setup()
        fractions = {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction}
        return {"set": f"{self.title} {self.digest}", "split_seed": self.split_seed, **fractions}

    @property
    def seen(self) -> dict[str, Any]:
        """What weights record of the images of train and val, see :func:`kd.data.content.seen`."""
        self.setup()
        return content.seen([self.parts["train"].rows, self.parts["val"].rows])

    def seen_in_test(self, recorded: Mapping[str, Any]) -> list[str]:
        """Name the test images that are among those of another run's :attr:`seen`."""
        self.setup()
        return content.overlap(recorded, self.parts["test"].rows, [self.parts["train"].rows, self.parts["val"].rows])

    def copies_in_test(self) -> int:
        """Count the test images that are training images as well, as far as that is known without reading files."""
        self.setup()
        return content.copies(self.parts["test"].rows, self.parts["train"].rows)

    def train_dataloader(self) -> Loader:
        """Return batches of train, shuffled, augmented; those of several ranks together are those of one process."""
        return self._loader("train")

    def answering_dataloader(self, view: int | None = None) -> Loader:
        """Return all training images once, in order, on this rank: for a teacher whose answers are computed only once.

        ``view``: which of the teacher's :attr:`views`. None: the only one; ``KdError`` where there are several.
        """
        if view is None and self.views > 1:
            raise KdError(
                f"data.augment.period = {self.augment.period} gives the teacher {self.views} views of an image, and "
                "what is to be kept is one answer to each (teacher.cache): keep them on the disk with teacher.answers, "
                "or set data.teacher_view=clean"
            )
        whole = {"batch_size": self.eval_batch_size, "shuffle": False, "drop_last": False, "rank": 0, "world_size": 1}
        loader = self._loader("train", **whole)
        loader.set_epoch(view or 0)
        return loader

    @property
    def moving(self) -> str | None:
        """The option by which a teacher does not see the images as they are; None: it does."""
        if self.mixup is not None:
            return "data.mixup"
        return "data.augment" if self.augment.active and self.teacher_view != "clean" else None

    @property
    def random_view(self) -> str | None:
        """The option that gives a teacher another view of an image in every epoch; None: it sees the same ones."""
        return self.moving if self.augment.period is None else None

    @property
    def views(self) -> int:
        """How many views of an image a teacher sees, one an epoch in turn (``augment.period``)."""
        return self.augment.period or 1 if self.moving else 1

    def val_dataloader(self) -> Loader:
        """Return batches of val, in order, each sample on one rank only."""
        return self._loader("val")

    def test_dataloader(self) -> Loader:
        """Return batches of test, in order, each sample on one rank only."""
        return self._loader("test")

    def _loader(self, name: str, **changed: Any) -> Loader:
        self.setup()
        loader = self.make_loader(self.parts[name], **{**self.loader_options(train=name == "train"), **changed})
        if name == "train" and not isinstance(loader, TensorLoader):
            for key, value in {"teacher_view": self.teacher_view, "mixup": self.mixup}.items():
                if value is not None:
                    raise KdError(f"data.{key} = {value} needs images in memory: set data.in_memory=true")
        return loader

    def loader_options(self, train: bool) -> dict[str, Any]:
        """Return keyword arguments of a loader, for the rank that this process has."""
        world_size = self.trainer.world_size if self.trainer is not None else 1
        if train and self.batch_size % world_size:
            raise KdError(f"recipe.batch_size = {self.batch_size} cannot be split over {world_size} processes evenly")
        return {
            "batch_size": self.batch_size // world_size if train else self.eval_batch_size,
            "mean": self.mean,
            "std": self.std,
            "train": train,
            "seed": self.seed,
            "shuffle": train and self.shuffle,
            "drop_last": self.drop_last,
            "rank": self.trainer.global_rank if self.trainer is not None else 0,
            "world_size": world_size,
            "period": self.augment.period if train else None,
        }

    def make_loader(self, part: Part, **options: Any) -> Loader:
        """Make the loader of one part."""
        assert isinstance(part.inputs, Tensor)
        if options["train"]:
            options.update(augment=self.augment, teacher_view=self.teacher_view, mixup=self.mixup)
        return TensorLoader(part.inputs, part.targets, part.index, **options)
