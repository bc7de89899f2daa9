"""A tokenizer restricted to the entries that texts use, so that networks need no rows for the others."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kd.data.text.content import digest_of
from kd.data.text.encode import encode_documents
from kd.data.text.store import Tokens, cached
from kd.errors import KdError

log = logging.getLogger(__name__)

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's entry of a byte, for characters that have none
KINDS = ("BPE", "WordPiece", "Unigram", "WordLevel")
SETTINGS = ("model_max_length", "model_input_names", "padding_side", "truncation_side", "chat_template")


@dataclass(frozen=True)
class Restriction:
    """Which entries of a whole tokenizer are kept.

    ``kept``: (n,) int64, the old id of each new one; ``whole``: how many entries there were; ``digest``: of the whole
    tokenizer, by which weights are known that were trained with it.
    """

    kept: np.ndarray
    whole: int
    digest: str


def restrict(tokenizer: Any, digest: str, texts: Sequence[str], cache: Path | None) -> tuple[Any, Restriction]:
    """Restrict a tokenizer of ``transformers`` to what ``texts`` use; which entries these are is kept in ``cache``.

    Networks then choose among the kept entries alone: their softmax, and so the perplexity, is over these.
    """

    def make() -> Tokens:
        used = np.unique(encode_documents(tokenizer, texts, [], []).ids)
        kept = needed(tokenizer, used)
        return Tokens(kept.astype(np.int32), np.array([0, len(kept)]))

    kept = cached(cache, f"{digest_of(texts, 'vocabulary 1')}-{digest}", make, Tokens).ids.astype(np.int64)
    log.info(
        "data.vocabulary = corpus: %s of %s entries of the tokenizer are kept; perplexities are over these alone",
        *(f"{len(kept):,}", f"{len(tokenizer):,}"),
    )
    return restricted(tokenizer, kept), Restriction(kept, len(tokenizer), digest)


def unpadded(tokenizer: Any, digest: str) -> Restriction:
    """Keep all entries of a tokenizer of ``transformers``, and of networks no rows behind them."""
    count = max(tokenizer.get_vocab().values()) + 1  # entries may leave numbers between them out
    return Restriction(np.arange(count), count, digest)


def needed(tokenizer: Any, used: Iterable[int]) -> np.ndarray:
    """Return the ids (n,) int64, in order, that a tokenizer of ``transformers`` needs for texts of the ids ``used``.

    Beside these: special and added tokens; single characters (or bytes, where the tokenizer falls back to them), so
    that no text becomes unknown that was not before; and of byte pair encoding what the used entries are merged from.
    ``KdError`` for a tokenizer of another kind.
    """
    whole = _described(tokenizer)
    model = whole["model"]
    ids = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    names = {number: name for name, number in ids.items()}
    found = {names[int(number)] for number in used} | set(map(str, tokenizer.all_special_tokens))
    found |= {token["content"] for token in whole["added_tokens"]} | _always(model, ids)
    if model["type"] == "BPE":
        found |= _merged(model, found)
    return np.array(sorted({ids[name] for name in found}), dtype=np.int64)


def restricted(tokenizer: Any, kept: Iterable[int]) -> Any:
    """Return a tokenizer of the entries ``kept`` alone, see :func:`needed`; new ids keep the order of the old ones.

    A text of which all ids are kept becomes the same pieces as before: entries that are not chosen in it, and merges
    that do not happen in it, change nothing when they are gone. Another text becomes smaller pieces.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    whole = _described(tokenizer)
    new = {int(old): number for number, old in enumerate(kept)}
    whole |= {"model": _model(whole["model"], new), "truncation": None, "padding": None}
    whole["added_tokens"] = [{**token, "id": new[token["id"]]} for token in whole["added_tokens"]]
    whole["post_processor"] = _renumbered(whole["post_processor"], new)
    settings = {key: getattr(tokenizer, key, None) for key in SETTINGS}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(whole)),
        **{key: value for key, value in settings.items() if value is not None},
        **tokenizer.special_tokens_map,
    )


def _described(tokenizer: Any) -> dict[str, Any]:
    """Return what ``tokenizers`` writes of a tokenizer. ``KdError`` where it is not made of entries known here."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole: dict[str, Any] = {"model": {}} if backend is None else json.loads(backend.to_str())
    model = whole["model"]
    marks = (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))
    if model.get("type") not in KINDS or (model["type"] == "BPE" and any(marks)):
        raise KdError(
            "data.vocabulary = corpus needs a tokenizer of byte pairs, word pieces, words or unigrams, as in a "
            f"tokenizer.json, data.tokenizer is a {type(tokenizer).__name__} of another kind"
        )
    return whole


def _always(model: Mapping[str, Any], ids: Mapping[str, int]) -> set[str]:
    """Return the entries that any text may need: bytes or single characters, and the unknown one."""
    prefix = model.get("continuing_subword_prefix") or ""
    if model.get("byte_fallback"):
        found = {name for name in ids if BYTE.fullmatch(name)}
    else:
        found = {name for name in ids if len(name) == 1 or len(name.removeprefix(prefix)) == 1}
    if model["type"] == "Unigram":
        unknown = model.get("unk_id")
        return found if unknown is None else {*found, model["vocab"][unknown][0]}
    return found | {name for name in ids if name == model.get("unk_token")}


def _merged(model: Mapping[str, Any], entries: Iterable[str]) -> set[str]:
    """Return all that entries are merged from, by the merges in their order."""
    ranks = {pair: rank for rank, pair in enumerate(_pairs(model))}
    found = set()
    for entry in entries:
        parts = list(entry)
        found.update(parts)
        while ranked := [(ranks[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in ranks]:
            _, place = min(ranked)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
            found.add(parts[place])
    return found & model["vocab"].keys()


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges in their order; older files write the two parts with a space between."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(first, second) for first, second in pairs]


def _model(model: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Return a model of the entries that have a new id."""
    if model["type"] == "Unigram":
        unknown = model.get("unk_id")
        entries = [entry for old, entry in enumerate(model["vocab"]) if old in new]
        return {**model, "vocab": entries, "unk_id": None if unknown is None else new[unknown]}
    vocabulary = {name: new[old] for name, old in model["vocab"].items() if old in new}
    if model["type"] != "BPE":
        return {**model, "vocab": vocabulary}
    merges = [pair for pair in _pairs(model) if {*pair, "".join(pair)} <= vocabulary.keys()]
    return {**model, "vocab": vocabulary, "merges": merges}


def _renumbered(part: Any, new: Mapping[int, int]) -> Any:
    """Return a post-processor with the new ids of the tokens that it adds, written ``ids: […]`` or ``[token, id]``."""
    if isinstance(part, Mapping):
        return {k: [new[old] for old in v] if k == "ids" else _renumbered(v, new) for k, v in part.items()}
    if isinstance(part, Sequence) and not isinstance(part, str):
        if len(part) == 2 and isinstance(part[0], str) and isinstance(part[1], int):
            return [part[0], new[part[1]]]
        return [_renumbered(value, new) for value in part]
    return part
