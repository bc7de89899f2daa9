"""FT: Kim, Park, Kwak, Paraphrasing Complex Network by Factor Transfer, NeurIPS 2018, arXiv 1802.04977."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from kd.losses.adapters import as_maps, check_maps
from kd.losses.base import Batch, Output, Setup, at_least_float32, check_choice, check_same_shape
from kd.losses.feature_term import FeatureTerm, full_precision
from kd.losses.features.at import attention_map
from kd.losses.layouts import Tapped
from kd.losses.logits._divergences import check_factor, check_positive

__all__ = ["factor_transfer"]

VARIANTS = ("paper", "code")


def factor_transfer(student_feature: Tensor, teacher_feature: Tensor, variant: str = "paper") -> Tensor:
    """Compute the mean over all elements of |F_s / ‖F_s‖ − F_t / ‖F_t‖|, norms of a sample's whole factor (Eq. 3).

    Both factors (B, C, H, W) of one grid. The authors' code is the same.

    ``variant``: ``"paper"`` as above, of equal widths; ``"code"``, that of CRD's benchmark (CIFAR-100 tables): the
    factors' attention maps, means of squares over the channels, are compared instead.
    """
    check_choice("variant", variant, VARIANTS)
    if variant == "code":
        return (attention_map(student_feature) - attention_map(teacher_feature)).abs().mean()
    check_same_shape("factors", student_feature, teacher_feature)
    student, teacher = (_unit(at_least_float32(f).flatten(1)) for f in (student_feature, teacher_feature))
    return (student - teacher).abs().mean()


def _unit(flat: Tensor) -> Tensor:
    """Bring rows to length 1; one of zeros stays so, without a gradient that grows beyond all bounds."""
    norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return flat / norms.masked_fill(norms == 0, torch.inf)


def _layers(widths: Sequence[int]) -> nn.Sequential:
    """Build 3×3 convolutions with batch norm and leaky ReLU (0.1), from width to width."""
    found: list[nn.Module] = []
    for width, target in pairwise(widths):
        found += [nn.Conv2d(width, target, 3, padding=1), nn.BatchNorm2d(target), nn.LeakyReLU(0.1)]
    return nn.Sequential(*found)


class FactorTransfer(FeatureTerm):
    """:func:`factor_transfer` of what a paraphraser makes of the teacher's map and a translator of the student's.

    Two stages in one run. For the first ``epochs`` the term is the squared error of the paraphraser, an autoencoder
    that makes the teacher's map anew from a factor of ``rate`` times its channels; it is nothing to the student. Then
    the paraphraser stands still, and the term is the distance of the factors; ``epochs = 0``: from the beginning on,
    with a random paraphraser. The published runs train the paraphraser before the student begins.

    A schedule gives each stage its weight: ``{_target_: kd.distill.schedules.Step, milestones: [30], gamma: 200}``.
    """

    over = "batch"  # batch norm

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-1,),
        teacher_taps: Sequence[str | int] | None = (-1,),
        rate: float = 0.5,
        epochs: float = 30.0,
        variant: str = "paper",
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.rate, self.epochs = check_positive("rate", rate), check_factor("epochs", epochs)
        self.variant = check_choice("variant", variant, VARIANTS)
        self.first = 0.0  # share of the run that the first stage is
        self.encoders, self.decoders, self.translators = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps of one grid."""
        check_maps(self.method, student, teacher)
        return as_maps(self.method, student, teacher)

    def prepare(self, setup: Setup) -> None:
        """Build a paraphraser and a translator a pair of taps. ``ValueError`` where the length is not in epochs."""
        super().prepare(setup)
        if self.epochs and setup.epochs is None:
            raise ValueError(
                f"epochs = {self.epochs:g} is not allowed in a run whose length is in steps: set recipe.epochs, or "
                "loss.ft.epochs=0"
            )
        self.first = min(1.0, self.epochs / setup.epochs) if setup.epochs else 0.0
        for (own, other), (feature, _) in zip(
            self.tapped(setup), self.pairs(setup.student, setup.teacher), strict=True
        ):
            width, target = own.as_map().shape[1], other.as_map().shape[1]
            factor = max(1, round(self.rate * target))
            self.encoders.append(_layers([target, target, factor, factor]).to(feature))
            self.decoders.append(_layers([factor, factor, target, target]).to(feature))
            self.translators.append(_layers([width, width, factor, factor]).to(feature))

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Sum over the taps: the paraphraser's errors in the first stage, then the factors' distances."""
        values = []
        layers = zip(self.encoders, self.decoders, self.translators, strict=True)
        for (encoder, decoder, translator), (own, other) in zip(layers, self.compared(student, teacher), strict=True):
            if self.progress < self.first:
                made = decoder(encoder(other))
                with full_precision(own):
                    values.append((at_least_float32(made) - other).square().mean())
            else:
                with torch.no_grad():
                    goal = encoder.eval()(other)
                factor = translator(own)
                with full_precision(own):
                    values.append(factor_transfer(factor, goal, self.variant))
        return torch.stack(values).sum()
