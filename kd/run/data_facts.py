"""The facts about data that travel with weights, and whether weights may meet this run's data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from kd.errors import KdError

log = logging.getLogger(__name__)


def facts(data: Any) -> dict[str, Any]:
    """Return what a network must know of the data it was trained on; stored with its weights."""
    return {
        "num_classes": data.num_classes,
        "input_shape": list(data.input_shape),
        "class_names": list(data.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
        "split": dict(data.split_facts),
        "content": getattr(data, "content", None),  # of a data module of the user's own: not known
        "seen": getattr(data, "seen", None),
        **({"tokenizer": digest} if (digest := getattr(data, "tokenizer_digest", None)) else {}),
        **({"teacher_tokenizer": own.tokenizer_digest} if (own := _for_teacher(data)) is not data else {}),
        **({"vocabulary": {"kept": len(cut.kept), "of": cut.whole}} if (cut := _restriction(data)) else {}),
        **({"encoder": digest} if (digest := getattr(data, "encoder_digest", None)) else {}),
    }


def _for_teacher(data: Any) -> Any:
    """Return the data with the tokenizer of a teacher that has another one, see :mod:`kd.data.text.teacher_tokens`."""
    return getattr(data, "for_teacher", data)


def _restriction(data: Any) -> Any:
    """Return how the data's tokenizer is restricted, see :class:`kd.data.text.vocabulary.Restriction`; None: not."""
    return getattr(data, "restriction", None)


def same_data(recorded: Mapping[str, Any], data: Any, source: str, advice: str | None = "") -> None:
    """Refuse weights (``source``, with the facts recorded beside them) of other classes or of another split.

    Weights of the same set must not have been trained on this run's test samples, nor silently on its val. ``advice``:
    what to do about other classes; None: they may be others.
    """
    theirs, ours = recorded.get("class_names") or None, list(data.class_names)
    if data.num_classes is None or advice is None:
        theirs = None
    advice = f"; {advice}" if advice else ""
    if theirs is not None and len(theirs) != len(ours):
        raise KdError(f"{source} was trained on {len(theirs)} classes, the data has {len(ours)}{advice}")
    if theirs is not None and theirs != ours:
        first = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
        differ = f"class {first} is called {theirs[first]!r} there, {ours[first]!r} in the data"
        raise KdError(f"{source} was trained on other classes: {differ}{advice}")
    known = [None, getattr(data, "tokenizer_digest", recorded.get("tokenizer"))]
    known += [cut.digest] if (cut := _restriction(data)) else []  # of the whole one: its networks are cut
    if recorded.get("tokenizer") not in known:
        raise KdError(
            f"{source} was trained with another tokenizer than data.tokenizer, so that ids mean other tokens to it: "
            "set data.tokenizer=RUN, its run"
        )
    if recorded.get("encoder") not in (None, getattr(data, "encoder_digest", recorded.get("encoder"))):
        raise KdError(f"{source} was trained on features of another encoder than data.encoder, or pooled otherwise")
    split, here = dict(recorded.get("split") or {}), dict(data.split_facts)
    there, same = (str(facts.pop("set", "")).rpartition(" ")[2] for facts in (split, here))  # a set is its digest
    moved = there == same and split != here
    cut = split.get("test_fraction") and here.get("test_fraction")
    if cut and "cut_by" in here and "cut_by" not in split:  # whichever files were added since
        raise KdError(
            f"{source} may have been trained on this run's test samples: it is of an older kd, which divided folders "
            "in another way than by the names of the files; train it anew"
        )
    differ = ", ".join(f"data.{k} {split.get(k)} there and {here.get(k)} here" for k in _unequal(split, here))
    if moved and here.get("test_fraction"):
        raise KdError(f"{source} may have been trained on this run's test samples: {differ}")
    if moved:
        log.warning("%s may have been trained on this run's validation samples: %s", source, differ)
    _same_samples(recorded, data, source)


def _unequal(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [key for key in {**other, **one} if one.get(key) != other.get(key)]


def _same_samples(recorded: Mapping[str, Any], data: Any, source: str) -> None:
    """Refuse weights that have seen samples which are test samples now; say when they were trained on other ones.

    Files may have been renamed, added or exchanged since. Weights that do not say on which samples they were trained
    (of other programs) are left to the user, and so is a data module that cannot tell.
    """
    content = recorded.get("content")
    if content is None or getattr(data, "content", None) in (None, content):
        return
    if known := data.seen_in_test(recorded["seen"]) if recorded.get("seen") else ():
        some = f"{', '.join(known[:3])}{' …' if len(known) > 3 else ''}"
        raise KdError(
            f"{source} has seen samples in training or validation that are test samples now (at least "
            f"{len(known)}: {some}): the data has changed since. Train it anew on the data as it is, or take these "
            "samples out of the test set"
        )
    log.warning(
        "%s was trained on other samples than this run's data, or files of other names: content %s there, %s here",
        *(source, content, data.content),
    )
