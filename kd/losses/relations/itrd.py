"""ITRD: Miles et al., Information Theoretic Representation Distillation, BMVC 2022, arXiv 2112.00459."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import as_vectors, width_of
from kd.losses.base import at_least_float32, check_same_shape
from kd.losses.feature_term import FeatureTerm
from kd.losses.layouts import Tapped

__all__ = ["correlation_information", "mutual_information"]


def correlation_information(student_feature: Tensor, teacher_feature: Tensor, alpha: float = 1.01) -> Tensor:
    """Compute log₂ Σ_d |c_d − 1|^(2 ``alpha``), c_d the correlation over the batch; both (B, D) (Eq. 6).

    Both are standardised with the unbiased deviation and c is divided by B, in the code: c is (B − 1) / B at best.
    ``ValueError`` for a batch of one, which has no deviation.
    """
    check_same_shape("features", student_feature, teacher_feature)
    if len(student_feature) == 1:
        raise ValueError("itrd correlates over the samples of a batch, and there is one: set data.drop_last=true")
    student, teacher = (_standardised(at_least_float32(f)) for f in (student_feature, teacher_feature))
    correlation = (student * teacher).mean(0)
    total = (correlation - 1).square().pow(alpha).sum()
    return total.clamp(min=torch.finfo(total.dtype).tiny).log2()


def mutual_information(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Compare Rényi's entropies (order 2) of the student's Gram matrix and of its product with the teacher's (Eq. 9).

    Both (B, D), the widths may differ; G of L2-normalised rows. Σ (G_s / tr)² − Σ (G_st / tr)², G_st = G_s ∘ G_t.
    """
    grams = [(unit := F.normalize(at_least_float32(f), dim=1)) @ unit.T for f in (student_feature, teacher_feature)]
    both = grams[0] * grams[1]
    own, joint = (gram / gram.diagonal().sum() for gram in (grams[0], both))
    return own.square().sum() - joint.square().sum()


def _standardised(feature: Tensor) -> Tensor:
    """Standardise over the batch; a column that varies by rounding alone is 0, without a gradient of 10⁹."""
    deviation = feature.std(0)
    flat = deviation.detach() <= 1e-6 * feature.detach().abs().amax(0)
    return (feature - feature.mean(0)) / torch.where(flat, 1.0, deviation)


class InformationTheoretic(FeatureTerm):
    """Both parts, ``w_correlation`` · :func:`correlation_information` + ``w_mutual`` · :func:`mutual_information`.

    Of pooled features, the student's through a linear layer to the teacher's width, summed over the taps. ``alpha``:
    1.01 for networks of one family, 1.5 for others.
    """

    over = "batch"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = ("before_classifier",),
        teacher_taps: Sequence[str | int] | None = ("before_classifier",),
        alpha: float = 1.01,
        w_correlation: float = 2.0,
        w_mutual: float = 1.0,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        for name, value, least in (("alpha", alpha, 1), ("w_correlation", w_correlation, 0), ("w_mutual", w_mutual, 0)):
            if not least <= value < math.inf:
                raise ValueError(f"{name} = {value} is not allowed: it must be a finite number, {least} or more")
        self.alpha, self.w_correlation, self.w_mutual = alpha, w_correlation, w_mutual

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make pooled vectors, the student's of the teacher's width."""
        own, other = as_vectors(self.method, student, teacher)
        return nn.Sequential(own, nn.Linear(width_of(student), width_of(teacher))), other

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of one pair."""
        correlation = correlation_information(student, teacher, self.alpha)
        return self.w_correlation * correlation + self.w_mutual * mutual_information(student, teacher)
