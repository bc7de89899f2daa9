"""CAT-KD: Guo, Yan, Li, Lin, Class Attention Transfer Based Knowledge Distillation, CVPR 2023, arXiv 2304.12777."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch, Output, at_least_float32, check_choice, unit_length
from kd.losses.feature_term import full_precision
from kd.losses.features._class_maps import ClassMaps

__all__ = ["class_attention_transfer"]

VARIANTS = ("code", "paper")


def class_attention_transfer(
    student_cam: Tensor, teacher_cam: Tensor, resolution: int = 2, normalize: bool = True, variant: str = "code"
) -> Tensor:
    """Compute the squared distance of class activation maps (B, classes, H, W), pooled to ``resolution`` cells a side.

    The grids may differ. ``normalize``: the pooled map of each class is divided by its L2 norm.

    ``variant``: ``"code"``, the mean over samples, classes and positions; ``"paper"``, Eq. 5: the sum over the
    positions, which is ``resolution``² times as large.
    """
    check_choice("variant", variant, VARIANTS)
    if student_cam.shape[:2] != teacher_cam.shape[:2]:
        shapes = f"the student's are {tuple(student_cam.shape)}, the teacher's {tuple(teacher_cam.shape)}"
        raise ValueError(f"class activation maps must be of the same samples and classes: {shapes}")
    pooled = [F.adaptive_avg_pool2d(at_least_float32(m), resolution).flatten(2) for m in (student_cam, teacher_cam)]
    student, teacher = (unit_length(m, 2) for m in pooled) if normalize else pooled
    squares = (student - teacher).square()
    return squares.mean() if variant == "code" else squares.sum(2).mean()


class ClassAttentionTransfer(ClassMaps):
    """:func:`class_attention_transfer` of the last maps; both networks have one linear layer behind pooling.

    The student's classifier is trained by it as well.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-1,),
        teacher_taps: Sequence[str | int] | None = (-1,),
        resolution: int = 2,
        normalize: bool = True,
        variant: str = "code",
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        if resolution < 1:
            raise ValueError(f"resolution = {resolution} is not allowed: it must be 1 or more")
        self.resolution, self.normalize = resolution, normalize
        self.variant = check_choice("variant", variant, VARIANTS)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the loss of the pair."""
        maps = self.class_maps(student, teacher)
        with full_precision(maps[0]):
            return class_attention_transfer(*maps, self.resolution, self.normalize, self.variant)
