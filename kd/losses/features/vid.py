"""VID: Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019, arXiv 1904.05835."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import as_maps, check_maps
from kd.losses.base import Batch, Output, Setup, at_least_float32, check_choice, check_same_shape
from kd.losses.feature_term import FeatureTerm, full_precision
from kd.losses.layouts import Tapped

__all__ = ["variational_information"]

VARIANTS = ("code", "paper")
INITIAL_VARIANCE = 5.0


def variational_information(
    student_mean: Tensor, teacher_feature: Tensor, log_scale: Tensor, eps: float = 1e-5, variant: str = "code"
) -> Tensor:
    """Compute the teacher map's negative log-likelihood under a Gaussian that the student predicts; both (B, C, H, W).

    ``student_mean``: the mean; ``log_scale`` (C,): the variance of a channel is log(1 + e^a) + ``eps`` (Eq. 6).

    ``variant``: ``"code"``, ½ [(μ − t)² / σ² + log σ²] in the mean over all elements, without the constant (CIFAR-100
    weight 1); ``"paper"``, Eq. 5: the sum over the elements of a sample with ½ log 2π each, mean over the batch.
    """
    check_choice("variant", variant, VARIANTS)
    check_same_shape("the mean and the teacher's feature", student_mean, teacher_feature)
    variance = (F.softplus(at_least_float32(log_scale)) + eps).view(1, -1, 1, 1)
    squares = (at_least_float32(student_mean) - at_least_float32(teacher_feature)).square()
    each = (squares / variance + variance.log()) / 2
    if variant == "code":
        return each.mean()
    return (each + math.log(2 * math.pi) / 2).flatten(1).sum(1).mean()


class VariationalInformation(FeatureTerm):
    """:func:`variational_information` summed over the taps; null is all stages.

    The mean is made of the student's map by three 1×1 convolutions with ReLU between; they and the variances are
    trained. The larger of two grids is pooled to the smaller one. The code of mdistiller never trains the variances.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = None,
        teacher_taps: Sequence[str | int] | None = None,
        variant: str = "code",
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.variant = check_choice("variant", variant, VARIANTS)
        self.log_scales = nn.ParameterList()

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps of one grid; the student's through the convolutions."""
        own, other = check_maps(self.method, student, teacher)
        pooled, goal = as_maps(self.method, student, teacher)
        widths = [own.shape[1], *[other.shape[1]] * 3]
        layers: list[nn.Module] = [pooled]
        for number, (width, target) in enumerate(pairwise(widths)):
            layers += [nn.ReLU()] if number else []
            layers.append(nn.Conv2d(width, target, 1, bias=False))
        return nn.Sequential(*layers), goal

    def prepare(self, setup: Setup) -> None:
        """Build the regressors, and a variance of 5 for each of the teacher's channels."""
        super().prepare(setup)
        start = math.log(math.expm1(INITIAL_VARIANCE - 1e-5))
        both = zip(self.goals, self.pairs(setup.student, setup.teacher), strict=True)
        self.log_scales = nn.ParameterList(
            torch.full((goal(t).shape[1],), start, dtype=at_least_float32(s).dtype, device=s.device)
            for goal, (s, t) in both
        )

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the taps."""
        pairs = self.compared(student, teacher)
        with full_precision(pairs[0][0]):
            both = zip(pairs, self.log_scales, strict=True)
            return torch.stack([variational_information(s, t, a, variant=self.variant) for (s, t), a in both]).sum()
