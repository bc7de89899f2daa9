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
from kd.tasks.question_answering import best_spans

AT_ONCE = 16  # windows that the network answers together, at least


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
        """Answer pairs (question, context) one after the other; all windows of ``batch_size`` of them at a time."""
        if isinstance(inputs, str):
            raise KdError("predict takes a list of inputs, not one: predict([(question, context)])")
        for part in chunks(inputs, batch_size):
            some = inputs[part]
            if wrong := [item for item in some if isinstance(item, str) or len(item) != 2 or not all(map(_said, item))]:
                raise KdError(f"the run answers questions on texts, this is none: {wrong[0]!r}")
            asked = [Question(text, context, [], row) for row, (text, context) in enumerate(some)]
            windows = windows_of(self.tokenizer, asked, *self.sizes, "data", characters=True)
            groups = np.array_split(np.arange(len(windows)), -(-len(windows) // max(AT_ONCE, batch_size)))
            found = [self._spans(windows, group) for group in groups]
            scored, nothing, spans, log_sums = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
            for number, question in enumerate(asked):
                of = np.flatnonzero(windows.question == number)
                best, none = of[scored[of].argmax()], of[nothing[of].argmin()]
                lacking = self.unanswerable and nothing[none] - scored[best] > self.task.no_answer_threshold
                score, window = (nothing[none], none) if lacking else (scored[best], best)
                text = "" if lacking else question.context[slice(*spans[best])]
                yield Prediction(question.text, text, float(np.exp(score - log_sums[window])))

    def _spans(self, windows: Windows, chosen: np.ndarray) -> tuple[np.ndarray, ...]:
        """Score windows (n,): likeliest span, no answer, the span's characters (n, 2), log of the sum of all pairs."""
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
        null = torch.from_numpy(windows.null[chosen]).unsqueeze(1)
        logits = self.answer(inputs).float().cpu()
        logits = logits.masked_fill(~inside.scatter(1, null, True).unsqueeze(1), -torch.inf)
        scores, first, last = best_spans(logits[:, 0], logits[:, 1], inside, self.task.max_answer_length)
        nothing = logits.gather(2, null.unsqueeze(1).expand(-1, 2, 1)).sum((1, 2))
        characters, lines = padded(windows.characters, 0), torch.arange(len(rows))
        spans = torch.stack([characters[lines, first, 0], characters[lines, last, 1]], 1)
        return scores.numpy(), nothing.numpy(), spans.numpy(), logits.logsumexp(2).sum(1).numpy()


def _said(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip())
