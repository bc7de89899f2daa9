"""ICKD: Liu et al., Exploring Inter-Channel Correlation for Distillation, ICCV 2021, arXiv 2202.03680."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import POINTWISE, pointwise
from kd.losses.base import at_least_float32, check_choice, check_same_shape
from kd.losses.feature_term import FeatureTerm
from kd.losses.layouts import Tapped

__all__ = ["inter_channel_correlation"]

VARIANTS = ("code", "paper")


def inter_channel_correlation(student_feature: Tensor, teacher_feature: Tensor, variant: str = "code") -> Tensor:
    """Compute the squared distance of the channels' Gram matrices (C, C) of a sample, rows divided by their L2 norms.

    Both (B, C, H, W) of one width; the grids may differ.

    ``variant``: ``"code"``, Σ / (C · B²): the authors divide by the batch twice, so that a larger batch is a smaller
    loss; ``"paper"``, Eq. 5: Σ / C² of a sample, mean over the batch, without a normalisation of the rows.
    """
    check_choice("variant", variant, VARIANTS)
    check_same_shape("batch and width", student_feature[:, :, 0, 0], teacher_feature[:, :, 0, 0])
    maps = [at_least_float32(f).flatten(2) for f in (student_feature, teacher_feature)]
    grams = [m @ m.transpose(1, 2) for m in maps]
    batch, width = grams[0].shape[:2]
    if variant == "code":
        student, teacher = (F.normalize(gram, dim=2) for gram in grams)
        return (student - teacher).square().sum() / (width * batch**2)
    return (grams[0] - grams[1]).square().sum() / (width**2 * batch)


class InterChannelCorrelation(FeatureTerm):
    """:func:`inter_channel_correlation` summed over the taps.

    ``adapter``: see :func:`~kd.losses.adapters.pointwise`; the widths must be equal behind it.
    """

    over = "batch"  # the code divides by its size once more

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-1,),
        teacher_taps: Sequence[str | int] | None = (-1,),
        adapter: str = "auto",
        variant: str = "code",
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.adapter = check_choice("adapter", adapter, POINTWISE)
        self.variant = check_choice("variant", variant, VARIANTS)

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps on the teacher's grid, the student's of the teacher's width."""
        return pointwise(self.method, self.adapter, student, teacher)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of one pair."""
        return inter_channel_correlation(student, teacher, self.variant)
