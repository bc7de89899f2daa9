"""The samples of a set as they lie on disk, and the parts that a run splits them into."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kd.data.content import ArrayContent, Content, FileContent, Rows
from kd.errors import KdError


class Samples(NamedTuple):
    """One array or folder as it lies on disk: its positions are the ``index`` of a batch."""

    inputs: Tensor | list[Path]  # (n, C, H, W) uint8, or image files
    targets: Tensor  # (n,) int64; of images with a class at each pixel 0
    content: Content | None = None  # of files; null: the array
    masks: Tensor | FileContent | None = (
        None  # a class at each pixel: (n, H, W) uint8, or files; null: an image has one
    )

    def label_bytes(self) -> bytes:
        """Give what the digest of a set knows of its labels."""
        if self.masks is None:
            return self.targets.numpy().tobytes()
        return self.masks.numpy().tobytes() if isinstance(self.masks, Tensor) else b"".join(self.masks.parts())


class Source(NamedTuple):
    """What a set delivers. ``val``: carved from ``train`` if None; ``test`` likewise, by ``test_fraction``."""

    train: Samples
    test: Samples | None = None
    val: Samples | None = None


@dataclass(frozen=True)
class Part:
    """One split: the rows ``index`` (n,) int64 of ``inputs``, with ``targets`` (n,) that may be UNLABELLED.

    ``masks``: of all ``inputs``, where there is a class at each pixel.
    """

    inputs: Tensor | list[Path]
    targets: Tensor
    index: Tensor
    content: Content
    masks: Tensor | FileContent | None = None

    def take(self, rows: Tensor) -> Part:
        """Return the part made of these rows."""
        return replace(self, targets=self.targets[rows], index=self.index[rows])

    @property
    def rows(self) -> Rows:
        """Its samples as they lie on disk, whatever was done to ``inputs``."""
        return Rows(self.content, self.index)


def folder_of(root: str | None) -> Path:
    """Return the folder of data sets; ``KdError`` when none is named."""
    if not root:
        raise KdError(f"data.root = {root} is not allowed: set paths.data, or KD_DATA, to the folder of data sets")
    return Path(root).expanduser()


def whole(samples: Samples) -> Part:
    """Make a part of all samples."""
    index = torch.arange(len(samples.targets))
    return Part(samples.inputs, samples.targets, index, content_of(samples), samples.masks)


def content_of(samples: Samples) -> Content:
    """Return the contents of samples, for their digest."""
    if samples.content is not None:
        return samples.content
    if isinstance(samples.inputs, Tensor):
        return ArrayContent(samples.inputs)
    files = [Path(file) for file in samples.inputs]
    return FileContent(Path(os.path.commonpath(files)) if files else Path(), files, [f.stat().st_size for f in files])
