"""Images that a table lists: csv and other files with a column of paths, Hugging Face ``datasets``, Python rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.config.rules import FLAG, Rule, refusals, refuse
from kd.data.images.files import readable
from kd.data.images.image_files import ImageFiles
from kd.data.images.parts import Samples, Source
from kd.data.images.stored import NamedContent, images_of
from kd.data.text.labels import class_label, class_names, positions
from kd.data.text.options import plain
from kd.data.text.records import Records, dataset_of, load_splits, located, of_dataset, read, read_file
from kd.errors import KdError

log = logging.getLogger(__name__)

TEXT = Rule("the name of a column", lambda value: isinstance(value, str) and bool(value))
RULES = {"image": TEXT, "label": TEXT, "skip_unreadable": FLAG}
COLUMNS = ("files", "sizes", "names", "labels")  # of Listed


@dataclass
class Listed:
    """The images of a split: files or stored images, their bytes (−1: not there), names and labels."""

    files: list[Any]
    sizes: list[int]
    names: list[str]
    labels: list[str | None]
    where: str

    def take(self, rows: Sequence[int]) -> Listed:
        """Keep these rows."""
        return Listed(**{key: [getattr(self, key)[row] for row in rows] for key in COLUMNS}, where=self.where)


class ImageTable(ImageFiles):
    """RGB images by a column of paths, or of images, and a column of labels; see :class:`ImageFiles` for the others.

    ``train``, ``val``, ``test``: a file (.csv, .tsv, .jsonl, .parquet), a list of files, rows, a ``datasets.Dataset``,
    or {name, subset, split} of a folder or a set of the Hugging Face hub. Val, where there is none, is cut from train,
    and so is test by ``test_fraction``
    ``name``, ``subset``: in their place, a folder that datasets has saved or can read, or a set of the hub
    ``image``: column of paths, relative to the file that lists them or to ``root``; of datasets an image column
    ``label``: column of classes; ``label_names``: the classes in order; null: those of train, sorted
    ``encoding``, ``delimiter``: of the files, see :class:`kd.data.text.base.TextModule`
    ``skip_unreadable``: leave images out that are not there or are no images, with a warning; false: that is an error.
    From files that stay on the disk only the beginning is read for it

    An image that is in two of the splits, by its path, is refused. ``index`` is the row in its table.
    """

    def __init__(
        self,
        *,
        train: Any = None,
        val: Any = None,
        test: Any = None,
        name: str | None = None,
        subset: str | None = None,
        image: str = "path",
        label: str = "label",
        label_names: Sequence[str] | None = None,
        encoding: str = "utf-8",
        delimiter: str | None = None,
        skip_unreadable: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        refuse(refusals("data.", locals(), RULES))
        self.given = {"train": plain(train), "val": plain(val), "test": plain(test)}
        self.name, self.subset, self.columns = name, subset, (image, label)
        self.label_names = None if label_names is None else list(map(str, plain(label_names)))
        self.encoding, self.delimiter, self.skip_unreadable = encoding, delimiter, skip_unreadable

    def load(self) -> Source:
        """Read the tables, and decode the images if they are to stay in memory."""
        listed = {split: self._there(self._listed(split, source)) for split, source in self._sources().items()}
        self._check_test(listed)
        _refuse_overlap(listed)
        labels = listed["train"].labels
        self.class_names = self.label_names or class_names(labels, self.columns[1], listed["train"].where)
        self.num_classes = len(self.class_names)
        parts = {split: self._samples(part, split) for split, part in listed.items()}
        parts = self.kept(parts)
        return Source(parts["train"], val=parts.get("val"), test=parts.get("test"))

    # ------------------------------------------------------------------ reading

    def _sources(self) -> dict[str, Any]:
        given = {split: source for split, source in self.given.items() if source is not None}
        if self.name is not None:
            if given:
                raise KdError(f"data.{next(iter(given))} is not allowed with data.name = {self.name}: give one of both")
            return load_splits(self.name, self.subset, self.root)
        if "train" not in given:
            raise KdError(
                "data.train = null is not allowed: it must be a table (.csv, .tsv, .jsonl or .parquet) with columns of "
                "paths and of labels; or set data.name to a set of datasets"
            )
        return given

    def _listed(self, split: str, source: Any) -> Listed:
        """List one split. ``KdError`` for a column or a label that is missing."""
        image, label = self.columns
        if (dataset := dataset_of(source, self.root, split)) is not None:
            rows, where = dataset
            names = list(rows.column_names)
            _refuse_missing(Records({name: [] for name in names}, where), image, label)
            records = of_dataset(rows.select_columns([label]), where)
            if type(rows.features[image]).__name__ == "Image":
                files, sizes, written = images_of(rows, image, where)
                return Listed(files, sizes, written, self._labels(records), where)
            return self._paths(of_dataset(rows.select_columns([image, label]), where), [None] * len(rows))
        files = [source] if isinstance(source, (str, Path)) else source
        if not isinstance(files, Sequence) or not files or not all(isinstance(file, (str, Path)) for file in files):
            records = read(source, self.root, self.encoding, split)  # rows, or the sentence that they are none
            return self._paths(records, [None] * len(records))
        found = [located(file, self.root, split) for file in files]
        tables = [read_file(file, self.encoding, self.delimiter) for file in found]
        parts = [self._paths(t, [file.parent] * len(t)) for t, file in zip(tables, found, strict=True)]
        joined: dict[str, list[Any]] = {key: [x for part in parts for x in getattr(part, key)] for key in COLUMNS}
        more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
        return Listed(**joined, where=f"{parts[0].where}{more}")

    def _paths(self, records: Records, folders: Sequence[Path | None]) -> Listed:
        """Find the files of a column of paths: beside their table, else below ``root``."""
        image, label = self.columns
        _refuse_missing(records, image, label)
        names = [str(value or "").strip() for value in records.columns[image]]
        root = Path(self.root or ".").expanduser()
        files, sizes = [], []
        for name, folder in zip(names, folders, strict=True):
            tried = [place / name for place in (folder, root) if place is not None] if name else []
            file = next((path for path in tried if path.is_file()), tried[0] if tried else Path(name))
            files.append(file)
            sizes.append(file.stat().st_size if file.is_file() else -1)
        return Listed(files, sizes, names, self._labels(records), records.where)

    def _labels(self, records: Records) -> list[str | None]:
        label = self.columns[1]
        return [class_label(value, records.classes.get(label)) for value in records.columns[label]]

    def _there(self, listed: Listed) -> Listed:
        """Leave out images that are not there, or are none, where that is allowed."""
        absent = [row for row, size in enumerate(listed.sizes) if size < 0]
        broken = []
        if self.skip_unreadable:
            there = (row for row, size in enumerate(listed.sizes) if size >= 0)
            broken = [row for row in there if not readable(listed.files[row])]
        wrong = sorted([*absent, *broken])
        if not wrong:
            return listed
        names = ", ".join(listed.names[row] or "an empty path" for row in wrong[:3]) + (" …" if len(wrong) > 3 else "")
        count = f"{len(wrong):,} of {len(listed.files):,} images of {listed.where}"
        if not self.skip_unreadable:
            raise KdError(
                f"{count} are not there: {names} (data.image = {self.columns[0]}; relative to the table, or to "
                f"paths.data = {self.root}); data.skip_unreadable=true leaves them out"
            )
        log.warning("%s are not there or no images, and are left out: %s", count, names)
        lost = set(wrong)
        return listed.take([row for row in range(len(listed.files)) if row not in lost])

    # ------------------------------------------------------------------ classes and splits

    def _samples(self, listed: Listed, split: str) -> Samples:
        known = "data.label_names" if self.label_names is not None else "train"
        if not listed.files:
            raise KdError(f"{listed.where} has no image for {split}")
        if None in listed.labels:
            empty = listed.names[listed.labels.index(None)]
            raise KdError(
                f"{listed.where} has {listed.labels.count(None):,} images without a label ({empty}): {split} needs one "
                f"for each, in the column data.label = {self.columns[1]}"
            )
        places = {name: place for place, name in enumerate(self.class_names)}
        targets: Tensor = torch.tensor(positions(listed.labels, places, listed.where, known), dtype=torch.int64)
        return Samples(listed.files, targets, NamedContent(listed.files, listed.sizes, listed.names))

    def _check_test(self, listed: Mapping[str, Listed]) -> None:
        if "test" in listed and self.test_fraction:
            raise KdError(f"data.test_fraction = {self.test_fraction} is not allowed: there is a test set")
        if "test" not in listed and not self.test_fraction:
            raise KdError("there is no test set: set data.test, or cut it from train with data.test_fraction=0.2")


def _refuse_missing(records: Records, image: str, label: str) -> None:
    for key, name in (("image", image), ("label", label)):
        records.column(name, key)


def _refuse_overlap(listed: Mapping[str, Listed]) -> None:
    """Refuse an image file that is in two splits: the test set would not be one."""
    seen: dict[str, str] = {}
    for split, part in listed.items():
        files = {str(file) for file in part.files if isinstance(file, Path)}
        if twice := sorted(file for file in files if file in seen):
            raise KdError(
                f"{len(twice):,} images of {split} are in {seen[twice[0]]} as well, {twice[0]} for example: take them "
                "out of one of both"
            )
        seen |= dict.fromkeys(files, split)
