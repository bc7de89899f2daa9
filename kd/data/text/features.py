"""Sentences as the vectors of a frozen encoder: many classes for small networks, without a transformer in the loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kd.config.rules import refusals, refuse
from kd.data.content import Rows
from kd.data.images.loader import Loader
from kd.data.text import store
from kd.data.text.clinc import Clinc
from kd.data.text.content import TextContent, digest_of
from kd.data.text.encoder import Encoder
from kd.data.text.options import RULES
from kd.data.text.sentences import Sentences, Texts
from kd.errors import KdError
from kd.losses.base import Batch

log = logging.getLogger(__name__)

BATCH = 64  # texts that are encoded at once


@dataclass(frozen=True)
class Vectors:
    """One split: ``inputs`` (n, width) float32, with targets and stable ``index`` (n,); ``rows``: its texts."""

    inputs: Tensor
    targets: Tensor
    index: Tensor
    rows: Rows

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, chosen: Tensor) -> Vectors:
        """Return the part made of these rows (n,) int64."""
        return replace(
            self,
            inputs=self.inputs[chosen],
            targets=self.targets[chosen],
            index=self.index[chosen],
            rows=self.rows._replace(positions=self.rows.positions[chosen]),
        )

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Give all numbers that the inputs are made of, by name: for a digest of them."""
        yield "inputs", self.inputs.numpy()


class VectorLoader(Loader):
    """Batches of vectors (B, width) float32 in memory."""

    def __init__(self, part: Vectors, batch_size: int, **options: Any) -> None:
        super().__init__(part.targets, part.index, batch_size, **options)
        self.inputs = part.inputs

    def fetch(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        """Make one batch of each tensor of rows."""
        for rows in batches:
            inputs, targets = self.inputs.index_select(0, rows), self.targets.index_select(0, rows)
            yield Batch(inputs, targets, self.index.index_select(0, rows))


class SentenceFeatures(Sentences):
    """The same texts, classes and splits as :class:`Sentences`, each text one vector (width,) float32.

    All texts of the set are encoded once and kept in ``cache``, whatever ``split_seed`` says later. After ``setup``
    ``input_shape`` is (width,), for ``model=mlp``; the task is ``classification``.

    ``encoder``: folder of an encoder of ``transformers``, or its name on the hub; it brings its tokenizer along
    ``pooling``: ``mean`` over the positions of the mask, or the first position (``cls``)
    ``normalise``: scale each vector to length 1
    """

    encoder_digest: str
    width: int

    def __init__(
        self, *, encoder: str | None = None, pooling: str = "mean", normalise: bool = False, **common: Any
    ) -> None:
        super().__init__(**common)
        refuse(refusals("data.", locals(), RULES))
        for key, value in (("tokenizer", self.spec), ("masking", self.masking)):
            if value is not None:
                raise KdError(f"data.{key} = {value} is not allowed: the features of data.encoder have no tokens")
        self.encoder, self.pooling, self.normalise = encoder, pooling, normalise

    has_labels = True

    def build(self) -> dict[str, Any]:
        """Read, split, and encode what no run has encoded before."""
        if self.encoder is None:
            raise KdError(
                "data.encoder = null is not allowed: it must be the folder of an encoder of transformers, or its name "
                "on the Hugging Face hub"
            )
        encoder = Encoder(self.encoder, self.root, self.pooling)
        files = encoder.digest()
        self.encoder_digest = f"{files} {self.pooling}{' normalised' if self.normalise else ''}"
        splits = self.divided()
        place: dict[tuple[str, str | None], int] = {}
        for part in self.texts.values():
            for text in _pairs(part):
                place.setdefault(text, len(place))
        values = torch.from_numpy(np.array(self._encoded_texts(encoder, files, list(place)).values))
        if self.normalise:
            values = F.normalize(values, dim=1)
        self.width = values.shape[1]
        parts = {split: self._vectors(split, values, place, *splits[split]) for split in ("train", "val", "test")}
        return {**parts, "train": self.withheld(self.shrunk(parts["train"]))}

    def _encoded_texts(self, encoder: Encoder, files: str, texts: list[tuple[str, str | None]]) -> store.Features:
        first = [one for one, _ in texts]
        second = [other for _, other in texts if other is not None] or None
        key = digest_of([*first, *(second or ())], "features 1", second is not None, self.max_length, self.pooling)
        make = lambda: encoder.encode(first, second, self.max_length, BATCH)  # noqa: E731
        return store.cached(self.cache, f"{key}-{files}", make, store.Features)

    @staticmethod
    def _vectors(
        split: str, values: Tensor, place: dict[tuple[str, str | None], int], texts: Texts, targets: Tensor
    ) -> Vectors:
        rows = torch.tensor([place[text] for text in _pairs(texts)], dtype=torch.int64)
        keys = TextContent(texts.keys(), f"text of {split},")
        return Vectors(values[rows], targets, texts.index, Rows(keys, torch.arange(len(texts))))

    @property
    def input_shape(self) -> tuple[int]:
        """Width of a vector."""
        self.setup()
        return (self.width,)

    def example(self) -> Any:
        """Return a vector of zeros, a batch of one."""
        return torch.zeros(1, *self.input_shape)

    def make_loader(self, split: str, **options: Any) -> Loader:
        """Make the loader of one split."""
        return VectorLoader(self.parts[split], **options)


class ClincFeatures(SentenceFeatures, Clinc):
    """The 150 intents of CLINC150, as :class:`~kd.data.text.clinc.Clinc` reads them."""

    def __init__(self, *, file: str = "clinc150/data_full.json", **common: Any) -> None:
        super().__init__(file=file, **common)


def _pairs(texts: Texts) -> Iterator[tuple[str, str | None]]:
    second: Sequence[str | None] = texts.second or [None] * len(texts)
    return zip(texts.first, second, strict=True)
