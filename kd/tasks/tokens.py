"""Language modelling: a row is a supervised position, its token the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, SumMetric

from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch, Output, check_choice
from kd.tasks.base import Meter, Task, Want
from kd.tasks.metrics import Metric
from kd.tasks.output_projection import hidden_rows
from kd.tasks.two_tokenizers import side_by_side

ROWS = ("supervised", "real")
FEW = 16  # supervised positions of a sample in a dry pass


class Tokens(Task):
    """A network answers (samples, positions, vocabulary); the rows are positions, selected before the projection.

    Batches have ``inputs`` with ``input_ids`` and ``attention_mask`` (samples, positions), and ``targets`` of the same
    shape: the token of each position, negative where it is not supervised (padding, a prompt, what is not masked out).

    ``rows``: ``"supervised"`` positions, or all ``"real"`` ones, that are not padding: those without a target have no
    label, and count in the terms that read none (DistilBERT's soft targets beside its masked tokens).

    Metrics: loss a token (nats), its exponential (perplexity), bits a byte where the data says how many bytes a token
    stands for (``extra["bytes"]``, samples × positions), which compares networks of different tokenizers, accuracy; and
    beside a teacher agreement and KL to it, over all rows.
    """

    row = "token"
    unit = "tokens"
    shift = False  # whether the target of a position is the token of the next one
    metrics = (
        Metric("nll", "loss a token", better="min", digits=4),
        Metric("perplexity", "perplexity", better="min", digits=2),
        Metric("bpb", "bits a byte", better="min", digits=4),
        Metric("acc1", "accuracy", share=True, counted=True, hub="accuracy"),
        Metric("agreement", "agreement", share=True, beside_teacher=True),
        Metric("kl", "KL to the teacher", better="min", beside_teacher=True),
    )
    summary = ("nll", "perplexity", "bpb", "acc1", "agreement")
    across_tokenizers = "bpb"
    outputs = "vocabulary of {:,}"

    def __init__(self, rows: str = "supervised") -> None:
        self.chosen = check_choice("rows", rows, ROWS)

    def rows(self, batch: Batch) -> Batch:
        """Shift and select: one target a row. ``extra["positions"]``: their places in samples · positions.

        ``KdError`` when there is no row at all.
        """
        if batch.targets is None:  # inputs alone, to count operations: every position
            return batch
        if "positions" in batch.extra:
            return batch
        real = _real(batch)
        if batch.targets.shape != real.shape:
            raise KdError(
                "this task predicts tokens, and the data has one target a text: choose data=lm, or "
                "task=text_classification"
            )
        targets, predicting = torch.where(real, batch.targets, UNLABELLED), real
        if self.shift:
            targets = F.pad(targets[:, 1:], (0, 1), value=UNLABELLED)
            predicting = F.pad(real[:, 1:], (0, 1), value=False) & real
        kept = predicting & (targets >= 0) if self.chosen == "supervised" else predicting
        positions = kept.flatten().nonzero().squeeze(1)
        if not len(positions):
            raise KdError("a batch has no supervised position: every row of the data needs one, behind its prompt")
        extra = {**batch.extra, "positions": positions}
        if (bytes_of := batch.extra.get("bytes")) is not None:
            own = F.pad(bytes_of[:, 1:], (0, 1)) if self.shift else bytes_of
            extra["row_bytes"] = own.flatten()[positions]
        targets = targets.flatten()[positions].clamp(min=UNLABELLED)
        made = Batch(batch.inputs, targets, batch.index, real, batch.views, extra)
        if batch.of_teacher is not batch:
            made = self._beside(made)
        return made

    def few(self, batch: Batch) -> Batch:
        """Take two samples, of each the first supervised positions: logits of all would be the run's peak of memory."""
        few = batch.few(2)
        if few.targets is None or few.targets.ndim != 2 or few.of_teacher is not few:
            return few
        kept = (few.targets >= 0).cumsum(1) <= FEW
        return replace(few, targets=torch.where(kept, few.targets, UNLABELLED))

    def _beside(self, batch: Batch) -> Batch:
        """Select the rows of a teacher with another tokenizer as well, and say which belong together."""
        if self.chosen != "supervised":
            raise KdError(f"task.rows = {self.chosen} is not allowed with two tokenizers: it must be supervised")
        teacher = self.rows(batch.of_teacher)
        extra = {**batch.extra, **side_by_side(batch, teacher, self.shift)}
        return replace(batch, views={**batch.views, "teacher": teacher}, extra=extra)

    def answer(self, network: nn.Module, inputs: Any, batch: Batch, want: Want) -> Output:
        """Call a network; of transformers' language models only the rows go through the output projection."""
        positions = batch.extra.get("positions")
        found = hidden_rows(network, inputs, positions) if want.logits and isinstance(inputs, Mapping) else None
        if found is not None:
            return Output(hidden=found[0], head=found[1])
        raw = network(**inputs) if isinstance(inputs, Mapping) else network(inputs)
        logits = self.logits(raw)
        if logits is None:
            return Output(raw=raw)
        flat = logits.flatten(0, -2)
        return Output(flat if positions is None else flat.index_select(0, positions))

    def agree(self, student: Output, teacher: Output, classes: int | None, compared: bool) -> None:
        """Refuse vocabularies that are too small for the data, or differ. Padded ones may be larger than the data's."""
        sides = {"student": student, "teacher": teacher} if compared else {"student": student}
        found = {side: output.logits.shape[-1] for side, output in sides.items() if output.has_logits}
        for side, number in found.items():
            if classes is not None and number < classes:
                raise KdError(f"the {side} has a vocabulary of {number} tokens, the data's tokenizer {classes}")
        if len(set(found.values())) > 1:
            raise KdError(
                f"the student has a vocabulary of {found['student']} tokens, the teacher of {found['teacher']}, and "
                "what compares them needs one size: data.vocabulary=tokenizer cuts both where they have one tokenizer "
                "and are padded to other sizes (kept answers are made anew); with two it is data.teacher_tokenizer and "
                "loss=[ce,uld] or loss=[ce,gold]"
            )

    def meter(self, classes: int | None) -> TokenMeter:
        """Make a fresh meter for one pass."""
        return TokenMeter(self.names)

    def doubt(self, measured: Mapping[str, float], recorded: Mapping[str, float], classes: int | None) -> str:
        """Say what is wrong with a teacher that knows less than a uniform guess, or less than in its own run."""
        found, before = measured["nll"], recorded.get("nll")
        if classes and found > math.log(classes):
            return f"has a loss of {found:.2f} a token, a uniform guess {math.log(classes):.2f}: is it trained?"
        if before is not None and found > 1.05 * before + 0.05:
            return (
                f"has a loss of {found:.2f} a token, {before:.2f} in its own run: is the tokenizer the one that it was "
                "trained with?"
            )
        return ""


class MaskedLM(Tokens):
    """Masked language modelling (BERT): the target of a position is the token that was masked out there."""

    architecture = "masked_lm"


class CausalLM(Tokens):
    """Causal language modelling: the target of a position is the token of the next one; shifted here, once."""

    architecture = "causal_lm"
    shift = True


class TokenMeter(Meter):
    """The metrics of one pass over the rows, in float32."""

    def __init__(self, names: Callable[[bool], list[str]]) -> None:
        super().__init__()
        self.names = names
        self.nll, self.acc1, self.agreement, self.kl = (MeanMetric(nan_strategy="disable") for _ in range(4))
        self.counted, self.bytes = SumMetric(nan_strategy="disable"), SumMetric(nan_strategy="disable")
        self.says_bytes = False

    def update(self, student: Output, batch: Batch, teacher: Output | None = None) -> None:
        """Add one batch; rows without a label count beside the teacher only."""
        logits, targets = student.logits.float(), batch.targets
        labelled = targets >= 0
        own, wanted = (logits, targets) if bool(labelled.all()) else (logits[labelled], targets[labelled])
        losses = F.cross_entropy(own, wanted, reduction="none")
        self.nll.update(losses)
        self.acc1.update((own.argmax(1) == wanted).float())
        if (sizes := batch.extra.get("row_bytes")) is not None:
            self.says_bytes = True
            self.counted.update(losses.sum())
            self.bytes.update(sizes[labelled].sum())
        if teacher is not None:
            other = teacher.logits.float()
            self.agreement.update((logits.argmax(1) == other.argmax(1)).float())
            log_s, log_t = F.log_softmax(logits, 1), F.log_softmax(other, 1)
            self.kl.update(F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1))

    def compute(self, with_teacher: bool) -> dict[str, float]:
        """Compute the metrics by name; no bits a byte where the data says nothing of bytes."""
        nll = float(self.nll.compute())
        found = {"nll": nll, "perplexity": math.exp(min(nll, 700.0)), "acc1": float(self.acc1.compute())}
        if self.says_bytes:
            found["bpb"] = float(self.counted.compute()) / math.log(2) / max(1.0, float(self.bytes.compute()))
        if with_teacher:
            found |= {"agreement": float(self.agreement.compute()), "kl": float(self.kl.compute())}
        return {name: found[name] for name in self.names(with_teacher) if name in found}


def _real(batch: Batch) -> Tensor:
    """Mark the positions (samples, positions) that are not padding."""
    if batch.mask is not None:
        return batch.mask.bool()
    mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, Mapping) else None
    return mask.bool() if mask is not None and mask.ndim == 2 else torch.ones_like(batch.targets, dtype=torch.bool)
