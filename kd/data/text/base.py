"""The module that every text set derives from: options, tokenizer, loaders, and what a run needs to know."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor

from kd.config.rules import refusals, refuse
from kd.data import content
from kd.data.images.loader import Loader
from kd.data.split import stratified
from kd.data.text import store
from kd.data.text import tokenizer as tokenizers
from kd.data.text.collate import Special
from kd.data.text.content import TextContent
from kd.data.text.loader import Form, TextLoader
from kd.data.text.options import RULES, plain
from kd.data.text.vocabulary import Restriction, restrict, unpadded
from kd.errors import KdError
from kd.losses.base import UNLABELLED

log = logging.getLogger(__name__)


class TextModule(lightning.LightningDataModule, ABC):
    """Train, val and test of a set of texts, always apart, as batches of token ids.

    A batch is ``kd.losses.base.Batch``: inputs a mapping with ``input_ids`` and ``attention_mask`` (B, L) int64, padded
    on the right; targets int64, UNLABELLED where there is none; index (B,) int64; mask (B, L) bool, the real positions.
    After ``setup`` there are ``tokenizer`` (of ``transformers``), ``vocab_size``, ``num_classes``, ``class_names``.

    Options that all sets take; those that are wrong name themselves (``KdError``):

    ``root``: folder of data sets, that paths are relative to
    ``train``, ``val``, ``test``: files, lists of files, or rows; val is cut from train where it is null
    ``val_fraction``, ``test_fraction``: what is cut where there is no val, no test
    ``encoding``: of files; ``delimiter``: of .csv and .tsv, a character or ``tab``; null: by the ending
    ``title``: what people call the set
    ``tokenizer``: name or folder of one of ``transformers``, an object, or {vocabulary, kind, lowercase}: it is trained
    on the training texts; null: trained, with 4,000 entries
    ``vocabulary``: ``corpus``: a given tokenizer is restricted to the entries that the training texts use, and networks
    that know its whole vocabulary to these rows; ``tokenizer``: networks lose the rows behind the tokenizer's entries,
    of which two that were padded to other sizes have other numbers; null: networks stay as they are
    ``cache``: folder for token ids and trained tokenizers; null: none
    ``masking``: share of the tokens that are masked and are the targets (masked language modelling); null: none is
    ``batch_size``: rows a step, over all processes together; ``eval_batch_size``: rows a batch and process
    ``seed``: order, masks, choice of ``train_size``; ``split_seed``: what is cut (null: ``seed``)
    ``train_size``: at most this many rows of train; null: all
    ``bucketing``: rows of about the same length are trained on together; ``pad_to_multiple_of``: of positions
    ``shuffle``, ``drop_last``: of the training batches
    """

    num_classes: int | None = None
    tokenizer: Any
    tokenizer_digest: str
    restriction: Restriction | None = None  # of the tokenizer to the entries that the training texts use
    tokenizer_kind = "wordpiece"  # of one that is trained and does not say
    most: int | None  # positions of a row, at most

    def __init__(
        self,
        *,
        root: str | None = None,
        train: Any = None,
        val: Any = None,
        test: Any = None,
        val_fraction: float = 0.1,
        test_fraction: float | None = None,
        encoding: str = "utf-8",
        delimiter: str | None = None,
        title: str | None = None,
        tokenizer: Any = None,
        vocabulary: str | None = None,
        cache: str | None = None,
        masking: float | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 128,
        seed: int = 0,
        split_seed: int | None = None,
        train_size: int | None = None,
        bucketing: bool = True,
        pad_to_multiple_of: int = 1,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        refuse(refusals("data.", locals(), RULES))
        self.root, self.encoding, self.delimiter, self.own_title = root, encoding, delimiter, title
        self.given = {"train": plain(train), "val": plain(val), "test": plain(test)}
        self.val_fraction, self.test_fraction = val_fraction, test_fraction or 0.0
        self.spec, self.cache, self.masking = plain(tokenizer), Path(cache).expanduser() if cache else None, masking
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed, self.split_seed = seed, seed if split_seed is None else split_seed
        self.vocabulary = vocabulary
        if vocabulary is not None and (self.spec is None or isinstance(self.spec, Mapping)):
            raise KdError(
                f"data.vocabulary = {vocabulary} needs a tokenizer that is given (data.tokenizer=NAME or FOLDER): one "
                "that is trained on the training texts has no other entries"
            )
        self.train_size, self.bucketing, self.multiple = train_size, bucketing, pad_to_multiple_of
        self.shuffle, self.drop_last = shuffle, drop_last
        self.parts: dict[str, Any] = {}  # split → kd.data.text.loader.Part, or kd.data.text.features.Vectors
        self.class_names: list[str] = []
        self.mean: list[float] = []
        self.std: list[float] = []
        self.mixup: float | None = None

    @abstractmethod
    def build(self) -> dict[str, Any]:
        """Read and split the set, and tokenise it; ``form``, ``digest`` and ``content`` are known afterwards."""

    form: Form
    digest: str
    content: str

    def prepare_data(self) -> None:
        """Tokenise the set once, before the other processes of this machine read it from the cache."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Read, split and tokenise the set, once; ``stage`` makes no difference."""
        if self.parts:
            return
        parts = self.build()
        for split, part in parts.items():
            if not len(part):
                raise KdError(f"the {split} split has no rows")
        if self.drop_last and len(parts["train"]) < self.batch_size:
            raise KdError(
                f"data.drop_last = true leaves no batch: {len(parts['train']):,} training rows are fewer than "
                f"data.batch_size = {self.batch_size}"
            )
        self.parts = parts

    # ------------------------------------------------------------------ for subclasses

    def load_tokenizer(self, texts: Sequence[str], asked: int | None, key: str) -> None:
        """Make the tokenizer, and check the number of positions ``asked`` for by the option ``key``."""
        self.tokenizer, self.tokenizer_digest = tokenizers.tokenizer(
            self.spec, self.tokenizer_kind, lambda: texts, self.cache, self.root
        )
        own = tokenizers.most_tokens(self.tokenizer)
        if asked is not None and own is not None and asked > own:
            raise KdError(f"data.{key} = {asked} is not allowed: the tokenizer's networks take {own} tokens at most")
        self.most = asked or own
        self.special = Special.of(self.tokenizer)
        if self.masking is not None and self.special.mask is None:
            raise KdError(f"data.masking = {self.masking} needs a tokenizer with a mask token, data.tokenizer has none")

    def restrict_vocabulary(self, texts: Sequence[str]) -> None:
        """Restrict the tokenizer to what the training ``texts`` use, or networks to it, as ``vocabulary`` says."""
        if self.vocabulary == "tokenizer":
            self.restriction = unpadded(self.tokenizer, self.tokenizer_digest)
        elif self.vocabulary == "corpus":
            self.tokenizer, self.restriction = restrict(self.tokenizer, self.tokenizer_digest, texts, self.cache)
            self.tokenizer_digest, self.special = tokenizers.digest(self.tokenizer), Special.of(self.tokenizer)

    def tokens(self, key: str, make: Any, tokenizer: str | None = None) -> store.Tokens:
        """Return token ids, from the cache if they are there; ``key``: digest of the texts and settings.

        ``tokenizer``: the digest of the one whose ids alone they are; None: rows as the data's cuts and types them.
        """
        whole = tokenizer or tokenizers.encoding_digest(self.tokenizer, self.tokenizer_digest)
        return store.cached(self.cache, f"{key}-{whole}", make, store.Tokens)

    def shrunk(self, train: Any) -> Any:
        """Return no more than ``train_size`` rows, stratified by their classes."""
        if self.train_size is None:
            return train
        if self.train_size > len(train):
            raise KdError(f"data.train_size = {self.train_size} is not allowed: there are {len(train):,} training rows")
        targets = train.targets if not train.targets.is_floating_point() else torch.zeros(len(train)).long()
        classes = torch.where(targets == UNLABELLED, int(targets.max()) + 1, targets)
        return train.take(stratified(classes, self.train_size, self.seed, "train_size")[0])

    def describe(self, texts: Mapping[str, TextContent], more: bytes) -> None:
        """Set the digest of all texts; ``more``: of labels and class names."""
        self.content = content.digest(list(texts.values()), more)
        self.digest = self.content

    # ------------------------------------------------------------------ what a run needs

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer: those of an embedding table."""
        self.setup()
        return len(self.tokenizer)

    @property
    def pad_token_id(self) -> int:
        """The id of pads."""
        self.setup()
        return self.special.pad

    @property
    def input_shape(self) -> tuple[int]:
        """Positions of the longest row that there can be."""
        self.setup()
        return (self.most or self.longest,)

    @property
    def longest(self) -> int:
        """Positions of the longest row that there is."""
        more = len(self.form.before) + len(self.form.after)
        return more + max(int((part.end - part.begin).max()) for part in self.parts.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Rows in train, val and test, and ``labelled``: those of train that have a target."""
        self.setup()
        train = self.parts["train"]
        classes = self.has_labels and not train.targets.is_floating_point()
        labelled = int((train.targets != UNLABELLED).sum()) if classes else len(train)
        return {**{name: len(part) for name, part in self.parts.items()}, "labelled": labelled}

    @property
    def train_index(self) -> Tensor:
        """Index (n,) int64 of the training rows."""
        self.setup()
        return self.parts["train"].index

    @property
    def train_targets(self) -> Tensor | None:
        """Classes (n,) int64 of the training rows, by :attr:`train_index`; None where tokens are targets."""
        self.setup()
        return self.parts["train"].targets if self.has_labels else None

    @property
    def has_labels(self) -> bool:
        """Whether the target of a row is its label; else its tokens are the targets."""
        return self.form.targets == "labels"

    def example(self) -> dict[str, Tensor]:
        """Return inputs of one row of full length, a batch of one, all of one ordinary token."""
        (width,) = self.input_shape
        ids = torch.full((1, width), int(self.special.ordinary[0]))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @property
    def title(self) -> str:
        """What people call the set: in reports."""
        first = self.given["train"]
        return self.own_title or (Path(first).stem if isinstance(first, (str, Path)) else type(self).__name__)

    @property
    def split_facts(self) -> dict[str, Any]:
        """What decides which text is in which split: two runs of one set with equal facts share their splits."""
        self.setup()
        fractions = {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction}
        return {"set": f"{self.title} {self.digest}", "split_seed": self.split_seed, **fractions}

    @property
    def random_view(self) -> str | None:
        """The option that gives a teacher another view of a text in every epoch; None: it sees the same one."""
        return "data.masking" if self.masking is not None else None

    @property
    def seen(self) -> dict[str, Any]:
        """What weights record of the texts of train and val, see :func:`kd.data.content.seen`."""
        self.setup()
        return content.seen([self.parts["train"].rows, self.parts["val"].rows])

    def seen_in_test(self, recorded: Mapping[str, Any]) -> list[str]:
        """Name the test texts that are among those of another run's :attr:`seen`."""
        self.setup()
        return content.overlap(recorded, self.parts["test"].rows, [self.parts["train"].rows, self.parts["val"].rows])

    def copies_in_test(self) -> int:
        """Count the texts of test that are in train as well."""
        self.setup()
        train, test = (self._numbers(split) for split in ("train", "test"))
        return int(np.isin(test, train).sum())

    def _numbers(self, split: str) -> np.ndarray:
        rows = self.parts[split].rows
        return rows.content.sizes()[rows.positions.numpy()]

    def train_dataloader(self) -> Loader:
        """Return batches of train, shuffled; those of several ranks together are those of one process."""
        return self._loader("train")

    def answering_dataloader(self) -> Loader:
        """Return all training rows once, in order, on this rank: for a teacher whose answers are computed only once."""
        whole = {"batch_size": self.eval_batch_size, "shuffle": False, "drop_last": False, "rank": 0, "world_size": 1}
        return self._loader("train", **whole)

    def val_dataloader(self) -> Loader:
        """Return batches of val, in order, each row on one rank only."""
        return self._loader("val")

    def test_dataloader(self) -> Loader:
        """Return batches of test, in order, each row on one rank only."""
        return self._loader("test")

    def _loader(self, split: str, **changed: Any) -> Loader:
        self.setup()
        train = split == "train"
        world_size = self.trainer.world_size if self.trainer is not None else 1
        if train and self.batch_size % world_size:
            raise KdError(f"recipe.batch_size = {self.batch_size} cannot be split over {world_size} processes evenly")
        options = {
            "batch_size": self.batch_size // world_size if train else self.eval_batch_size,
            "train": train,
            "seed": self.seed,
            "shuffle": train and self.shuffle,
            "drop_last": self.drop_last,
            "rank": self.trainer.global_rank if self.trainer is not None else 0,
            "world_size": world_size,
        }
        return self.make_loader(split, **{**options, **changed})

    def make_loader(self, split: str, **options: Any) -> Loader:
        """Make the loader of one split."""
        return TextLoader(self.parts[split], form=self.form, bucketing=self.bucketing, split=split, **options)
