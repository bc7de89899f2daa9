"""Loaders of images with a class at each pixel, which move image and mask together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.data.images.augment import draw, places, to_planes, window
from kd.data.images.files import FileLoader, Files
from kd.data.images.loader import TensorLoader, normalise
from kd.data.images.mask_files import IGNORED, Classes, decode_pair
from kd.losses.base import UNLABELLED, Batch

Joint = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""An image (C, H, W) uint8 and its mask (H, W) uint8 to both as they are trained on or measured."""


def joint_transform(size: tuple[int, int], scale: Sequence[float] | None = None, flip: bool = False) -> Joint:
    """Bring image and mask to ``size`` (H, W): the image bilinearly, the mask by its nearest pixel.

    ``scale``: from a random crop of an area in it, as :func:`kd.data.images.files.train_transform`; ``flip``: mirrored
    left-right every second time.
    """
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    steps: list[Any] = [v2.RandomResizedCrop(size, tuple(scale)) if scale else v2.Resize(size)]
    transform = v2.Compose([*steps, *([v2.RandomHorizontalFlip()] if flip else [])])

    def change(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        pixels, ids = transform(tv_tensors.Image(image), tv_tensors.Mask(mask.unsqueeze(0)))
        return pixels.as_subclass(Tensor), ids.as_subclass(Tensor).squeeze(0)

    return change


def targets_of(masks: Tensor, labels: Tensor) -> Tensor:
    """Make class ids (B, H, W) int64; an image without a label (``labels`` (B,)) has none but its ignored pixels.

    ``IGNORED`` stays what it is: a pixel without a class is no row, whether the labels of its image are known or not.
    """
    targets = masks.long()
    withheld = (labels == UNLABELLED).view(-1, 1, 1)
    return targets.masked_fill_(withheld & (targets != IGNORED), UNLABELLED)


class MaskLoader(TensorLoader):
    """Batches of images and ``masks`` (n, H, W) uint8 in memory, under one crop and flip.

    What a crop shows outside of the image is black and ``IGNORED``, or mirrored in both (``pad_mode``).
    """

    def __init__(self, images: Tensor, masks: Tensor, targets: Tensor, index: Tensor, *args: Any, **kwargs: Any):
        super().__init__(images, targets, index, *args, **kwargs)
        self.masks = masks
        self.mask_plane: Tensor | None = None
        if self.augment.active:
            (self.mask_plane,) = to_planes(masks[index].unsqueeze(1))
            self.mask_plane[0] = IGNORED  # outside

    def fetch(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        """Give the images of :class:`~kd.data.images.loader.TensorLoader` with the masks as targets."""
        masks = self._moved()
        for rows, batch in zip(batches, super().fetch(batches), strict=True):
            yield replace(batch, targets=targets_of(masks(rows), batch.targets))

    def _moved(self) -> Callable[[Tensor], Tensor]:
        """Return what gives the masks of rows, under the crops and flips of their images in this epoch."""
        plane = self.mask_plane
        if plane is None:
            return lambda rows: self.masks.index_select(0, self.index.index_select(0, rows))
        offsets, flips = draw(self.augment, len(self.targets), self.seed, self.view)
        height, width = self.masks.shape[1:]
        y_part, x_part = window(offsets, flips, (height, width), self.augment.pad_mode)

        def moved(rows: Tensor) -> Tensor:
            where = places(y_part.index_select(0, rows), x_part.index_select(0, rows))
            return plane.index_select(0, where).view(-1, height, width)

        return moved


class MaskedFiles(Files):
    """Items ``(row, seed)`` to ``(pixels, row)``: the mask is the last channel of (C + 1, H, W) uint8."""

    def __init__(self, pairs: list[tuple[Path, Path]], classes: Classes, transform: Joint) -> None:
        super().__init__([image for image, _ in pairs], lambda image: image)
        self.pairs, self.classes, self.joint = pairs, classes, transform

    def read(self, row: int) -> Tensor:
        """Decode a pair."""
        image, mask = self.joint(*decode_pair(*self.pairs[row], self.classes))
        return torch.cat([image, mask.unsqueeze(0)])


class MaskFileLoader(FileLoader):
    """Batches of image and mask files, decoded by ``num_workers`` processes, the same for any number.

    ``pairs``: all of a folder, of which the rows ``index`` belong to this part.
    """

    def __init__(
        self,
        pairs: list[tuple[Path, Path]],
        targets: Tensor,
        index: Tensor,
        batch_size: int,
        *,
        classes: Classes,
        transform: Joint,
        **options: Any,
    ) -> None:
        images = [image for image, _ in pairs]
        super().__init__(images, targets, index, batch_size, transform=lambda image: image, **options)
        self.files = MaskedFiles([pairs[i] for i in index.tolist()], classes, transform)

    def batch(self, pixels: Tensor, rows: Tensor) -> Batch:
        """Take image and mask apart."""
        targets = targets_of(pixels[:, -1], self.targets[rows])
        return Batch(normalise(pixels[:, :-1], self.scale, self.shift), targets, self.index[rows])
