"""Hidden-state regression: Jiao et al., TinyBERT, Findings of EMNLP 2020, arXiv 1909.10351."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch, Output, Setup, check_choice, check_same_shape
from kd.losses.hidden._layers import ProjectedTerm, check_hidden, masked_mean, over_positions, real_positions

__all__ = ["hidden_mse"]

VARIANTS = ("masked", "tinybert", "distilbart")


def hidden_mse(
    student_hidden: Tensor, teacher_hidden: Tensor, mask: Tensor | None = None, variant: str = "masked"
) -> Tensor:
    """Compute (h_s − h_t)², mean over positions and width: Eq. 8, Eq. 9 at the embeddings; student projected already.

    Both hidden states (B, L, D) of one width; ``mask`` (B, L), True or 1 where a position is real, None: all are.
    0, with zero gradient, where no position is real.

    ``variant``: ``"masked"``, the mean over the real positions (TextBrewer, DistillKit, DistilBART); ``"tinybert"``,
    its authors' code: padding counts as well; ``"distilbart"``, the normalised option of Shleifer and Rush (arXiv
    2010.13002): each tensor has mean 0 and variance 1 over the whole batch, padding included, then the mean over the
    real positions.
    """
    check_choice("variant", variant, VARIANTS)
    student_hidden = check_hidden("student_hidden", student_hidden)
    teacher_hidden = check_hidden("teacher_hidden", teacher_hidden)
    check_same_shape("hidden states", student_hidden, teacher_hidden)
    if variant == "distilbart":
        student_hidden, teacher_hidden = (F.layer_norm(h, h.shape) for h in (student_hidden, teacher_hidden))
    kept = real_positions(None if variant == "tinybert" else mask, student_hidden)
    return masked_mean((student_hidden - teacher_hidden).square().mean(-1), kept)


class HiddenMSE(ProjectedTerm):
    """:func:`hidden_mse` with ``batch.mask``, summed over the pairs of layers.

    Taps null are all layers and the embeddings, so that Eq. 9 is among them; taps [0] are the embeddings alone.
    ``mapping``: ``uniform`` is TinyBERT's layer i with k·i. DistilBART sums over the layers as well; DistillKit takes
    the mean, which is this sum with weight / layers. ``adapter``: ``auto`` is a linear layer where the widths differ,
    TinyBERT's is ``linear`` in any case; ``shared``: one for all layers, as in its code, where the paper has one for
    the embeddings and one for the layers.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = None,
        teacher_taps: Sequence[str | int] | None = None,
        mapping: str = "uniform",
        adapter: str = "linear",
        shared: bool = True,
        variant: str = "masked",
    ) -> None:
        super().__init__(student_taps, teacher_taps, mapping, adapter)
        self.shared = shared
        self.variant = check_choice("variant", variant, VARIANTS)

    def prepare(self, setup: Setup) -> None:
        """Pair the layers and build the projections."""
        super().prepare(setup)
        self.over = over_positions(setup.batch) if self.variant == "masked" else "samples"
        self.over = "batch" if self.variant == "distilbart" else self.over

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the pairs of layers."""
        pairs = self.projected(student, teacher)
        return torch.stack([hidden_mse(s, t, batch.mask, self.variant) for s, t in pairs]).sum()
