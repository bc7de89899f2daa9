"""From the logits of starts and ends to the answer of a question: the likeliest span of all of its windows.

Windows of long contexts, and the answer of all of them: Devlin et al., BERT, NAACL 2019, arXiv 1810.04805.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Scored(NamedTuple):
    """The likeliest span of each window.

    ``score`` (windows,): the sum of its logits of start and end; ``none`` (windows,): that of no answer;
    ``characters`` (windows, 2) int64: the part [begin, end) of the context.
    """

    score: Tensor
    none: Tensor
    characters: Tensor


class Answered(NamedTuple):
    """The answers of questions.

    ``question`` (questions,) int64, ascending; ``window`` (questions,) int64: the one with the answer's score; ``none``
    (questions,) bool: whether the answer is that there is none.
    """

    question: Tensor
    window: Tensor
    none: Tensor


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


def scored(logits: Tensor, allowed: Tensor, null: Tensor, characters: Tensor, most: int) -> Scored:
    """Score windows, each for itself.

    ``logits`` (windows, 2, positions): of starts and ends; ``allowed`` (windows, positions) bool: the positions of the
    context, and ``null`` (windows,) int64, that of no answer, which is allowed as well; ``characters`` (windows,
    positions, 2) int64: the part of the context that a position stands for; ``most``: positions of a span.
    """
    null = null.unsqueeze(1)
    score, first, last = best_spans(logits[:, 0], logits[:, 1], allowed.scatter(1, null, False), most)
    none = logits.gather(2, null.unsqueeze(1).expand(-1, 2, 1)).sum((1, 2))
    ends = [characters[..., side].gather(1, place.unsqueeze(1)) for side, place in enumerate((first, last))]
    return Scored(score, none, torch.cat(ends, 1))


def answered(question: Tensor, windows: Scored, threshold: float | None) -> Answered:
    """Choose the answer of each question among the spans of all of its windows.

    It is the span with the largest score, of equal ones the first; or none, where the least score of no answer is above
    it by more than ``threshold`` (None: every question has an answer). ``question`` (windows,) int64: of each window.
    """
    questions, best = _first(question, windows.score.argsort(descending=True, stable=True))
    _, least = _first(question, windows.none.argsort(stable=True))
    above = windows.none[least].double() - windows.score[best].double()
    none = above > (torch.inf if threshold is None else threshold)
    return Answered(questions, torch.where(none, least, best), none)


def _first(question: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return the questions, ascending, and the window of each that comes first in ``order`` (windows,)."""
    order = order[question[order].argsort(stable=True)]
    questions, counts = torch.unique_consecutive(question[order], return_counts=True)
    return questions, order[counts.cumsum(0) - counts]
