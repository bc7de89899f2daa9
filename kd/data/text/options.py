"""The options that every text set takes, and what is allowed for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kd.config.rules import FLAG, Rule, number, one_of, whole

SHARE = number(above=0, below=1)
NAME = Rule("a name", lambda value: isinstance(value, str) and bool(value))
TOKENIZER = ("vocabulary", "kind", "lowercase")  # keys of a tokenizer that is trained


def _delimiter(value: Any) -> bool:
    return value == "tab" or (isinstance(value, str) and len(value) == 1 and value not in '"\r\n')


def _tokenizer(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not set(value) - set(TOKENIZER)
    return value is not None and not isinstance(value, (bool, int, float, list))


DELIMITER = Rule('one character, for example ";", or tab', _delimiter)
RULES = {
    **dict.fromkeys(("batch_size", "eval_batch_size", "pad_to_multiple_of"), whole(1)),
    "seed": whole(0),
    "split_seed": whole(0).or_null,
    "train_size": whole(1).or_null,
    "val_fraction": SHARE,
    "test_fraction": SHARE.or_null,
    "label_fraction": number(above=0, most=1),
    "masking": SHARE.or_null,
    **dict.fromkeys(("max_length", "length"), whole(2).or_null),
    **dict.fromkeys(("stride", "question_length"), whole(1)),
    **dict.fromkeys(
        ("keep_unlabelled", "shuffle", "drop_last", "bucketing", "packing", "separate_documents", "numbers"), FLAG
    ),
    "unanswerable": FLAG,
    "overlap": one_of("remove", "keep", "refuse"),
    "encoder": NAME.or_null,
    "pooling": one_of("mean", "cls"),
    "normalise": FLAG,
    "document": one_of("file", "line", "paragraph"),
    "vocabulary": one_of("corpus", "tokenizer", None),
    "encoding": NAME,
    "delimiter": DELIMITER.or_null,
    **dict.fromkeys(("text", "question", "context", "answers"), NAME),
    **dict.fromkeys(("text_pair", "label", "name", "subset", "title", "cache"), NAME.or_null),
    "label_names": Rule(
        "a list of two names or more",
        lambda value: not isinstance(value, (str, Mapping)) and len(set(map(str, value))) == len(value) >= 2,
    ).or_null,
    "tokenizer": Rule(
        "the name or folder of one, or {vocabulary: 4000, kind: bpe, lowercase: false}", _tokenizer
    ).or_null,
    "teacher_tokenizer": Rule(
        "the name or folder of one", lambda value: _tokenizer(value) and not isinstance(value, Mapping)
    ).or_null,
    "tokenizer.vocabulary": whole(8),
    "tokenizer.kind": one_of(None, "wordpiece", "bpe"),
    "tokenizer.lowercase": FLAG.or_null,
}


def plain(value: Any) -> Any:
    """Return lists and mappings of a config as Python's own."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and not hasattr(value, "column_names")
    return [plain(v) for v in value] if listed else value
