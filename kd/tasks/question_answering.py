"""Extractive question answering: where the answer to a question begins and ends in a context.

SQuAD: Rajpurkar et al., EMNLP 2016, arXiv 1606.05250; version 2, with questions that have no answer: Rajpurkar, Jia and
Liang, ACL 2018, arXiv 1806.03822. Windows of long contexts, and the answer of all of them: Devlin et al., BERT, NAACL
2019, arXiv 1810.04805.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.text import SQuAD

from kd.config.rules import number, refusals, refuse, whole
from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch, Output, Term
from kd.tasks.base import Meter, Task, Want
from kd.tasks.metrics import Metric
from kd.tasks.spans import Scored, answered, scored

MASKED = -1e4  # the logit of a position that is no answer: 0 in a softmax up to T = 90, and finite, in halves as well
RULES = {"max_answer_length": whole(1), "no_answer_threshold": number()}
WORSE = 0.05  # an F1 that is lower by so much than in the teacher's own run is said


class QuestionAnswering(Task):
    """Two rows a window of question and context, its start and its end: distributions over the window's positions.

    Positions of the question, of special tokens and of padding are :data:`MASKED`, in student and teacher alike. One
    special position is not: that of the answer "none is in this window" (``[CLS]``). Every row has as many positions
    as the longest window may have, so that batches of any length can be compared.

    A network answers ``start_logits`` and ``end_logits`` (windows, positions), as those of transformers do. Batches are
    those of :class:`kd.data.text.questions.Questions`: ``targets`` (windows, 2) int64; ``extra["allowed"]`` (windows,
    width) bool, the positions that are not masked.

    Metrics: F1 and exact match of the answers' texts (torchmetrics, the normalisation of SQuAD's own script, beside the
    best of the given answers), of each question the likeliest span of all its windows; NLL of a start or an end; and
    beside a teacher agreement and KL to it, over all rows.

    ``max_answer_length``: tokens of an answer. ``no_answer_threshold``: where questions may have no answer, it is none
    if the logits of ``[CLS]`` (the least of all windows) are above those of the likeliest span by more than this.
    """

    architecture = "question_answering"
    distribution = False  # what a kept top-k leaves out is spread over all positions, masked ones too
    row = "start or an end"
    outputs = "{} positions"
    metrics = (
        Metric("f1", "F1", share=True),
        Metric("exact_match", "exact match", share=True),
        Metric("nll", "NLL", better="min"),
        Metric("agreement", "agreement", share=True, beside_teacher=True),
        Metric("kl", "KL to the teacher", better="min", beside_teacher=True),
    )

    def __init__(self, max_answer_length: int = 30, no_answer_threshold: float = 0.0) -> None:
        refuse(refusals("task.", locals(), RULES))
        self.max_answer_length, self.no_answer_threshold = max_answer_length, no_answer_threshold

    def rows(self, batch: Batch) -> Batch:
        """Put start and end of each window one after the other. ``KdError`` when the targets are no such pairs."""
        targets = batch.targets
        if targets is None or (targets.ndim == 1 and len(targets) == 2 * len(batch)):
            return batch
        if targets.ndim != 2 or targets.shape[1] != 2 or targets.is_floating_point():
            raise KdError(
                "task = question_answering needs the start and the end of an answer a window, the data has targets of "
                f"shape {tuple(targets.shape)}: set data=questions, squad or squad_v2"
            )
        return replace(batch, targets=targets.flatten())

    def answer(self, network: nn.Module, inputs: Any, batch: Batch, want: Want) -> Output:
        """Call a network; its logits are (2 · windows, width), or of the inputs' own width where none are masked."""
        raw = network(**inputs) if isinstance(inputs, Mapping) else network(inputs)
        logits = self.logits(raw)
        if logits is None:
            raise KdError(
                "task = question_answering needs a network that answers start_logits and end_logits, this one answers "
                f"a {type(raw).__name__} without them"
            )
        if (allowed := batch.extra.get("allowed")) is not None:
            logits = F.pad(logits, (0, allowed.shape[1] - logits.shape[2]), value=MASKED)
            logits = logits.masked_fill(~allowed.unsqueeze(1), MASKED)
        return Output(logits.flatten(0, 1), raw=raw)

    def logits(self, raw: Any) -> Tensor | None:
        """Find the logits of starts and ends (windows, 2, positions) in what a network returned, None if none are."""
        if isinstance(raw, (tuple, list)):
            found = [part for part in raw if isinstance(part, Tensor)][:2]
        else:
            get = raw.get if isinstance(raw, Mapping) else lambda name: getattr(raw, name, None)
            found = [part for part in map(get, ("start_logits", "end_logits")) if isinstance(part, Tensor)]
        return torch.stack(found, 1) if len(found) == 2 else None

    def check_terms(self, terms: Iterable[tuple[str, Term]]) -> None:
        """Refuse losses, by name, that read masked positions as if they were classes."""
        for name, term in terms:
            if term.every_class:
                raise KdError(
                    f"loss.{name} is not allowed with task = question_answering: it gives each position a share, or "
                    "measures the spread of all of them, and most are masked"
                )

    def meter(self, classes: int | None) -> AnswerMeter:
        """Make a fresh meter for one pass."""
        return AnswerMeter(self.names, self.max_answer_length, self.no_answer_threshold)

    def doubt(self, measured: Mapping[str, float], recorded: Mapping[str, float], classes: int | None) -> str:
        """Say what is wrong with a teacher that knows less than a uniform guess, or less than in its own run."""
        found, before = measured["f1"], recorded.get("f1")
        if before is not None and found < before - WORSE:
            return (
                f"has an F1 of {found:.1%}, {before:.1%} in its own run: are the questions and the tokenizer those "
                "that it was trained with?"
            )
        return f"has an F1 of {found:.1%}: is it trained?" if found < WORSE else ""


class AnswerMeter(Meter):
    """The metrics of one pass. All windows of a question are on one process (:class:`kd.data.text.windows`)."""

    def __init__(self, names: Callable[[bool], list[str]], most: int, threshold: float) -> None:
        super().__init__()
        self.names, self.most, self.threshold = names, most, threshold
        self.nll, self.agreement, self.kl = (MeanMetric(nan_strategy="disable") for _ in range(3))
        self.texts = SQuAD()
        self.questions: list[int] = []  # of each window
        self.windows: list[Scored] = []  # of each batch
        self.asked: dict[int, tuple[str, list[str]]] = {}  # question → its context and its answers
        self.unanswerable = False

    def update(self, student: Output, batch: Batch, teacher: Output | None = None) -> None:
        """Add one batch."""
        logits, targets = student.logits.float(), batch.targets
        labelled = targets != UNLABELLED
        self.nll.update(F.cross_entropy(logits[labelled], targets[labelled], reduction="none"))
        if teacher is not None:
            other = teacher.logits.float()
            self.agreement.update((logits.argmax(1) == other.argmax(1)).float())
            log_s, log_t = F.log_softmax(logits, 1), F.log_softmax(other, 1)
            self.kl.update(F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1))
        self._answer(logits.unflatten(0, (-1, 2)), batch)

    def _answer(self, logits: Tensor, batch: Batch) -> None:
        """Keep the likeliest span of each window: ``logits`` (windows, 2, width)."""
        if "asked" not in batch.extra:
            raise KdError(
                "task = question_answering measures the texts of answers, which batches of val and test must bring "
                "along: give those of kd.data.text.questions.Questions"
            )
        allowed, null, characters = (batch.extra[name] for name in ("allowed", "null", "characters"))
        self.windows.append(scored(logits, allowed, null, characters, self.most))
        self.questions += [question for question, *_ in batch.extra["asked"]]
        self.asked |= {question: (context, wanted) for question, context, wanted in batch.extra["asked"]}
        self.unanswerable = bool(batch.extra["unanswerable"])

    def predicted(self) -> dict[int, str]:
        """Return the answer to each question of this process; "" where it has none."""
        if not self.windows:
            return {}
        windows = Scored(*(torch.cat(parts).cpu() for parts in zip(*self.windows, strict=True)))
        found = answered(torch.tensor(self.questions), windows, self.threshold if self.unanswerable else None)
        facts = (part.tolist() for part in (found.question, found.none, windows.characters[found.window]))
        answers = zip(*facts, strict=True)
        return {question: "" if none else self.asked[question][0][slice(*span)] for question, none, span in answers}

    def compute(self, with_teacher: bool) -> dict[str, float]:
        """Compute the metrics by name; F1 and exact match as shares."""
        answers = self.predicted()
        self.texts.reset()
        self.texts.update(
            [{"prediction_text": text, "id": str(question)} for question, text in answers.items()],
            [{"answers": {"text": self.asked[q][1] or [""], "answer_start": []}, "id": str(q)} for q in answers],
        )
        found = {name: float(value) / 100 for name, value in self.texts.compute().items()}
        found |= {name: float(getattr(self, name).compute()) for name in ("nll", *(("agreement", "kl") * with_teacher))}
        return {name: found[name] for name in self.names(with_teacher)}
