"""A trained network on new inputs: ``kd.load(RUN).predict(…)``, ``kd predict``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.data.images.files import decode, eval_transform
from kd.data.images.loader import affine, normalise
from kd.deploy.inputs import chunks
from kd.deploy.student import WEIGHTS, Student, recorded, student
from kd.errors import KdError, did_you_mean
from kd.losses.base import Batch
from kd.run import networks
from kd.tasks.base import Want

TEXTS = ("sequence_classification", "sequence_regression")


@dataclass(frozen=True)
class Prediction:
    """What a network answers to one input.

    ``input``: the file, or the text (a pair: its first one). ``label``: the class with the largest probability, None of
    a regression; the text of an answer to a question; ``probability``: of that class or answer, or the number of a
    regression. ``probabilities``: of each class by its name, in the order of the classes; empty of a regression and of
    answers. ``error``: why there is no answer, else "".
    """

    input: str
    label: str | None
    probability: float
    probabilities: Mapping[str, float] = field(default_factory=dict, repr=False)
    error: str = ""

    def top(self, count: int) -> list[tuple[str, float]]:
        """Return the ``count`` likeliest classes, the first one first."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])[:count]


class Predictor:
    """A run's student or teacher with all that it needs for new inputs: pre-processing and the names of the classes.

    ``spans``: whether a label is a part of the input (answers to questions), and no class.

    ``answer``: from prepared inputs to logits (B, classes); ``class_names``; ``prepare``: from inputs as they come to
    prepared ones. Made by :func:`load`.
    """

    def __init__(
        self, answer: Callable[[Any], Tensor], prepare: Callable[[Sequence[Any]], Any], facts: Mapping[str, Any]
    ) -> None:
        self.answer, self.prepare = answer, prepare
        self.spans = False
        self.class_names: list[str] = list(facts.get("class_names") or [])
        self.regression: bool = facts["regression"]
        self.reads_texts: bool = facts["reads_texts"]
        self.pairs: bool = facts["pairs"]
        self.columns: tuple[str, ...] = facts["columns"]

    def predict(self, inputs: Sequence[Any], batch_size: int = 32, skip_unreadable: bool = False) -> list[Prediction]:
        """Answer inputs, in their order.

        ``inputs``: of images files, PIL images, or tensors (C, H, W) uint8; of texts strings, of pairs tuples of two.
        ``skip_unreadable``: an image that cannot be read is answered with its ``error``, and the rest goes on.
        ``KdError`` for an image that cannot be read, and inputs of another kind.
        """
        return list(self.stream(inputs, batch_size, skip_unreadable))

    def stream(
        self, inputs: Sequence[Any], batch_size: int = 32, skip_unreadable: bool = False
    ) -> Iterator[Prediction]:
        """Answer inputs as :meth:`predict`, one after the other, a batch computed at a time."""
        if isinstance(inputs, (str, Path)):
            raise KdError("predict takes a list of inputs, not one: predict([input])")
        for part in chunks(inputs, batch_size):
            some = inputs[part]
            errors: dict[int, str] = {}
            prepared = self.prepare(some) if not skip_unreadable else self._readable(some, errors)
            logits = self.answer(prepared).float().cpu() if len(errors) < len(some) else torch.zeros(0, 1)
            rows = iter(logits if self.regression else logits.softmax(1))
            for place, item in enumerate(some):
                name = str(item[0] if isinstance(item, tuple) else item)
                if place in errors:
                    yield Prediction(name, None, float("nan"), error=errors[place])
                else:
                    yield self._prediction(name, next(rows))

    def _readable(self, some: Sequence[Any], errors: dict[int, str]) -> Any:
        """Prepare the inputs that can be read one by one, and note the others in ``errors``."""
        found = []
        for place, item in enumerate(some):
            try:
                found.append(self.prepare([item]) if not self.reads_texts else item)
            except KdError as error:
                errors[place] = str(error)
        if self.reads_texts:
            return self.prepare(found)
        return torch.cat(found) if found else None

    def _prediction(self, name: str, row: Tensor) -> Prediction:
        if self.regression:
            return Prediction(name, None, float(row[0]))
        names = self.class_names or [str(number) for number in range(len(row))]
        best = int(row.argmax())
        return Prediction(name, names[best], float(row[best]), dict(zip(names, row.tolist(), strict=True)))


def load(run: str | Path, who: str = "student", weights: str = "selected") -> Predictor:
    """Load a run's network for new inputs; its data is not read.

    ``run``: its directory; ``who``: ``student`` or ``teacher``; ``weights``: of the student, ``selected`` by validation
    or of the ``last`` epoch. It lies on a GPU where there is one, unless the run was on the CPU.

    ``KdError``: no such run or weights, a task whose answers are neither classes nor numbers, weights that are not
    those of the run's record. A student that keeps parts of its terms (SimKD) is made as in its run, from its data.
    """
    for key, value, allowed in (("who", who, ("student", "teacher")), ("weights", weights, tuple(WEIGHTS))):
        if value not in allowed:
            near = did_you_mean(value, allowed)
            raise KdError(f"{key} = {value} is not allowed: it must be {' or '.join(allowed)}{near}")
    given = student(run, weights)
    config, task = given.config, given.task
    if task.architecture == "question_answering":
        from kd.deploy.answering import AnswerPredictor  # start-up: of one task; it is made of what is here

        positions = _answer(given, who)
        return AnswerPredictor(lambda tokens: positions(tokens).unflatten(0, (-1, 2)), given.tokenizer, config, task)
    reads_texts = task.architecture in TEXTS
    if task.architecture is not None and not reads_texts:
        kind = task.architecture
        hint = f" (kd generate model={run})" if kind == "causal_lm" else ""
        raise KdError(f"run = {run} is of a {kind} network, which answers no classes{hint}")
    if given.answers == "mask":
        raise KdError(
            f"run = {run} answers masks, and kd predict writes a class or a number: kd export {run} format=onnx makes "
            "run_onnx.py, which writes the mask of an image"
        )
    if config["data"].get("encoder"):
        raise KdError(f"run = {run} was trained on features of data.encoder: kd predict reads texts and images")
    columns = tuple(config["data"].get(key) or key for key in ("text", "text_pair")[: 1 + given.pairs])
    facts = {"regression": task.regression, "reads_texts": reads_texts, "pairs": given.pairs, "columns": columns}
    facts["class_names"] = given.class_names
    answer = _answer(given, who)
    if reads_texts:
        return Predictor(answer, _of_texts(given.tokenizer, config["data"].get("max_length"), given.pairs), facts)
    return Predictor(answer, _of_images(given.facts, config), facts)


def _answer(given: Student, who: str) -> Callable[[Any], Tensor]:
    """Return what answers prepared inputs with logits, on a GPU where there is one and the run was not on the CPU."""
    cuda = torch.cuda.is_available() and given.config["hardware"]["accelerator"] != "cpu"
    device = torch.device("cuda" if cuda else "cpu")
    if who == "teacher":
        teacher = networks.teacher(given.config, recorded(given.facts, given.tokenizer), given.task)
        if teacher is None or not teacher.live:
            raise KdError(f"run = {given.run} has no teacher that answers new inputs")
        measured = teacher.to(device).measured
    else:
        network = given.network.to(device)

    @torch.inference_mode()
    def answer(inputs: Any) -> Tensor:
        batch = Batch(inputs, None).to(device)
        if who == "teacher":
            return measured(batch).logits
        return given.task.answer(network, batch.inputs, batch, Want()).logits

    return answer


def _of_texts(tokenizer: Any, longest: int | None, pairs: bool) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
    def prepare(some: Sequence[Any]) -> dict[str, Tensor]:
        kinds = (tuple, list) if pairs else str
        wrong = next((item for item in some if not isinstance(item, kinds)), None)
        if wrong is not None:
            raise KdError(f"the run was trained on {'pairs of texts' if pairs else 'texts'}, this is none: {wrong!r}")
        columns = list(map(list, zip(*some, strict=True))) if pairs else [list(some)]
        made = tokenizer(
            *columns,
            padding=True,
            truncation=longest is not None,
            max_length=longest,
            return_tensors="pt",
            return_token_type_ids=pairs and "token_type_ids" in tokenizer.model_input_names,
        )
        return dict(made)

    return prepare


def _of_images(facts: Mapping[str, Any], config: Mapping[str, Any]) -> Callable[[Sequence[Any]], Tensor]:
    from torchvision.transforms import v2

    shape = tuple(facts.get("input_shape") or ())
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise KdError(f"the run's inputs have the shape {shape}: kd predict reads images of 1 or 3 channels, and texts")
    square = eval_transform(shape[1], config["data"].get("crop_pct") or 1.0)
    steps = [square] if shape[1] == shape[2] else [v2.Resize(shape[1:]), v2.PILToTensor()]
    # grey first, by PIL, which keeps levels that are grey already; of tensors torchvision's weights lose one
    transform = v2.Compose([v2.Grayscale(1), *steps] if shape[0] == 1 else steps)
    scale, shift = affine(facts.get("mean") or [0.0], facts.get("std") or [1.0])

    def one(item: Any) -> Tensor:
        if isinstance(item, (str, Path)):
            return decode(Path(item), transform)
        if isinstance(item, Tensor):
            if item.dtype != torch.uint8 or tuple(item.shape) != shape:
                kind = f"{item.dtype} {tuple(item.shape)}"
                raise KdError(f"an image of {kind} is not allowed: it must be uint8 {shape}, or a PIL image, or a file")
            return item
        made: Tensor = transform(item.convert("RGB"))
        return made

    return lambda some: normalise(torch.stack([one(item) for item in some]), scale, shift)
