"""Sentence embeddings: a sentence is a row, its embedding the answer; no labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, PearsonCorrCoef

from kd.errors import KdError
from kd.losses.base import Batch, Output, Term
from kd.losses.layouts import mean_of_positions
from kd.tasks.base import Meter, Task, Want
from kd.tasks.metrics import Metric


class Embedding(Task):
    """Feature distillation of sentence encoders; the embedding (rows, width) stands in the place of the logits.

    Metrics, all beside the teacher: ``similarity``, Pearson's correlation between student's and teacher's cosines of
    pairs of sentences (those of a batch), whatever the two widths; and ``cosine``, between the two embeddings of one
    sentence, where the widths are equal.
    """

    architecture = "embedding"
    metrics = (
        Metric("similarity", "similarity", beside_teacher=True),
        Metric("cosine", "cosine", beside_teacher=True),
    )
    needs_logits = False
    distribution = False

    def answer(self, network: nn.Module, inputs: Any, batch: Batch, want: Want) -> Output:
        """Call a network that answers (rows, width), or hidden states (rows, positions, width): their mean."""
        raw = network(**inputs) if isinstance(inputs, Mapping) else network(inputs)
        hidden = raw if isinstance(raw, Tensor) else getattr(raw, "last_hidden_state", None)
        return Output(mean_of_positions(hidden, batch.mask) if hidden is not None and hidden.ndim == 3 else hidden)

    def check_terms(self, terms: Iterable[tuple[str, Term]]) -> None:
        """Refuse losses, by name, that read labels, or coordinates as if they were classes."""
        for name, term in terms:
            classes = (term.needs_student_logits or term.needs_teacher_logits) and not term.regression
            if classes or term.needs_labels:
                raise KdError(
                    f"loss.{name} is for classes, and task = embedding has none: use loss=[mse] with "
                    "loss.mse.against=teacher, or a loss of hidden states or of relations (cosine, hidden_mse, rkd)"
                )

    def agree(self, student: Output, teacher: Output, classes: int | None, compared: bool) -> None:
        """Take any two widths: what compares them has an adapter."""

    def comparable(self, student: Output, teacher: Output) -> bool:
        """Tell whether both answer with an embedding."""
        return student.has_logits and teacher.has_logits

    def labelled(self, batch: Batch) -> Tensor:
        """Count none: no row has a label."""
        return torch.zeros((), dtype=torch.int64, device=batch.device)

    def meter(self, classes: int | None) -> EmbeddingMeter:
        """Make a fresh meter for one pass."""
        return EmbeddingMeter()


class EmbeddingMeter(Meter):
    """Agreement of two embeddings over a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.similarity, self.cosine, self.same_width = PearsonCorrCoef(), MeanMetric(nan_strategy="disable"), True

    def update(self, student: Output, batch: Batch, teacher: Output | None = None) -> None:
        """Add the pairs of one batch."""
        if teacher is None:
            return
        own, other = F.normalize(student.logits.float(), dim=-1), F.normalize(teacher.logits.float(), dim=-1)
        if len(own) > 1:
            one, two = torch.triu_indices(len(own), len(own), offset=1, device=own.device)
            self.similarity.update((own @ own.T)[one, two], (other @ other.T)[one, two])
        self.same_width = own.shape == other.shape
        if self.same_width:
            self.cosine.update((own * other).sum(-1))

    def compute(self, with_teacher: bool) -> dict[str, float]:
        """``similarity`` and, of equal widths, ``cosine``, −1 to 1; nothing of a network alone."""
        if not with_teacher:
            return {}
        found = {"similarity": float(self.similarity.compute())}
        return {**found, "cosine": float(self.cosine.compute())} if self.same_width else found
