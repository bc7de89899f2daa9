"""OFD: Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019, arXiv 1904.01866."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd.losses.adapters import pointwise
from kd.losses.base import Batch, Output, Setup, at_least_float32, check_same_shape
from kd.losses.feature_term import FeatureTerm, full_precision
from kd.losses.layouts import Tapped
from kd.losses.networks import batch_norm_before

__all__ = ["negative_mean", "overhaul_distance"]

RARE = 0.001  # below this probability of a negative response the margin is three standard deviations below 0


def negative_mean(bn_weight: Tensor, bn_bias: Tensor) -> Tensor:
    """Compute a channel's margin: E[x | x < 0] of a Gaussian with mean ``bn_bias``, deviation |``bn_weight``| (Eq. 3).

    Both (C,), the parameters of a batch norm; where less than 1 in 1000 is negative, −3 deviations.
    """
    mean, deviation = at_least_float32(bn_bias).detach(), at_least_float32(bn_weight).detach().abs()
    normal = torch.distributions.Normal(0.0, 1.0)
    ratio = mean / deviation
    share = normal.cdf(-ratio)
    found = mean - deviation * normal.log_prob(ratio).exp() / share
    return torch.where(share > RARE, found, -3 * deviation)


def overhaul_distance(
    student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], margins: Sequence[Tensor]
) -> Tensor:
    """Compute the partial L2 distance to the teacher's margin ReLU, summed over the layers (Eq. 4 and 5).

    Maps (B, C, H, W) before the activation, of equal shapes; ``margins``: (C,) each. max(t, m) is the target; where it
    is not positive a student below it loses nothing. Of a layer the sum over its elements, mean over the samples; the
    last layer counts 1, each one before it half as much. The code's divisors, 1000 and on ImageNet 10⁵, are the weight.
    """
    total = []
    layers = zip(student_features, teacher_features, margins, strict=True)
    for depth, (student, teacher, margin) in enumerate(layers):
        check_same_shape("features", student, teacher)
        target = torch.maximum(at_least_float32(teacher), margin.view(1, -1, 1, 1).to(teacher))
        difference = at_least_float32(student) - target
        counted = difference.square() * ((difference > 0) | (target > 0))
        total.append(2.0 ** (depth - len(student_features) + 1) * counted.flatten(1).sum(1).mean())
    return torch.stack(total).sum()


class OverhaulDistillation(FeatureTerm):
    """:func:`overhaul_distance` of what enters the activation at the end of each stage, the student's adapted.

    The adapter is a 1×1 convolution with batch norm; the margins are those of the teacher's batch norm before each tap.
    The teacher is in eval mode, as everywhere here; the official loop has it in train mode.
    """

    over = "batch"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = ("all:preactivation",),
        teacher_taps: Sequence[str | int] | None = ("all:preactivation",),
    ) -> None:
        super().__init__(student_taps, teacher_taps)

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps on the teacher's grid, the student's through the adapter."""
        return pointwise(self.method, "auto", student, teacher, norm=True)

    def prepare(self, setup: Setup) -> None:
        """Build the adapters and find the margins. ``ValueError`` where no batch norm stands before a teacher's tap."""
        super().prepare(setup)
        if "teacher" not in setup.networks:
            raise ValueError(f"{self.method} reads the teacher's batch norms: there must be one teacher network")
        for number, (_, tap) in enumerate(self.tapped(setup)):
            width = tap.as_map().shape[1]
            norm = batch_norm_before(setup.networks["teacher"], tap.name, width)
            if norm is None or norm.weight is None:
                raise ValueError(
                    f"{self.method} needs the batch norm before {tap}, for its margin, and there is none with {width} "
                    "channels: tap a batch norm, as layer2.0.bn1 of a pre-activation network"
                )
            self.register_buffer(f"margin_{number}", negative_mean(norm.weight, norm.bias))

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the layers."""
        pairs = self.compared(student, teacher)
        margins = [self.get_buffer(f"margin_{number}") for number in range(len(pairs))]
        with full_precision(pairs[0][0]):
            return overhaul_distance([s for s, _ in pairs], [t for _, t in pairs], margins)
