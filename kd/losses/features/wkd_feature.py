"""WKD-F: Lv, Yang, Li, Wasserstein Distance Rivals Kullback-Leibler Divergence, NeurIPS 2024, arXiv 2412.08139."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from kd.losses.adapters import KINDS, match
from kd.losses.base import at_least_float32, check_choice, check_same_shape
from kd.losses.feature_term import FeatureTerm
from kd.losses.layouts import Tapped, cannot_compare

__all__ = ["gaussian_wasserstein"]


def gaussian_wasserstein(
    student_feature: Tensor, teacher_feature: Tensor, grid: int = 1, mean_cov_ratio: float = 2.0, eps: float = 1e-5
) -> Tensor:
    """Compute ``mean_cov_ratio`` · ‖μ_s − μ_t‖² + ‖σ_s − σ_t‖² of the positions of a cell, per channel (Eq. 9).

    Both (B, C, H, W); mean over samples and ``grid`` × ``grid`` cells, sum over the channels. σ² is the unbiased
    variance and ``eps``. ``ValueError`` where the cells do not divide the map, or have one position.
    """
    check_same_shape("features", student_feature, teacher_feature)
    height, width = student_feature.shape[2:]
    if height % grid or width % grid or height * width <= grid**2:
        raise ValueError(
            f"grid = {grid} is not allowed for maps of {height} × {width}: it must divide both sides, with two "
            "positions or more in a cell"
        )
    (mean_s, std_s), (mean_t, std_t) = (
        _moments(at_least_float32(f), grid, eps) for f in (student_feature, teacher_feature)
    )
    squares = mean_cov_ratio * (mean_s - mean_t).square() + (std_s - std_t).square()
    return squares.sum(1).mean()


def _moments(feature: Tensor, grid: int, eps: float) -> tuple[Tensor, Tensor]:
    """Compute mean and deviation (B, C, cells) of each cell."""
    height, width = (side // grid for side in feature.shape[2:])
    cells = feature.unfold(2, height, height).unfold(3, width, width).flatten(4).flatten(2, 3)
    return cells.mean(3), (cells.var(3) + eps).sqrt()


class GaussianWasserstein(FeatureTerm):
    """:func:`gaussian_wasserstein` of the adapted student's and the teacher's maps, summed over the taps.

    ``adapter``: see :func:`~kd.losses.adapters.match`.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-1,),
        teacher_taps: Sequence[str | int] | None = (-1,),
        grid: int = 1,
        mean_cov_ratio: float = 2.0,
        eps: float = 1e-5,
        adapter: str = "auto",
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        if grid < 1:
            raise ValueError(f"grid = {grid} is not allowed: it must be 1 or more")
        if not 0 <= mean_cov_ratio < math.inf:
            raise ValueError(f"mean_cov_ratio = {mean_cov_ratio} is not allowed: it must be a finite number, 0 or more")
        if not eps > 0:
            raise ValueError(f"eps = {eps} is not allowed: it must be above 0")
        self.grid, self.mean_cov_ratio, self.eps = grid, mean_cov_ratio, eps
        self.adapter = check_choice("adapter", adapter, KINDS)

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps of the teacher's shape."""
        if teacher.layout.kind != "NCHW":
            raise cannot_compare(self.method, student, teacher, "tap maps (B, C, H, W) of the teacher")
        return match(self.method, self.adapter, student, teacher)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of one pair."""
        return gaussian_wasserstein(student, teacher, self.grid, self.mean_cov_ratio, self.eps)
