"""MGD: Yang et al., Masked Generative Distillation, ECCV 2022, arXiv 2205.01529."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd.losses.adapters import POINTWISE, pointwise
from kd.losses.base import at_least_float32, check_choice, check_same_shape
from kd.losses.feature_term import FeatureTerm
from kd.losses.layouts import Tapped

__all__ = ["generation_distance"]

MASKS = ("positions", "channels")


def generation_distance(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Compute the squared distance of generated and teacher's map, sum over a sample, mean over the batch (Eq. 5).

    Both (B, C, H, W). The code's α is the weight.
    """
    check_same_shape("features", student_feature, teacher_feature)
    squares = (at_least_float32(student_feature) - at_least_float32(teacher_feature)).square()
    return squares.flatten(1).sum(1).mean()


class Generation(nn.Module):
    """Sets a share of a map (B, C, H, W) to 0 and makes it anew: 3×3 convolution, ReLU, 3×3 convolution.

    ``mask``: ``"positions"``, in all channels alike, or whole ``"channels"``.
    """

    def __init__(self, width: int, masked: float, mask: str) -> None:
        super().__init__()
        self.masked, self.mask = masked, mask
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        self.layers = nn.Sequential(convs[0], nn.ReLU(), convs[1])

    def forward(self, feature: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the generated map; ``noise``: uniform numbers, of which those above 1 − ``masked`` are masked."""
        batch, width, *grid = feature.shape
        shape = (batch, 1, *grid) if self.mask == "positions" else (batch, width, 1, 1)
        noise = torch.rand(shape, device=feature.device) if noise is None else noise
        return self.layers(feature * (noise <= 1 - self.masked).to(feature))


class MaskedGeneration(FeatureTerm):
    """:func:`generation_distance` of maps that are generated of the student's masked ones, summed over the taps.

    ``masked``: the share that is set to 0, λ of the paper. ``mask``: ``positions`` as in the authors' code for
    detection, ``channels`` as in their code for classification. ``adapter``: :func:`~kd.losses.adapters.pointwise`.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-1,),
        teacher_taps: Sequence[str | int] | None = (-1,),
        masked: float = 0.65,
        mask: str = "positions",
        adapter: str = "auto",
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        if not 0 <= masked < 1:
            raise ValueError(f"masked = {masked} is not allowed: it must be from 0 to below 1")
        self.masked, self.mask = masked, check_choice("mask", mask, MASKS)
        self.adapter = check_choice("adapter", adapter, POINTWISE)

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps on the teacher's grid, the student's of its width, masked and generated."""
        adapter, goal = pointwise(self.method, self.adapter, student, teacher)
        return nn.Sequential(adapter, Generation(teacher.as_map().shape[1], self.masked, self.mask)), goal

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of one pair."""
        return generation_distance(student, teacher)
