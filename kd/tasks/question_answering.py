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
        """The logits of starts and ends (windows, 2, positions) in what a network returned, None if there are none."""
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
        """A fresh meter for one pass."""
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


def best_spans(start: Tensor, end: Tensor, context: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the likeliest span of each window, of all that lie in the context and have at most ``most`` positions.

    ``start``, ``end`` (windows, positions): logits; ``context`` (windows, positions) bool, at least one each and all
    one after the other. Returns the sum of the two logits, the first and the last position, (windows,) each. All spans
    are compared, so that the result is that of BERT's n-best lists with as many entries as there are positions.
    """
    width = start.shape[1]
    start = start.masked_fill(~context, -torch.inf)
    end = end.masked_fill(~context, -torch.inf)
    spans = [F.pad(start[:, : width - n] + end[:, n:], (0, n), value=-torch.inf) for n in range(min(most, width))]
    scores, places = torch.stack(spans, 1).flatten(1).max(1)
    first = places % width
    return scores, first, first + places // width


class AnswerMeter(Meter):
    """The metrics of one pass. All windows of a question are on one process (:class:`kd.data.text.windows`)."""

    def __init__(self, names: Callable[[bool], list[str]], most: int, threshold: float) -> None:
        super().__init__()
        self.names, self.most, self.threshold = names, most, threshold
        self.nll, self.agreement, self.kl = (MeanMetric(nan_strategy="disable") for _ in range(3))
        self.texts = SQuAD()
        self.spans: dict[int, tuple[float, str]] = {}  # question → score and text of its likeliest span so far
        self.nulls: dict[int, float] = {}  # question → the least score of "none is in this window"
        self.wanted: dict[int, list[str]] = {}
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
        """Keep the likeliest span of each question: ``logits`` (windows, 2, width)."""
        if "asked" not in batch.extra:
            raise KdError(
                "task = question_answering measures the texts of answers, which batches of val and test must bring "
                "along: give those of kd.data.text.questions.Questions"
            )
        null = batch.extra["null"].unsqueeze(1)
        context = batch.extra["allowed"].scatter(1, null, False)
        scores, first, last = best_spans(logits[:, 0], logits[:, 1], context, self.most)
        nothing = logits.gather(2, null.unsqueeze(1).expand(-1, 2, 1)).sum((1, 2))
        characters = batch.extra["characters"]
        begin = characters[..., 0].gather(1, first.unsqueeze(1)).squeeze(1)
        end = characters[..., 1].gather(1, last.unsqueeze(1)).squeeze(1)
        self.unanswerable = bool(batch.extra["unanswerable"])
        found = zip(scores.tolist(), nothing.tolist(), begin.tolist(), end.tolist(), strict=True)
        for (question, text, wanted), (score, none, one, other) in zip(batch.extra["asked"], found, strict=True):
            self.wanted[question] = wanted
            self.nulls[question] = min(none, self.nulls.get(question, none))
            if question not in self.spans or score > self.spans[question][0]:
                self.spans[question] = (score, text[one:other])

    def predicted(self) -> dict[int, str]:
        """The answer to each question of this process; "" where it has none."""
        found = {question: text for question, (_, text) in self.spans.items()}
        if self.unanswerable:
            above = {question: self.nulls[question] - score for question, (score, _) in self.spans.items()}
            found |= {question: "" for question, difference in above.items() if difference > self.threshold}
        return found

    def compute(self, with_teacher: bool) -> dict[str, float]:
        """The metrics by name; F1 and exact match as shares."""
        answers = self.predicted()
        self.texts.reset()
        self.texts.update(
            [{"prediction_text": text, "id": str(question)} for question, text in answers.items()],
            [{"answers": {"text": self.wanted[q] or [""], "answer_start": []}, "id": str(q)} for q in answers],
        )
        found = {name: float(value) / 100 for name, value in self.texts.compute().items()}
        found |= {name: float(getattr(self, name).compute()) for name in ("nll", *(("agreement", "kl") * with_teacher))}
        return {name: found[name] for name in self.names(with_teacher)}
