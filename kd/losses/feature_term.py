"""The term that most methods on features are: pairs of taps brought to one layout, a distance of each, summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd.losses.base import Batch, Output, Setup, Term, at_least_float32
from kd.losses.layouts import Tapped

__all__ = ["ConsecutiveTerm", "FeatureTerm", "full_precision"]


def full_precision(tensor: Tensor) -> Any:
    """Switch autocast off on the device of a tensor until the block ends.

    Gram matrices and sums of squares overflow in half precision.
    """
    return torch.autocast(tensor.device.type, enabled=False)


class FeatureTerm(Term):
    """The sum over the pairs of taps of a distance of the adapted features; reads no logits.

    A subclass says in :meth:`sides` what the two tensors of a pair go through, and in :meth:`distance` what is
    computed of them, in float32 or better, also under autocast. Where an adapter has batch norm, ``over`` becomes
    ``batch``: its statistics are those of the whole batch.
    """

    needs_student_logits = False
    needs_teacher_logits = False
    over = "samples"

    def __init__(self, student_taps: Sequence[str | int] | None, teacher_taps: Sequence[str | int] | None) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = student_taps, teacher_taps
        self.adapters = nn.ModuleList()  # what the student's features go through
        self.goals = nn.ModuleList()  # what the teacher's go through

    @property
    def method(self) -> str:
        """The name of the method's file, for messages."""
        return type(self).__module__.rpartition(".")[2]

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return what student's and teacher's tensor of a pair go through. ``ValueError`` if not comparable."""
        return nn.Identity(), nn.Identity()

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of one pair, a scalar."""
        raise TypeError(f"{type(self).__name__} does not define distance(student, teacher)")

    def prepare(self, setup: Setup) -> None:
        """Build what the features of each pair go through, where and of the type that the student's feature is."""
        both = [self.sides(s, t) for s, t in self.tapped(setup)]
        features = self.pairs(setup.student, setup.teacher)
        self.adapters = nn.ModuleList(adapter.to(s) for (adapter, _), (s, _) in zip(both, features, strict=True))
        self.goals = nn.ModuleList(goal.to(s) for (_, goal), (s, _) in zip(both, features, strict=True))
        if any(isinstance(m, _BatchNorm) for m in self.modules()):
            self.over = "batch"

    def compared(self, student: Output, teacher: Output) -> list[tuple[Tensor, Tensor]]:
        """Return the adapted features of each pair, in float32 or better.

        ``ValueError`` before :meth:`prepare`, and in training for one sample where vectors go through batch norm.
        """
        pairs = self.pairs(student, teacher)
        if not self.adapters:
            raise ValueError("the adapters are missing: call prepare(setup) before the first batch")
        if self.training and len(pairs[0][0]) == 1 and self._normalises_vectors([s for s, _ in pairs]):
            raise ValueError(
                f"{self.method} needs two samples or more in a batch, for batch norm of vectors: set "
                "data.drop_last=true"
            )
        both = zip(self.adapters, self.goals, pairs, strict=True)
        return [(at_least_float32(adapter(s)), at_least_float32(goal(t))) for adapter, goal, (s, t) in both]

    def _normalises_vectors(self, features: Sequence[Tensor]) -> bool:
        norms = [m for m in self.modules() if isinstance(m, _BatchNorm)]
        of_one_place = any(f.ndim == 2 or f.shape[2:].numel() == 1 for f in features)
        return any(isinstance(norm, nn.BatchNorm1d) or of_one_place for norm in norms)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the pairs."""
        pairs = self.compared(student, teacher)
        with full_precision(pairs[0][0]):
            return torch.stack([self.distance(s, t) for s, t in pairs]).sum()


class ConsecutiveTerm(FeatureTerm):
    """A loss of the relations between consecutive layers."""

    def prepare(self, setup: Setup) -> None:
        """Build the adapters. ``ValueError`` for a single tap: it has no next one."""
        super().prepare(setup)
        if len(self.adapters) < 2:
            raise ValueError(f"{self.method} compares each layer with the next one: name two taps or more on each side")
