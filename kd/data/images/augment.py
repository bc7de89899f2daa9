"""Random crops, flips and shifts of in-memory images: one gather a batch, another offset for every sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.config.rules import FLAG, Rule, list_of, number, one_of, refusals, whole
from kd.data.split import generator, mix
from kd.errors import did_you_mean

SHARES = list_of(number(above=0, most=1), least=2)
RULES = {
    "pad": whole(0),
    "pad_mode": one_of("constant", "reflect"),
    "flip": FLAG,
    "scale": Rule("[low, high], 0 < low <= high <= 1", lambda s: SHARES.fits(s) and [*s] == sorted(s[:2])).or_null,
    "period": whole(1).or_null,
}


@dataclass(frozen=True)
class Augment:
    """What happens to a training image.

    ``pad``: pixels added on each side before a random crop of the original size; 0: no crop
    ``pad_mode``: "constant" pads with 0 (black), "reflect" mirrors without repeating the edge
    ``flip``: mirror left-right with probability 1/2
    ``scale``: (lowest, highest) area of the random resized crop, fractions in (0, 1]; image files only
    ``period``: epochs after which the draws repeat: epoch e is augmented as epoch e mod ``period`` was, in another
    order, so that a network sees so many different views of an image; None: another one in each epoch
    """

    pad: int = 0
    pad_mode: str = "constant"
    flip: bool = False
    scale: Sequence[float] | None = None
    period: int | None = None

    @property
    def active(self) -> bool:
        """Whether in-memory images are changed at all."""
        return self.pad > 0 or self.flip


def augment_problems(values: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each entry of ``values`` that :class:`Augment` does not allow."""
    problems = [f"data.augment.{key} is not an option{did_you_mean(key, RULES)}" for key in values if key not in RULES]
    return problems + refusals("data.augment.", values, RULES)


def to_planes(images: Tensor) -> Tensor:
    """Lay out (n, C, H, W) uint8 as (C, 1 + n*H*W): one flat plane a channel, with a zero in front for "outside"."""
    count, channels, height, width = images.shape
    planes = torch.zeros(channels, 1 + count * height * width, dtype=torch.uint8)
    planes[:, 1:].view(channels, count, height, width).copy_(images.transpose(0, 1))
    return planes


def window(offsets: Tensor, flips: Tensor | None, size: tuple[int, int], mode: str) -> tuple[Tensor, Tensor]:
    """Say where in a plane (:func:`to_planes`) each output pixel comes from: row part (n, H) and column part (n, W).

    Output pixel (y, x) of image i is its input pixel (y + offsets[i, 0], x + offsets[i, 1]), with x counted from the
    right where ``flips[i]``: crop first, then flip. Outside: 0 ("constant") or mirrored ("reflect").
    """
    height, width = size
    small = 1 + len(offsets) * height * width < 2**30
    far = -(2**30) if small else -(2**62)  # outside, whatever is added to it
    dtype = torch.int32 if small else torch.int64  # int32 halves the memory traffic
    ys = torch.arange(height) + offsets[:, :1]
    xs = torch.arange(width).expand(len(offsets), width)
    if flips is not None:
        xs = torch.where(flips[:, None], width - 1 - xs, xs)
    xs = xs + offsets[:, 1:]
    if mode == "reflect":
        ys = height - 1 - (height - 1 - ys.abs()).abs()
        xs = width - 1 - (width - 1 - xs.abs()).abs()
    start = 1 + torch.arange(len(offsets))[:, None] * (height * width)
    y_part = torch.where((ys < 0) | (ys >= height), far, start + ys * width).to(dtype)
    x_part = torch.where((xs < 0) | (xs >= width), far, xs).to(dtype)
    return y_part, x_part


def places(y_part: Tensor, x_part: Tensor) -> Tensor:
    """Add up both parts of some images: the index (B * H * W,) into a plane, 0 for what lies outside."""
    return (y_part[:, :, None] + x_part[:, None, :]).clamp_(min=0).view(-1)


def draw(augment: Augment, count: int, seed: int, epoch: int, who: str = "augment") -> tuple[Tensor, Tensor | None]:
    """Crop offsets (count, 2) in [-pad, pad] and flips (count,) bool, or None, of every sample in one epoch.

    ``who``: another word gives other, independent draws.
    """
    random = generator(seed, epoch, who)
    offsets = torch.randint(-augment.pad, augment.pad + 1, (count, 2), generator=random)
    return offsets, torch.rand(count, generator=random) < 0.5 if augment.flip else None


def draw_mix(alpha: float, count: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Draw with which sample each is mixed in one epoch, (count,) int64, and its own share, (count,) float32 in [0, 1].

    The partners are a permutation of all samples, the shares are drawn from Beta(alpha, alpha): 1 is uniform.
    """
    partners = torch.randperm(count, generator=generator(seed, epoch, "mixup"))
    shares = np.random.default_rng(mix(seed, epoch, "mixup shares")).beta(alpha, alpha, count)  # torch's takes no seed
    return partners, torch.from_numpy(shares).float()


def shifted(images: Tensor, reach: int, seed: int = 0) -> Tensor:
    """Move each of ``images`` (n, C, H, W) uint8 by its own offset in [-reach, reach]², never (0, 0), filled with 0.

    The offsets depend on ``seed``, ``reach`` and the position of the image alone.
    """
    count, _, height, width = images.shape
    side = 2 * reach + 1
    cell = torch.randint(side * side - 1, (count,), generator=generator(seed, reach, "shift"))
    cell += (cell >= side * side // 2).long()  # jump over the middle cell, the offset (0, 0)
    offsets = torch.stack([cell // side, cell % side], dim=1) - reach
    planes = to_planes(images)
    index = places(*window(offsets, None, (height, width), "constant"))
    moved = [plane.index_select(0, index).view(count, 1, height, width) for plane in planes]
    return torch.cat(moved, dim=1)
