"""Answers of a question-answering network to new questions on texts: ``kd predict``, ``kd.load(RUN).predict(…)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.data.text.windows import Question, Windows, windows_of
from kd.deploy.inputs import chunks
from kd.deploy.predict import Prediction, Predictor
from kd.errors import KdError
from kd.tasks.spans import Scored, answered, scored


class AnswerPredictor(Predictor):
    """A run's network on pairs of a question and a context; a prediction's ``label`` is the answer's text.

    ``probability``: of its first and its last token among all positions of its window, as trained. Where the run's
    questions may have none, the label is "" when the task's threshold says so, and the probability that of no answer.
    ``answer``: from tokens to logits (windows, 2, positions).
    """

    def __init__(self, answer: Callable[[Any], Tensor], tokenizer: Any, config: Mapping[str, Any], task: Any) -> None:
        data = config["data"]
        columns = tuple(data.get(key) or key for key in ("question", "context"))
        facts = {"regression": False, "reads_texts": True, "pairs": True, "columns": columns}
        super().__init__(answer, lambda some: some, facts)
        self.spans = True
        self.tokenizer, self.task, self.unanswerable = tokenizer, task, bool(data.get("unanswerable"))
        self.sizes = (data["max_length"], data["stride"], data["question_length"])

    def stream(
        self, inputs: Sequence[Any], batch_size: int = 32, skip_unreadable: bool = False
    ) -> Iterator[Prediction]:
        """Answer pairs (question, context) one after the other, ``batch_size`` windows at a time."""
        if isinstance(inputs, str):
            raise KdError("predict takes a list of inputs, not one: predict([(question, context)])")
        for part in chunks(inputs, batch_size):
            questions: list[Question] = []
            errors: dict[int, str] = {}
            for row in range(part.start, min(part.stop, len(inputs))):
                try:
                    questions.append(self._question(inputs[row], row, skip_unreadable))
                except KdError as error:
                    if not skip_unreadable:
                        raise
                    errors[row] = str(error)
            found = iter(self._answers(questions, batch_size))
            for row in range(part.start, min(part.stop, len(inputs))):
                if row in errors:
                    yield Prediction(_name(inputs[row]), None, float("nan"), error=errors[row])
                else:
                    yield next(found)

    def _question(self, item: Any, row: int, tried: bool) -> Question:
        """Make a question of an input. ``KdError`` for what is none.

        ``tried``: also for a context of which the tokenizer leaves nothing, which a whole batch ends with otherwise.
        """
        if not (isinstance(item, (tuple, list)) and len(item) == 2 and all(isinstance(text, str) for text in item)):
            raise KdError(f"the run answers pairs (question, context), input {row} is none: {str(item)[:80]!r}")
        if empty := [name for name, text in zip(("question", "context"), item, strict=True) if not text.strip()]:
            raise KdError(f"the {empty[0]} of input {row} is empty")
        text, context = item
        question = Question(text, context, [], row)
        if tried:
            windows_of(self.tokenizer, [question], *self.sizes, "input", characters=False)
        return question

    def _answers(self, questions: Sequence[Question], batch_size: int) -> Iterator[Prediction]:
        """Answer questions, ``batch_size`` windows at a time."""
        if not questions:
            return
        windows = windows_of(self.tokenizer, questions, *self.sizes, "input", characters=True)
        found = [
            self._scored(windows, np.arange(len(windows))[part]) for part in chunks(range(len(windows)), batch_size)
        ]
        all_scored = Scored(*(torch.cat(parts) for parts in zip(*(one for one, _ in found), strict=True)))
        log_sums = torch.cat([sums for _, sums in found])
        threshold = self.task.no_answer_threshold if self.unanswerable else None
        chosen = answered(torch.from_numpy(windows.question), all_scored, threshold)
        scores = torch.where(chosen.none, all_scored.none[chosen.window], all_scored.score[chosen.window])
        probabilities = (scores - log_sums[chosen.window]).exp()
        spans = all_scored.characters[chosen.window]
        facts = zip(chosen.none.tolist(), spans.tolist(), probabilities.tolist(), strict=True)
        for question, (none, span, probability) in zip(questions, facts, strict=True):
            yield Prediction(question.text, "" if none else question.context[slice(*span)], probability)

    def _scored(self, windows: Windows, chosen: np.ndarray) -> tuple[Scored, Tensor]:
        """Score windows (n,), and return the log of the sum over all pairs of positions as well, (n,)."""
        rows = [slice(*windows.offsets[window : window + 2]) for window in chosen]
        width = max(row.stop - row.start for row in rows)

        def padded(values: np.ndarray, fill: int) -> Tensor:
            made = np.full((len(rows), width, *values.shape[1:]), fill, dtype=np.int64)
            for line, row in enumerate(rows):
                made[line, : row.stop - row.start] = values[row]
            return torch.from_numpy(made)

        inputs = {"input_ids": padded(windows.ids, self.tokenizer.pad_token_id or 0)}
        inputs["attention_mask"] = padded(np.ones_like(windows.ids), 0)
        if windows.types is not None:
            inputs["token_type_ids"] = padded(windows.types, 0)
        assert windows.characters is not None
        places, context = torch.arange(width), torch.from_numpy(windows.context[chosen])
        inside = (places >= context[:, :1]) & (places < context[:, 1:])
        null = torch.from_numpy(windows.null[chosen])
        allowed = inside.scatter(1, null.unsqueeze(1), True)
        logits = self.answer(inputs).float().cpu().masked_fill(~allowed.unsqueeze(1), -torch.inf)
        found = scored(logits, allowed, null, padded(windows.characters, 0), self.task.max_answer_length)
        return found, logits.logsumexp(2).sum(1)


def _name(item: Any) -> str:
    return str(item[0]) if isinstance(item, (tuple, list)) and item else str(item)
