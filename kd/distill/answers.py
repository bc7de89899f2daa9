"""Where the teacher's output comes from: live networks, a cache, a file, a server. One interface for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kd.errors import KdError
from kd.losses.base import Batch, Output
from kd.losses.layouts import Layout
from kd.tasks.base import Want


class Answers(nn.Module, ABC):
    """The teacher as the distiller sees it; a subclass defines :meth:`answer`.

    It is never trained by the recipe's optimiser, and not kept in checkpoints while it is frozen.

    ``live``: whether :meth:`answer` also knows samples outside the training set; only then is the teacher measured on
    validation and test, and the student's agreement with it, unless ``evaluated`` is False. ``cache``: whether it keeps
    what it answered for the training set, so that it must see the same input in every epoch; ``cached_by``: the setting
    that does it. ``whole_samples``: whether it knows all rows of a sample or none, and not some of them.
    ``sources``: of each run directory that its weights come from, :func:`kd.records.weight_files.source_of`.
    ``networks``: the live networks, if there are any.
    """

    live = False
    evaluated = True
    cache = False
    cached_by = "teacher.answers"
    whole_samples = False

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[dict[str, Any]] = []
        self.networks = nn.ModuleList()

    @abstractmethod
    def answer(self, batch: Batch, want: Want) -> Output:
        """Answer a batch that has been through ``task.rows``, without a graph unless ``want`` asks for one."""

    def measured(self, batch: Batch) -> Output:
        """Answer a batch of validation or test: where :attr:`live`."""
        return self.answer(batch, Want())

    def begin(self, batches: Iterable[Batch], device: torch.device) -> None:
        """Get ready before the first epoch; ``batches``: the training set once, in order, not yet on the device."""

    @property
    def root(self) -> nn.Module | None:
        """The module that tap names start from; None where no intermediate tensor can be had."""
        return None

    def tap(self, names: Sequence[str]) -> None:
        """Record these tensors in every answer from now on. ``KdError`` where none can be had."""
        if names:
            raise KdError(f"teacher tap {names[0]} does not exist: {type(self).__name__} keeps no intermediate tensors")

    def optimize(self, batch: Batch, channels_last: bool) -> None:
        """Get faster without answering otherwise, as this batch shows; images ``channels_last`` or as they come."""

    def use_given(self) -> None:
        """Undo :meth:`optimize`."""

    def inspect_taps(self) -> bool:
        """After a dry pass: whether it must be repeated (:meth:`kd.distill.taps.Taps.inspect`)."""
        return False

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """After a dry pass: the layouts of the recorded tensors, by tap."""
        return {}
