"""Batches of small images straight from memory: no worker processes, no Python loop over samples.

All random numbers come from (seed, epoch), so an epoch is bit-identical whatever ran before it: after a resume, in
another process, with another number of workers. What happens to a sample in an epoch does not depend on the batch
size or the number of ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kd.data.images.augment import Augment, draw, draw_mix, places, to_planes, window
from kd.data.split import generator
from kd.losses.base import UNLABELLED, Batch

View = Callable[[Tensor], Tensor]
"""Rows (B,) int64 of a part to its images (B, C, H, W) float32, normalised, as one network sees them in one epoch."""


class Loader(ABC):
    """Order, shards, epochs and resuming; a subclass fetches the samples (:meth:`fetch`).

    ``targets``, ``index``: (n,) int64, the label and the stable position of each sample of this part
    ``batch_size``: samples of a batch on this rank; ``rank``, ``world_size``: this process of so many
    ``train``: batch k of all ranks together is batch k of one process with ``world_size * batch_size`` samples, so that
    the last one may be smaller on some ranks by one; it may be dropped. In both, each sample is on one rank only
    ``period``: epochs after which samples look as they did, see :class:`kd.data.images.augment.Augment`; batches then
    say in ``extra["view"]`` which of these views they are. The order is another one in each epoch
    """

    def __init__(
        self,
        targets: Tensor,
        index: Tensor,
        batch_size: int,
        *,
        train: bool,
        seed: int,
        shuffle: bool = False,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        period: int | None = None,
    ) -> None:
        self.period = period
        self.targets, self.index, self.batch_size = targets, index, batch_size
        self.train, self.seed, self.shuffle, self.drop_last = train, seed, shuffle, train and drop_last
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._done = 0  # batches of this epoch handed out
        self._resume: tuple[int, int] | None = None  # (epoch, batches to skip), after load_state_dict

    batch_sampler = None  # Lightning asks for it wherever there is a sampler

    @property
    def sampler(self) -> Loader:
        """Itself: Lightning calls ``loader.sampler.set_epoch(epoch)`` before each epoch, also after a resume."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration draws its random numbers for."""
        self.epoch = epoch

    @property
    def view(self) -> int:
        """The epoch that samples look as in: what is drawn for a sample depends on it, its order does not."""
        return self.epoch if self.period is None else self.epoch % self.period

    def state_dict(self) -> dict[str, int]:
        """Return epoch and batches handed out, for a checkpoint in the middle of an epoch."""
        return {"epoch": self.epoch, "batch": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip what was handed out already, if the next iteration is over that same epoch."""
        self._resume = (state["epoch"], state["batch"])

    def samples(self) -> int:
        """Count the samples that are this rank's in an epoch."""
        return len(range(self.rank, len(self.targets), self.world_size))

    def __len__(self) -> int:
        if self.drop_last:  # equally many on every rank
            return len(self.targets) // (self.batch_size * self.world_size)
        most = -(-len(self.targets) // self.world_size)  # as the rank with most samples: all take equally many steps
        return min(-(-most // self.batch_size), self.samples())

    def batches(self) -> list[Tensor]:
        """Return the rows (positions within this part) of each batch of this rank in this epoch."""
        count = len(self.targets)
        random = generator(self.seed, self.epoch, "order")
        order = torch.randperm(count, generator=random) if self.shuffle else torch.arange(count)
        mine = list(order[self.rank :: self.world_size].split(self.batch_size))
        if len(mine) < len(self):
            mine[-1:] = mine[-1].tensor_split(2)
        return mine[: len(self)]

    def __iter__(self) -> Iterator[Batch]:
        resume, self._resume = self._resume, None
        self._done = resume[1] if resume is not None and resume[0] == self.epoch else 0
        for batch in self.fetch(self.batches()[self._done :]):
            self._done += 1
            yield batch

    @abstractmethod
    def fetch(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        """Yield the samples of each tensor of rows, one batch each."""


class TensorLoader(Loader):
    """Batches of ``images`` (n, C, H, W) uint8, of which the rows ``index`` belong to this part.

    Training batches are cropped and flipped sample by sample, then ``(x / 255 - mean) / std`` in float32.
    ``mean``, ``std``: one value a channel, on the 0..1 scale. With augmentation the images of the part are copied once.
    ``teacher_view``: "clean", the teacher sees the images as they are; "independent": under crops and flips of its own;
    None: what the student sees
    ``mixup``: each image is mixed with another of the part, its share drawn from Beta(mixup, mixup), after both were
    cropped and flipped; the mixture has no label. None: no mixing
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        index: Tensor,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        train: bool,
        seed: int,
        augment: Augment | None = None,
        teacher_view: str | None = None,
        mixup: float | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        period: int | None = None,
    ) -> None:
        super().__init__(
            targets,
            index,
            batch_size,
            train=train,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            period=period,
        )
        self.images, self.augment = images, augment or Augment()
        self.teacher_view, self.mixup = teacher_view if self.augment.active else None, mixup
        self.scale, self.shift = affine(mean, std)
        self.planes = to_planes(images[index]) if self.augment.active else None

    def fetch(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        """Yield the batches; an epoch's random numbers are drawn at its start, for all samples at once."""
        student, teacher = self._cropped("augment"), self._teachers()
        extra = {} if self.period is None else {"view": self.view}
        if self.mixup is not None:
            student = self._mixed(student, self.mixup)
        for rows in batches:
            targets = self.targets.index_select(0, rows) if self.mixup is None else torch.full_like(rows, UNLABELLED)
            index = self.index.index_select(0, rows)
            views = {} if teacher is None else {"teacher": teacher(rows)}
            yield Batch(student(rows), targets, index, views=views, extra=dict(extra))

    def _teachers(self) -> View | None:
        if self.teacher_view is None:
            return None
        return self._clean if self.teacher_view == "clean" else self._cropped("teacher")

    def _clean(self, rows: Tensor) -> Tensor:
        return normalise(self.images.index_select(0, self.index.index_select(0, rows)), self.scale, self.shift)

    def _cropped(self, who: str) -> View:
        """Make this epoch's crops and flips: one gather a channel."""
        planes = self.planes
        if planes is None:
            return self._clean
        offsets, flips = draw(self.augment, len(self.targets), self.seed, self.view, who)
        height, width = self.images.shape[2:]
        y_part, x_part = window(offsets, flips, (height, width), self.augment.pad_mode)

        def view(rows: Tensor) -> Tensor:
            return self._gather(planes, places(y_part.index_select(0, rows), x_part.index_select(0, rows)))

        return view

    def _mixed(self, view: View, alpha: float) -> View:
        """Mix each image in ``view`` and its partner of this epoch, as a weighted sum."""
        partners, shares = draw_mix(alpha, len(self.targets), self.seed, self.view)
        return lambda rows: torch.lerp(view(partners[rows]), view(rows), shares[rows].view(-1, 1, 1, 1))

    def _gather(self, planes: Tensor, where: Tensor) -> Tensor:
        channels, height, width = self.images.shape[1:]
        count = len(where) // (height * width)
        out = torch.empty(count, channels, height * width)
        for channel in range(channels):
            pixels = planes[channel].index_select(0, where).view(count, -1)
            out[:, channel].copy_(pixels).mul_(self.scale[channel]).add_(self.shift[channel])
        return out.view(count, channels, height, width)


def affine(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) float32 that turn a byte into ``(byte / 255 - mean) / std``."""
    m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return (1 / (255 * s)).float(), (-m / s).float()


def normalise(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Turn (B, C, H, W) uint8 into float32, ``image * scale + shift`` a channel."""
    return images.float().mul_(scale.view(-1, 1, 1)).add_(shift.view(-1, 1, 1))
