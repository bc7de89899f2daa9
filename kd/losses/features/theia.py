"""Theia: Shang et al., Theia: Distilling Diverse Vision Foundation Models, CoRL 2024, arXiv 2407.20179."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import Convert, check_maps
from kd.losses.base import Batch, Output, at_least_float32, check_same_shape, unit_length
from kd.losses.feature_term import FeatureTerm, full_precision
from kd.losses.layouts import Tapped
from kd.losses.logits._divergences import check_factor

__all__ = ["translated_distance"]


def translated_distance(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    w_cosine: float = 0.9,
    w_smooth: float = 0.1,
) -> Tensor:
    """Compute ``w_cosine`` · (1 − cosine) + ``w_smooth`` · smooth L1, mean over the teachers.

    Features (B, …) of one shape for each teacher, the student's translated. The cosine is that of a sample's whole
    feature, flattened, and not of each token; both parts are means, over the samples and over all elements.
    """
    values = []
    for student, teacher in zip(student_features, teacher_features, strict=True):
        check_same_shape("features", student, teacher)
        own, other = (at_least_float32(f).flatten(1) for f in (student, teacher))
        cosine = (unit_length(own) * unit_length(other)).sum(1)
        values.append(w_cosine * (1 - cosine).mean() + w_smooth * F.smooth_l1_loss(own, other))
    return torch.stack(values).mean()


class Translator(nn.Sequential):
    """Makes maps of a teacher's width: two 3×3 convolutions with ReLU, a layer norm before each layer, then a 1×1."""

    def __init__(self, width: int, target: int) -> None:
        layers: list[nn.Module] = [nn.GroupNorm(1, width)]  # of one group it is a layer norm over the whole map
        for _ in range(2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.GroupNorm(1, width)]
        super().__init__(*layers, nn.Conv2d(width, target, 1))


class FeatureTranslation(FeatureTerm):
    """:func:`translated_distance` of maps or tokens of one or several foundation models; needs no labels and no heads.

    Each pair of taps is one teacher, with a translator of its own. Several teachers count from 0, and the student's tap
    is named once for each: ``student_taps=[-1,-1] teacher_taps=[0.blocks.11,1.blocks.23]``. The student's grid is
    resampled to the teacher's before the translator, where the authors' stride their convolutions.

    ``normalize``: the teacher's channels by their mean and deviation in the batch, so that teachers of any scale count
    alike; the authors have stored those of ImageNet.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-1,),
        teacher_taps: Sequence[str | int] | None = (-1,),
        w_cosine: float = 0.9,
        w_smooth: float = 0.1,
        normalize: bool = True,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.w_cosine, self.w_smooth = check_factor("w_cosine", w_cosine), check_factor("w_smooth", w_smooth)
        self.normalize = normalize

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps on the teacher's grid, the student's translated."""
        own, other = check_maps(self.method, student, teacher)
        norm = nn.BatchNorm2d(other.shape[1], affine=False) if self.normalize else nn.Identity()
        translator = Translator(own.shape[1], other.shape[1])
        return (
            nn.Sequential(Convert(student.layout, "NCHW", other.grid), translator),
            nn.Sequential(Convert(teacher.layout, "NCHW"), norm),
        )

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the pairs."""
        pairs = self.compared(student, teacher)
        with full_precision(pairs[0][0]):
            return translated_distance([s for s, _ in pairs], [t for _, t in pairs], self.w_cosine, self.w_smooth)
