"""DCD: Giakoumoglou and Stathaki, Discriminative and Consistent Distillation, 2024, arXiv 2407.11802."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import as_vectors, width_of
from kd.losses.base import Batch, Output, Setup, at_least_float32, check_same_shape
from kd.losses.feature_term import FeatureTerm, full_precision
from kd.losses.layouts import Tapped
from kd.losses.logits._divergences import check_factor, check_positive, kl

__all__ = ["discriminative_consistency"]


def discriminative_consistency(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    log_tau: Tensor | float,
    bias: Tensor | float = 0.0,
    alpha: float = 0.5,
    max_tau: float = 10.0,
) -> Tensor:
    """Contrast within a batch, −mean log softmax(Z)_ii, and ``alpha`` · mean KL(columns of Z ‖ rows of Z).

    Z = min(e^``log_tau``, ``max_tau``) · S Tᵀ + ``bias``; both embeddings (B, D) of unit rows. A student finds its own
    teacher among those of the batch, and teachers find students as students find teachers.
    """
    check_same_shape("embeddings", student_embedding, teacher_embedding)
    student, teacher = at_least_float32(student_embedding), at_least_float32(teacher_embedding)
    scale = torch.as_tensor(log_tau, dtype=student.dtype, device=student.device).exp().clamp(max=max_tau)
    scores = scale * student @ teacher.T + bias
    of_rows, of_columns = scores.log_softmax(1), scores.T.log_softmax(1)
    return -of_rows.diagonal().mean() + alpha * kl(of_columns, of_rows).mean()


class DiscriminativeConsistency(FeatureTerm):
    """:func:`discriminative_consistency` of pooled features, linearly embedded, summed over the taps.

    ``embedding``: width of the two embeddings. They, the scale (``log_tau`` at first) and the bias are trained.
    """

    over = "batch"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = ("before_classifier",),
        teacher_taps: Sequence[str | int] | None = ("before_classifier",),
        embedding: int = 128,
        log_tau: float = 1.0,
        alpha: float = 0.5,
        max_tau: float = 10.0,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        if embedding < 1:
            raise ValueError(f"embedding = {embedding} is not allowed: it must be 1 or more")
        self.embedding, self.alpha = embedding, check_factor("alpha", alpha)
        self.max_tau = check_positive("max_tau", max_tau)
        self.log_tau, self.bias = nn.Parameter(torch.tensor(float(log_tau))), nn.Parameter(torch.zeros(()))
        self.embeds = nn.ModuleList()

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make pooled vectors."""
        return as_vectors(self.method, student, teacher)

    def prepare(self, setup: Setup) -> None:
        """Build the embeddings, two for each pair of taps."""
        super().prepare(setup)
        features = self.pairs(setup.student, setup.teacher)
        self.embeds = nn.ModuleList(
            nn.ModuleList(nn.Linear(width_of(tap), self.embedding) for tap in taps).to(s)
            for taps, (s, _) in zip(self.tapped(setup), features, strict=True)
        )

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the taps."""
        values = []
        for embeds, pair in zip(self.embeds, self.compared(student, teacher), strict=True):
            assert isinstance(embeds, nn.ModuleList)
            own, other = (at_least_float32(embed(f)) for embed, f in zip(embeds, pair, strict=True))
            with full_precision(own):
                unit = F.normalize(own, dim=1), F.normalize(other, dim=1)
                values.append(discriminative_consistency(*unit, self.log_tau, self.bias, self.alpha, self.max_tau))
        return torch.stack(values).sum()
