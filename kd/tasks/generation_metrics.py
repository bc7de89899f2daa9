"""How generated texts are compared with references: Rouge-L (Lin 2004) and exact match as SQuAD normalises texts.

Rouge-L: C.-Y. Lin, ROUGE: A Package for Automatic Evaluation of Summaries, ACL workshop 2004. Exact match: P. Rajpurkar
and others, SQuAD, EMNLP 2016, arXiv 1606.05250.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from torchmetrics.functional.text import rouge_score

from kd.tasks.metrics import Metric

METRICS = (
    Metric("rouge_l", "Rouge-L", share=True),
    Metric("exact_match", "exact match", share=True, counted=True),
)
References = Sequence[str | Sequence[str]]


def generation_metrics(predictions: Sequence[str], references: References) -> dict[str, float]:
    """Return the metrics of ``METRICS``, each in 0 to 1; arguments and errors are those of :func:`rouge_l`."""
    return {"rouge_l": rouge_l(predictions, references), "exact_match": exact_match(predictions, references)}


def rouge_l(predictions: Sequence[str], references: References) -> float:
    """Return the mean over predictions of Rouge-L's F1, in 0 to 1, beside the best of the references each.

    F1 of precision LCS ÷ words of the prediction and recall LCS ÷ words of the reference; LCS: their longest common
    subsequence (Lin 2004, equations 2 to 4, β = 1). Words are lower-case letters and digits of any script; nothing is
    stemmed. ``references``: a text or several, for each prediction. Raises ``ValueError`` for other numbers of them.
    """
    pairs = _paired(predictions, references)
    found = rouge_score(
        [prediction for prediction, _ in pairs],
        [wanted for _, wanted in pairs],
        accumulate="best",
        rouge_keys="rougeL",
        normalizer=lambda text: text,
        tokenizer=words,
    )
    return float(found["rougeL_fmeasure"])


def exact_match(predictions: Sequence[str], references: References) -> float:
    """Return the share of predictions, in 0 to 1, that are one of their references once both are :func:`normalised`."""
    pairs = _paired(predictions, references)
    return sum(normalised(text) in map(normalised, wanted) for text, wanted in pairs) / len(pairs)


def words(text: str) -> list[str]:
    """Cut a text into lower-case words; for ASCII those of Google's rouge_score."""
    return re.findall(r"[^\W_]+", text.lower())


def normalised(text: str) -> str:
    """Return a text in lower case without punctuation, English articles and repeated spaces."""
    bare = "".join(c for c in text.lower() if not unicodedata.category(c).startswith("P") and c not in "$+<=>^`|~")
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _paired(predictions: Sequence[str], references: References) -> list[tuple[str, list[str]]]:
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"references = {len(references)} texts is not allowed: it must be as many as the predictions, "
            f"{len(predictions)}, and one or more"
        )
    lists = [[wanted] if isinstance(wanted, str) else list(wanted) for wanted in references]
    if not all(lists):
        raise ValueError("references = [] is not allowed: it must be one text or more for each prediction")
    return list(zip(predictions, lists, strict=True))
