"""Sentences, or pairs of them, with a class each: from files, from Hugging Face ``datasets``, from Python objects."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kd.config.rules import refusals, refuse
from kd.data.content import Rows
from kd.data.split import round_half_up, stratified
from kd.data.text.base import TextModule
from kd.data.text.content import TextContent, digest_of, normalised
from kd.data.text.encode import encode_texts
from kd.data.text.labels import NUMBER, class_label, class_names, label_text, numbers_of, positions
from kd.data.text.loader import Form, Part, part_of
from kd.data.text.options import RULES, plain
from kd.data.text.records import Records, load_splits, read
from kd.data.text.split import apart, carve
from kd.errors import KdError, counted
from kd.losses.base import UNLABELLED

log = logging.getLogger(__name__)

FEW = 30  # texts of val or test: with fewer, one is more than 3 points of accuracy


@dataclass(frozen=True)
class Texts:
    """Rows of one split; ``labels``: as written, None: none; ``index`` (n,): their row in ``source``, from 0."""

    first: list[str]
    second: list[str] | None
    labels: list[str | None]
    index: Tensor
    source: Records

    @property
    def where(self) -> str:
        """What errors call the source."""
        return self.source.where

    def row(self, place: int) -> str:
        """Say what errors call the row of a text, by its place here."""
        return self.source.row(int(self.index[place]))

    def __len__(self) -> int:
        return len(self.first)

    def keys(self) -> list[str]:
        """Return what texts are compared by."""
        if self.second is None:
            return [normalised(text) for text in self.first]
        pairs = zip(self.first, self.second, strict=True)
        return [f"{normalised(one)}\x1f{normalised(other)}" for one, other in pairs]

    def take(self, rows: Sequence[int]) -> Texts:
        """Take these rows."""
        second = None if self.second is None else [self.second[i] for i in rows]
        chosen = torch.as_tensor(rows, dtype=torch.int64)
        first, labels = [self.first[i] for i in rows], [self.labels[i] for i in rows]
        return replace(self, first=first, second=second, labels=labels, index=self.index[chosen])


class Sentences(TextModule):
    """Classes of sentences; with ``masking``, masked tokens of them.

    ``name``, ``subset``: a folder or a set of the Hugging Face hub, in the place of ``train``, ``val`` and ``test``
    ``text``, ``text_pair``, ``label``: columns; without ``label`` (null) no text has a class
    ``label_names``: the classes in order; null: those of train, sorted. Labels are names, or numbers that count them
    ``numbers``: labels are numbers to regress on, a float32 target each, not classes
    ``max_length``: tokens of a text, with the special ones; longer ones are truncated. Null: what the tokenizer's
    networks take
    ``label_fraction``: part of the training texts that keep their label, stratified, at least one a class
    ``keep_unlabelled``: whether the others stay, as UNLABELLED transfer set, or are removed
    ``overlap``: what becomes of texts of train that are in val or test too (of val: in test), by case and spaces
    alike: ``remove`` them, ``keep`` them, or ``refuse``. What is cut from train never shares a text with it

    The targets are (B,) int64. ``index`` is the row in the file, or in the files one after the other.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        subset: str | None = None,
        text: str = "text",
        text_pair: str | None = None,
        label: str | None = "label",
        label_names: Sequence[str] | None = None,
        numbers: bool = False,
        max_length: int | None = 128,
        label_fraction: float = 1.0,
        keep_unlabelled: bool = True,
        overlap: str = "remove",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        refuse(refusals("data.", locals(), RULES))
        if numbers and (label_names is not None or label_fraction < 1 or label is None):
            raise KdError("data.numbers = true is not allowed with label_names, label_fraction, or label = null")
        self.numbers = numbers
        self.name, self.subset, self.max_length, self.overlap = name, subset, max_length, overlap
        self.columns: dict[str, str | None] = {"text": text, "text_pair": text_pair, "label": label}
        self.label_names = None if label_names is None else list(map(str, plain(label_names)))
        self.label_fraction, self.keep_unlabelled = label_fraction, keep_unlabelled

    def load(self) -> dict[str, Records]:
        """Read the splits that there are. ``KdError`` when train is not given."""
        given = {split: source for split, source in self.given.items() if source is not None}
        if self.name is not None:
            if given:
                raise KdError(f"data.{next(iter(given))} is not allowed with data.name = {self.name}: give one of both")
            given = load_splits(self.name, self.subset, self.root)
        if "train" not in given:
            raise KdError(
                "data.train = null is not allowed: it must be a file (.csv, .tsv, .jsonl, .parquet or .txt), or set "
                "data.name"
            )
        return {split: read(source, self.root, self.encoding, split, self.delimiter) for split, source in given.items()}

    def build(self) -> dict[str, Any]:
        """Read, split and tokenise; classes are known afterwards."""
        splits = self.divided()
        train = splits["train"][0]
        words = [*train.first, *(train.second or ())]
        self.load_tokenizer(words, self.max_length, "max_length")
        self.restrict_vocabulary(words)
        self._check_length(train)
        with_types = train.second is not None
        kind = "labels" if self.masking is None else "masked"
        self.form = Form(self.special, kind, self.masking or 0.0, (), (), False, self.most, self.multiple, with_types)
        if self.masking is not None:
            self.num_classes, self.class_names = len(self.tokenizer), []
        parts = {split: self._encoded(split, *splits[split]) for split in ("train", "val", "test")}
        return {**parts, "train": self.withheld(self.shrunk(parts["train"]))}

    def divided(self) -> dict[str, tuple[Texts, Tensor]]:
        """Read and split: the texts and targets of each split; classes, ``content`` and ``texts`` are known then."""
        self.texts = {split: self._texts(records) for split, records in self.load().items()}
        self._name_classes(self.texts)
        splits = {split: (part, self._targets(part, split)) for split, part in self.texts.items()}
        self._describe(self.texts)
        splits = self._apart(splits)
        self._warn_of_few({name: len(splits[name][0]) for name in ("val", "test")})
        return splits

    def _warn_of_few(self, sizes: dict[str, int]) -> None:
        few = {name: size for name, size in sizes.items() if size < FEW}
        if few and self.class_names:
            said = [
                f"{name} has {counted(n, 'text')}, so one is {100 / n:.1f} points of accuracy"
                for name, n in few.items()
            ]
            log.warning("%s: smaller differences between two networks cannot be measured", "; ".join(said))

    # ------------------------------------------------------------------ columns and classes

    def _texts(self, records: Records) -> Texts:
        """Return the texts of a source without empty ones."""
        first = self._words(records, "text")
        second = None if self.columns["text_pair"] is None else self._words(records, "text_pair")
        labels = self._labels(records)
        kept = [i for i, text in enumerate(first) if text.strip() and (second is None or second[i].strip())]
        if not kept:
            raise KdError(f"{records.where} has no text in data.text = {self.columns['text']}: all are empty")
        if len(kept) < len(first):
            log.warning("%s: %s of %s texts are empty and left out", records.where, len(first) - len(kept), len(first))
        whole = Texts(first, second, labels, torch.arange(len(first)), replace(records, columns={}))
        return whole.take(kept)

    def _words(self, records: Records, key: str) -> list[str]:
        name = self.columns[key]
        assert name is not None
        values = ["" if value is None else value for value in records.column(name, key)]
        wrong = next((value for value in values if not isinstance(value, str)), None)
        if wrong is not None:
            raise KdError(f"data.{key} = {name} of {records.where} holds no texts: {wrong!r} is one of its values")
        return values

    def _labels(self, records: Records) -> list[str | None]:
        name = self.columns["label"]
        if name is None or records.plain or self.masking is not None:
            return [None] * len(records)
        values, names = records.column(name, "label"), records.classes.get(name)
        if (wrong := next((value for value in values if isinstance(value, (list, dict))), None)) is not None:
            raise KdError(
                f"data.label = {name} of {records.where} has {wrong!r} as one of its values: it must be one class a "
                "text"
            )
        if self.numbers:
            return [label_text(value) or None for value in values]
        return [class_label(value, names) for value in values]

    def _name_classes(self, texts: dict[str, Texts]) -> None:
        if self.numbers:
            return
        train = texts["train"]
        labelled = sum(label is not None for label in train.labels)
        if 0 < labelled < len(train):
            log.warning(
                "%s: %s of %s have no label (an empty cell, or -1) and are trained on without one",
                *(train.where, f"{len(train) - labelled:,}", counted(len(train), "text")),
            )
        self.class_names = self.label_names or class_names(train.labels, self.columns["label"], train.where)
        self.num_classes = len(self.class_names) or None

    def _targets(self, texts: Texts, split: str) -> Tensor:
        if self.numbers and self.masking is None:
            return torch.tensor(numbers_of(texts.labels, self.columns["label"], texts.row))
        places = {name: place for place, name in enumerate(self.class_names)}
        if self.label_names is not None and not any(NUMBER.fullmatch(name) for name in self.class_names):
            places = {**{str(place): place for place in range(len(places))}, **places}
        source = "train" if self.label_names is None else "data.label_names"
        known = positions(texts.labels, places, texts.where, source)
        if self.class_names and split != "train" and (lacking := known.count(None)):
            raise KdError(f"{texts.where} has {counted(lacking, 'text')} without a label: {split} needs one for each")
        return torch.tensor([UNLABELLED if place is None else place for place in known], dtype=torch.int64)

    # ------------------------------------------------------------------ splits

    def _describe(self, texts: dict[str, Texts]) -> None:
        labels = [str(label) for split in texts.values() for label in split.labels]
        written = [text for split in texts.values() for text in (*split.first, *(split.second or ()))]
        keys = {split: TextContent(part.keys(), f"text of {part.where},") for split, part in texts.items()}
        self.describe(keys, digest_of([*written, *labels, *self.class_names]).encode())

    def _apart(self, splits: dict[str, tuple[Texts, Tensor]]) -> dict[str, tuple[Texts, Tensor]]:
        """Cut what is not given, and take out what is in two of them."""
        if "test" not in splits and not self.test_fraction:
            raise KdError("there is no test set: set data.test, or cut it from train with data.test_fraction=0.2")
        if "test" in splits and self.test_fraction:
            raise KdError(f"data.test_fraction = {self.test_fraction} is not allowed: there is a test set")
        for name in ("test", "val"):
            if name not in splits:
                splits = {**splits, **self._cut(splits["train"], name)}
        kept = apart({split: part.keys() for split, (part, _) in splits.items()}, self.overlap)
        lost = next((split for split, rows in kept.items() if not rows), None)
        if lost is not None:
            raise KdError(f"data.overlap = remove leaves no text of {lost}: all of them are in another split as well")
        return {split: (part.take(kept[split]), targets[kept[split]]) for split, (part, targets) in splits.items()}

    def _cut(self, train: tuple[Texts, Tensor], name: str) -> dict[str, tuple[Texts, Tensor]]:
        texts, targets = train
        fraction = getattr(self, f"{name}_fraction")
        classes = torch.zeros(len(texts), dtype=torch.int64) if targets.is_floating_point() else targets
        chosen, rest = carve(texts.keys(), classes, fraction, self.split_seed, name)
        if not len(chosen) or not len(rest):
            left = "none to train on" if len(chosen) else f"no text for {name}"
            raise KdError(f"data.{name}_fraction = {fraction} leaves {left}: there are {len(texts):,} texts")
        parts = {name: chosen, "train": rest}
        return {split: (texts.take(rows.tolist()), targets[rows]) for split, rows in parts.items()}

    def withheld(self, train: Any) -> Any:
        """Keep labels for ``label_fraction`` of the training texts only."""
        if self.label_fraction == 1 or not self.has_labels:
            return train
        labelled = (train.targets != UNLABELLED).nonzero().flatten()
        if not len(labelled):
            raise KdError(f"data.label_fraction = {self.label_fraction} is not allowed: no training text has a label")
        total = round_half_up(self.label_fraction * len(labelled))
        kept, others = stratified(train.targets[labelled], total, self.seed, "labels", minimum=1)
        if not self.keep_unlabelled:
            return train.take(labelled[kept])
        return replace(train, targets=train.targets.index_fill(0, labelled[others], UNLABELLED))

    # ------------------------------------------------------------------ tokens

    def _check_length(self, train: Texts) -> None:
        second = None if train.second is None else ["a"]
        special = len(encode_texts(self.tokenizer, ["a"], second, None).ids) - (2 if second else 1)
        if self.most is not None and self.most <= special:
            raise KdError(
                f"data.max_length = {self.most} is not allowed: the tokenizer adds {special} special tokens to a text"
            )

    def _encoded(self, split: str, texts: Texts, targets: Tensor) -> Part:
        key = digest_of([*texts.first, *(texts.second or ())], "sentences 1", texts.second is not None, self.most)
        tokens = self.tokens(key, lambda: encode_texts(self.tokenizer, texts.first, texts.second, self.most))
        if tokens.truncated:
            log.warning(
                "%s of %s texts of %s are longer than data.max_length = %s tokens and truncated",
                *(f"{tokens.truncated:,}", f"{len(texts):,}", split, self.most),
            )
        keys = TextContent(texts.keys(), f"text of {split},")
        return part_of(tokens, targets, texts.index, Rows(keys, torch.arange(len(texts))))
