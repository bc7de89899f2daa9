"""CRD: Tian, Krishnan, Isola, Contrastive Representation Distillation, ICLR 2020, arXiv 1910.10699."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.adapters import as_vectors, width_of
from kd.losses.base import Batch, Output, Setup, at_least_float32, check_choice, check_temperature
from kd.losses.feature_term import FeatureTerm, full_precision
from kd.losses.layouts import Tapped
from kd.losses.relations._rows import Rows

__all__ = ["contrastive_distillation", "log_normaliser", "noise_contrast"]

EPS = 1e-7  # beside the noise, as in the code
KINDS = ("other_classes", "other_samples")


def log_normaliser(scores: Tensor, size: int) -> Tensor:
    """Compute log Z, with Z = ``size`` · mean of e^scores; ``scores`` (B, 1 + K) = ⟨f, m⟩ / T. Without a gradient."""
    return (scores.detach().flatten().logsumexp(0) - math.log(scores.numel() / size)).detach()


def noise_contrast(
    anchors: Tensor, bank: Tensor, rows: Tensor, temperature: float = 0.07, log_z: Tensor | None = None
) -> Tensor:
    """Tell the positive from K negatives by noise-contrastive estimation (Eq. 14 to 18), mean over the anchors.

    ``anchors`` (B, D) and ``bank`` (n, D) of the other network; ``rows`` (B, 1 + K) int64, the positive first.
    −log [P⁺ / (P⁺ + K/n)] − Σ log [(K/n) / (P⁻ + K/n)], P = e^(⟨f, m⟩ / T) / Z. ``log_z``: see :func:`log_normaliser`;
    None: that of these scores.
    """
    size, negatives = len(bank), rows.shape[1] - 1
    scores = (at_least_float32(anchors) @ bank.T).gather(1, rows) / temperature
    log_p = scores - (log_normaliser(scores, size) if log_z is None else log_z)
    log_noise = math.log(negatives / size + EPS)
    positive = F.softplus(log_noise - log_p[:, 0])
    negative = F.softplus(log_p[:, 1:] - log_noise) + log_noise - math.log(negatives / size)
    return (positive + negative.sum(1)).mean()


def contrastive_distillation(
    student_embedding: Tensor,
    student_bank: Tensor,
    teacher_embedding: Tensor,
    teacher_bank: Tensor,
    rows: Tensor,
    temperature: float = 0.07,
    log_z: Tensor | None = None,
) -> Tensor:
    """Add :func:`noise_contrast` of the student beside the teacher's bank and of the teacher beside the student's.

    Embeddings (B, D) of unit length; banks (n, D). ``log_z`` (2,): of the student's and the teacher's scores.
    """
    of_student, of_teacher = (None, None) if log_z is None else (log_z[0], log_z[1])
    loss = noise_contrast(student_embedding, teacher_bank, rows, temperature, of_student)
    return loss + noise_contrast(teacher_embedding, student_bank, rows, temperature, of_teacher)


class Contrast(nn.Module):
    """The embeddings of both networks and the banks of one pair of taps.

    Z is that of the first batch of the training, and stays.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    log_z: Tensor

    def __init__(self, widths: tuple[int, int], embedding: int, size: int, temperature: float, momentum: float) -> None:
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        self._known = False  # whether Z is, without a look at the device
        self.student_embed, self.teacher_embed = (nn.Linear(width, embedding) for width in widths)
        bound = math.sqrt(3 / embedding)
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, torch.empty(size, embedding).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.full((2,), math.nan))

    def forward(self, student: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
        """Compute the loss of vectors (B, D_s) and (B, D_t); the banks learn from it in training."""
        own = F.normalize(at_least_float32(self.student_embed(student)), dim=1)
        other = F.normalize(at_least_float32(self.teacher_embed(teacher)), dim=1)
        with full_precision(own):
            log_z = self.log_z if self._known else self._first(own, other, rows)
            student_side, teacher_side = (own, self.student_bank), (other, self.teacher_bank)
            loss = contrastive_distillation(*student_side, *teacher_side, rows, self.temperature, log_z)
            if self.training:
                self.log_z, self._known = log_z, True
                self.student_bank = self._remembered(self.student_bank, own, rows[:, 0])
                self.teacher_bank = self._remembered(self.teacher_bank, other, rows[:, 0])
        return loss

    @torch.no_grad()
    def _first(self, own: Tensor, other: Tensor, rows: Tensor) -> Tensor:
        """Compute log Z of these scores; what a checkpoint has kept goes before."""
        sides = ((own, self.teacher_bank), (other, self.student_bank))
        scores = ((f @ bank.T).gather(1, rows) / self.temperature for f, bank in sides)
        found = torch.stack([log_normaliser(s, len(self.student_bank)) for s in scores]).to(self.log_z)
        return torch.where(self.log_z.isnan(), found, self.log_z)

    @torch.no_grad()
    def _remembered(self, bank: Tensor, embedding: Tensor, rows: Tensor) -> Tensor:
        """Make a new bank, for the gradient needs the old one."""
        mixed = self.momentum * bank[rows] + (1 - self.momentum) * embedding.to(bank)
        return bank.index_copy(0, rows, F.normalize(mixed, dim=1))


class ContrastiveDistillation(FeatureTerm):
    """:func:`contrastive_distillation` of pooled features, linearly embedded, summed over the taps.

    ``embedding``: width of the embeddings; ``negatives``: K; ``momentum``: of the banks, which have a row for each
    training sample. ``negatives_from``: ``other_classes``, as in the code (samples without a label: of all the others),
    or ``other_samples``. Drawn alike on all processes, which see the batch of all.
    """

    over = "batch"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = ("before_classifier",),
        teacher_taps: Sequence[str | int] | None = ("before_classifier",),
        embedding: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        negatives_from: str = "other_classes",
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        for name, value in (("embedding", embedding), ("negatives", negatives)):
            if value < 1:
                raise ValueError(f"{name} = {value} is not allowed: it must be 1 or more")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum = {momentum} is not allowed: it must be from 0 to below 1")
        self.embedding, self.negatives, self.momentum = embedding, negatives, momentum
        self.temperature = check_temperature(temperature)
        self.negatives_from = check_choice("negatives_from", negatives_from, KINDS)
        self.contrasts = nn.ModuleList()
        self.rows: Rows | None = None

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make pooled vectors."""
        return as_vectors(self.method, student, teacher)

    def prepare(self, setup: Setup) -> None:
        """Build embeddings and banks. ``ValueError`` without an index, or with more negatives than other samples."""
        super().prepare(setup)
        targets = setup.train_targets if self.negatives_from == "other_classes" else None
        features = self.pairs(setup.student, setup.teacher)
        self.rows = Rows(self.method, setup, targets).to(features[0][0].device)
        if self.negatives > self.rows.others:
            raise ValueError(
                f"negatives = {self.negatives} is not allowed: {self.method} draws them from {self.negatives_from}, of "
                f"which the training set has {self.rows.others} beside a sample, so it must be at most "
                f"{self.rows.others}"
            )
        settings = self.embedding, len(self.rows), self.temperature, self.momentum
        made = (Contrast((width_of(s), width_of(t)), *settings) for s, t in self.tapped(setup))
        self.contrasts = nn.ModuleList(contrast.to(s) for contrast, (s, _) in zip(made, features, strict=True))

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the taps."""
        pairs = self.compared(student, teacher)
        assert self.rows is not None
        rows = self.rows.drawn(batch.index, self.negatives, self.progress)
        return torch.stack([contrast(s, t, rows) for contrast, (s, t) in zip(self.contrasts, pairs, strict=True)]).sum()
