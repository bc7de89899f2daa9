"""A run's student as one network from raw inputs to its answers: bytes of images, ids of tokens, or vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd.config.hub import reason
from kd.data.images.loader import affine
from kd.errors import KdError
from kd.records.weight_files import LAST, SELECTED
from kd.run import build, described, integrity
from kd.run.evaluate import run_config, student_network
from kd.tasks.base import Task
from kd.tasks.segmentation import Segmentation

WEIGHTS = {"selected": SELECTED, "last": LAST}
TOKENS = ("input_ids", "attention_mask", "token_type_ids")  # what a network of texts is given, in this order
Raw = dict[str, np.ndarray]


@dataclass(frozen=True)
class Student:
    """A run's student in eval mode on the CPU, in float32, with the heads that its terms leave on it.

    ``node``: what makes its network; ``facts``: what its weights file says of the data; ``tokenizer``: None of images.
    """

    run: Path
    file: Path
    config: Mapping[str, Any]
    node: Mapping[str, Any] | None
    network: nn.Module
    task: Task
    facts: Mapping[str, Any]
    tokenizer: Any = None

    @property
    def pairs(self) -> bool:
        """Whether a sample is two texts."""
        pair = self.config["data"].get("text_pair") or self.task.architecture == "question_answering"
        return self.tokenizer is not None and bool(pair)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, [] of a task without any."""
        return [] if self.task.regression else list(self.facts.get("class_names") or [])

    @property
    def answers(self) -> str:
        """What an output row is: ``classes``, a ``mask``, a ``number``, an ``embedding``, ``tokens``, ``positions``."""
        if self.task.row == "pixel":
            return "mask"
        if self.task.regression:
            return "number"
        kinds = {"masked_lm": "tokens", "causal_lm": "tokens", "embedding": "embedding"}
        kinds |= {"question_answering": "positions"}
        return kinds.get(self.task.architecture or "", "classes")

    @property
    def images(self) -> bool:
        """Whether inputs are bytes of images: (C, H, W) with known statistics."""
        return self.tokenizer is None and len(self.facts.get("input_shape") or ()) == 3 and bool(self.facts.get("mean"))


def student(run: str | Path, which: str = "selected", overrides: Sequence[str] = ()) -> Student:
    """Load a run's student; its data is read only where terms keep a head on it (SimKD).

    ``which``: the weights ``selected`` by validation, or of the ``last`` epoch. ``overrides``: of the run's config.
    ``KdError``: no such run or weights, weights that are not those of the record, no tokenizer beside them.
    """
    config = run_config(run, overrides)
    file = Path(run) / WEIGHTS[which]
    if not file.is_file():
        raise KdError(f"run = {run} holds no {file.name}: it ended before its first validation, or is running")
    task = build.task(config)
    state, about = integrity.read_weights(file)
    facts = about.get("data") or {}
    tokenizer = _tokenizer(Path(run) / which) if task.architecture is not None else None
    node = config["student"]["model"]
    data: Any = recorded(facts, tokenizer)
    if about.get("heads"):
        node, data = None, build.datamodule(config)
    elif node is None or (tokenizer is not None and about.get("model")):  # the file says what became of it
        node = described.network(about.get("model"), str(file), () if node is None else (node["_target_"],))
    if node is not None and node.get("pretrained"):
        node = {**node, "pretrained": False}  # its weights are in the file
    network = student_network(config, data, task, node, (state, about, file))
    network.float().eval().requires_grad_(False)
    return Student(Path(run), file, config, node, network, task, facts, tokenizer)


def recorded(facts: Mapping[str, Any], tokenizer: Any) -> SimpleNamespace:
    """Return what networks ask of a data module, as it stands beside the weights."""
    return SimpleNamespace(
        num_classes=facts.get("num_classes"),
        mean=facts.get("mean"),
        std=facts.get("std"),
        class_names=list(facts.get("class_names") or []),
        input_shape=tuple(facts.get("input_shape") or ()),
        split_facts=dict(facts.get("split") or {}),
        tokenizer=tokenizer,
        tokenizer_digest=facts.get("tokenizer"),
    )


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer  # of texts alone

    if not (folder / "tokenizer_config.json").is_file():
        raise KdError(f"{folder} holds no tokenizer: the run ended before its first validation")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds: a file that is damaged, a library that it needs
        raise KdError(f"the tokenizer in {folder} cannot be loaded: {reason(error)}") from None


class FromRaw(nn.Module, ABC):
    """A student from raw inputs, tensors by their names, to its answers (samples, …).

    ``names``: of the inputs of ``forward``, in order. :meth:`raw` makes them of a batch's inputs as the data module
    prepares them.
    """

    names: tuple[str, ...]

    def __init__(self, given: Student) -> None:
        super().__init__()
        self.network, self._task = given.network, given.task

    def logits(self, answer: Any) -> Tensor:
        """Take the answers out of what the network returned. ``KdError`` where there are none."""
        found = self._task.logits(answer)
        if found is None:
            raise KdError(f"a {type(self.network).__name__} answers no logits: it cannot be exported with its inputs")
        return found

    def reference(self, inputs: Any) -> Tensor:
        """Compute what the network answers to a batch's inputs as the run prepares them."""
        kept = {name: inputs[name] for name in self.names} if isinstance(inputs, Mapping) else {}
        with torch.inference_mode():
            return self.logits(self.network(**kept, **self.more()) if kept else self.network(inputs))

    def more(self) -> dict[str, Any]:
        """Return further arguments of the network."""
        return {}

    @abstractmethod
    def raw(self, inputs: Any) -> Raw:
        """Make raw inputs of a batch's."""


class Pixels(FromRaw):
    """From ``images`` (B, C, H, W) uint8; the normalisation of the run, ``byte · scale + shift``, is inside."""

    names = ("images",)
    scale: Tensor
    shift: Tensor

    def __init__(self, given: Student) -> None:
        super().__init__(given)
        for name, values in zip(("scale", "shift"), affine(given.facts["mean"], given.facts["std"]), strict=True):
            self.register_buffer(name, values.view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise and answer."""
        return self.logits(self.network(images.float() * self.scale + self.shift))

    def raw(self, inputs: Any) -> Raw:
        """Return the bytes of normalised images; exact where they were bytes."""
        return {"images": ((inputs - self.shift) / self.scale).round().clamp(0, 255).to(torch.uint8).numpy()}


class Maps(Pixels):
    """From ``images`` (B, C, H, W) uint8 to logits of the classes at each of their pixels, (B, classes, H, W)."""

    def __init__(self, given: Student) -> None:
        super().__init__(given)
        assert isinstance(given.task, Segmentation)
        self._maps, self.size = given.task.maps, tuple(given.facts["input_shape"][1:])

    def logits(self, answer: Any) -> Tensor:
        """Return the maps, at the resolution of the images."""
        return self._maps(super().logits(answer), self.size)


class Vectors(FromRaw):
    """From ``inputs`` (B, …) float32, as they are."""

    names = ("inputs",)

    def forward(self, inputs: Tensor) -> Tensor:
        """Answer."""
        return self.logits(self.network(inputs))

    def raw(self, inputs: Any) -> Raw:
        """Return the same numbers."""
        return {"inputs": inputs.float().numpy()}


class Tokens(FromRaw):
    """From ``input_ids``, ``attention_mask`` and perhaps ``token_type_ids``, each (B, L) int64."""

    def __init__(self, given: Student, inputs: Mapping[str, Tensor]) -> None:
        super().__init__(given)
        self.names = tuple(name for name in TOKENS if name in inputs)
        self.causal = given.task.architecture == "causal_lm"

    def more(self) -> dict[str, Any]:
        """Have a decoder keep no keys and values: they would be further outputs."""
        return {"use_cache": False} if self.causal else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Answer."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.logits(self.network(input_ids=input_ids, attention_mask=attention_mask, **types, **self.more()))

    def raw(self, inputs: Any) -> Raw:
        """Return the ids."""
        return {name: inputs[name].numpy() for name in self.names}


def from_raw(given: Student, inputs: Any) -> FromRaw:
    """Make the network from raw inputs; ``inputs``: of a batch of the run's data."""
    if isinstance(inputs, Mapping):
        made: FromRaw = Tokens(given, inputs)
    else:
        kind = Maps if isinstance(given.task, Segmentation) else Pixels
        made = kind(given) if given.images else Vectors(given)
    return made.eval()
