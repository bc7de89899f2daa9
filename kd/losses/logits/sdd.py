"""SDD: Wei, Luo and Luo, Scaled Decoupled Distillation, CVPR 2024, arXiv 2403.13512."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import UNLABELLED, Batch, Output, check_choice, check_temperature
from kd.losses.feature_term import full_precision
from kd.losses.features._class_maps import ClassMaps
from kd.losses.logits._divergences import check_factor, kl, log_probabilities
from kd.losses.logits._target import labels_of, mean_over_labelled
from kd.losses.logits.dkd import decoupled_kl_divergence
from kd.losses.logits.nkd import normalised_cross_entropy

__all__ = ["region_logits", "scaled_decoupled_loss"]

BASES = ("kd", "dkd", "nkd")


def region_logits(class_maps: Tensor, grids: Sequence[int] = (1, 2, 4)) -> Tensor:
    """Map class activation maps (B, classes, H, W) → logits of regions (B, classes, M), M = Σ grid².

    For each of ``grids`` the map is averaged in grid × grid cells. The first one is 1: region 0 is the whole image.
    """
    return torch.cat([F.adaptive_avg_pool2d(class_maps, grid).flatten(2) for grid in _check_grids(grids)], dim=2)


def scaled_decoupled_loss(
    student_regions: Tensor,
    teacher_regions: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Compute the mean over labelled samples and regions of w · ``loss``; w = 2 in complementary regions, 1 in others.

    A region is complementary where the teacher is right in it and wrong on the whole image, or the other way round.

    Both regions' logits (B, classes, M), the first region is the whole image; ``targets`` (B,) int64, ``UNLABELLED``
    where the label is withheld: such samples do not count. ``loss``: of student's and teacher's logits (rows, classes)
    and targets (rows,), a mean over the labelled rows. 0 without labelled samples. ``ValueError`` for targets that are
    shares of classes.
    """
    labels, labelled = labels_of(targets)
    student, teacher = (z.movedim(2, 1).flatten(0, 1) for z in (student_regions, teacher_regions))
    right = teacher_regions.argmax(1) == labels.unsqueeze(1)
    complementary = (right != right[:, :1]) & labelled.unsqueeze(1)
    of_regions = targets.unsqueeze(1).expand_as(complementary)
    again = torch.where(complementary, of_regions, UNLABELLED).flatten()
    share = complementary.to(student.dtype).sum() / (of_regions != UNLABELLED).sum().clamp(min=1)
    return loss(student, teacher, of_regions.flatten()) + share * loss(student, teacher, again)


class ScaledDecoupled(ClassMaps):
    """:func:`scaled_decoupled_loss` of the last maps; both networks have one linear layer behind pooling.

    ``base``: the loss of a region's logits, ``"kd"``, ``"dkd"`` or ``"nkd"``; ``alpha`` and ``beta`` are DKD's,
    ``gamma`` is NKD's. The student's classifier is trained by it as well.

    The authors' code of NKD leaves the label among the other classes; here it is taken out, as NKD's does.
    """

    needs_labels = True
    over = "labelled"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-1,),
        teacher_taps: Sequence[str | int] | None = (-1,),
        base: str = "dkd",
        grids: Sequence[int] = (1, 2, 4),
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        gamma: float = 1.5,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.base, self.grids = check_choice("base", base, BASES), _check_grids(grids)
        self.temperature = check_temperature(temperature)
        self.alpha, self.beta = check_factor("alpha", alpha), check_factor("beta", beta)
        self.gamma = check_factor("gamma", gamma)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the labelled samples and their regions."""
        maps = self.class_maps(student, teacher)
        with full_precision(maps[0]):
            of_student, of_teacher = (region_logits(found, self.grids) for found in maps)
            return scaled_decoupled_loss(of_student, of_teacher, batch.targets, self.of_region)

    def of_region(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the base loss, a mean over the labelled rows."""
        if self.base == "dkd":
            settings = self.temperature, self.alpha, self.beta
            return decoupled_kl_divergence(student_logits, teacher_logits, targets, *settings)
        if self.base == "nkd":
            return normalised_cross_entropy(student_logits, teacher_logits, targets, self.temperature, self.gamma)
        log_p_student, log_p_teacher = log_probabilities(student_logits, teacher_logits, self.temperature)
        return self.temperature**2 * mean_over_labelled(kl(log_p_teacher, log_p_student), targets != UNLABELLED)


def _check_grids(grids: Sequence[int]) -> tuple[int, ...]:
    found = tuple(grids)
    if not found or found[0] != 1 or any(grid < 1 for grid in found):
        raise ValueError(
            f"grids = {list(found)} is not allowed: the first one is 1, the whole image, the others 1 or more"
        )
    return found
