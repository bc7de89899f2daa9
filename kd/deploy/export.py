"""Export of a run's student: a folder that works without ``kd``, whose answers were compared with those of the run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd.deploy import model_card, onnx_runtime
from kd.deploy.formats import FORMATS, MODEL_FILES, Answer
from kd.deploy.student import FromRaw, Raw, Student, from_raw
from kd.distill.evaluation import measure
from kd.errors import KdError, named
from kd.losses.base import Batch, Output
from kd.records import record
from kd.records.durable import share
from kd.run import build
from kd.tasks.base import Want

COMPARED = 64  # samples whose answers are compared, at least, where the test split has as many
CALIBRATION = 256  # training samples that static quantisation reads
INT8 = "model_int8.onnx"


@dataclass(frozen=True)
class Options:
    """What to write: ``form``, a key of ``FORMATS``; ``quantize``: dynamic, static or None, of ONNX.

    ``tolerance``: largest difference of a logit that is allowed, as a share of the largest one where that is above 1.
    ``opset``: of ONNX, None: the exporter's own.
    """

    form: str
    quantize: str | None = None
    tolerance: float = 1e-4
    opset: int | None = None


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, bytes of its model files, the largest difference to the run and its limit.

    ``compared``: samples of the test split; ``accuracy``: metric → model file → value on the test split, of int8.
    """

    folder: Path
    files: Mapping[str, int]
    difference: float
    allowed: float
    compared: int
    metric: str = ""
    accuracy: Mapping[str, float] = field(default_factory=dict)


def export(given: Student, options: Options, out: Path) -> Exported:
    """Write the folder ``out``, complete or not at all.

    ``KdError``: it is there already, the format cannot hold this student, or its answers to samples of the test split
    differ by more than the tolerance.
    """
    if out.exists():
        raise KdError(f"out = {out} is there already: give another folder, or delete it")
    data = build.datamodule(given.config)
    data.setup("test")
    batches = _batches(data)
    if not batches:
        raise KdError(f"run = {given.run} has no test split to compare the export on")
    module = from_raw(given, batches[0].inputs)
    example = module.raw(batches[-1].few(2).inputs)
    with _folder(out) as temporary:
        answer = FORMATS[options.form](given, module, example, temporary, options.opset)
        for written in temporary.glob("*.safetensors"):
            share(written)
        difference, allowed = compare(module, answer, batches, options)
        accuracy = _quantised(given, module, data, temporary, options) if options.quantize else {}
        file = INT8 if options.quantize else MODEL_FILES.get(options.form, "model.safetensors")
        described = preprocessing(given, module, inside=options.form in MODEL_FILES)
        _write_json(temporary / "preprocessing.json", described)
        _write_json(temporary / "labels.json", given.class_names)
        if given.tokenizer is not None:
            given.tokenizer.save_pretrained(temporary)
        files = {f.name: f.stat().st_size for f in sorted(temporary.iterdir()) if f.name.startswith("model")}
        count, metric = sum(len(batch) for batch in batches[1:]), given.task.metrics[0].name
        made = Exported(out, files, difference, allowed, count, metric, accuracy)
        if options.form == "onnx":
            record.write_text(temporary / "run_onnx.py", model_card.script(given, file))
        record.write_text(temporary / "README.md", model_card.card(given, made, options, described))
    return made


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the name ``out`` at the end, and is deleted after an error."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, out)
    except OSError as error:
        raise named(error, out) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _batches(data: Any) -> list[Batch]:
    """Return the first samples of the test split: the first one alone, then batches, so that sizes differ."""
    found: list[Batch] = []
    for batch in data.test_dataloader():
        found += [batch.few(1)] if not found else []
        found.append(batch.few(COMPARED))
        if sum(map(len, found[1:])) >= COMPARED:
            break
    return found


def compare(module: FromRaw, answer: Answer, batches: list[Batch], options: Options) -> tuple[float, float]:
    """Return the largest difference to the run's own answers, and what is allowed. ``KdError`` above it."""
    largest, size = 0.0, 1.0
    for batch in batches:
        expected = module.reference(batch.inputs).numpy()
        found = answer(module.raw(batch.inputs))
        if found.shape != expected.shape:
            raise KdError(
                f"format = {options.form} is refused: it answers {found.shape} where the run answers {expected.shape}"
            )
        gap = float(np.abs(found - expected).max(initial=0.0))
        largest = max(largest, gap if np.isfinite(gap) else float("inf"))
        size = max(size, float(np.abs(expected).max(initial=0.0)))
    allowed = options.tolerance * size
    if largest > allowed:
        raise KdError(
            f"format = {options.form} is refused: its answers differ from the run's by {largest:.3g}, at most "
            f"{allowed:.3g} is allowed (tolerance = {options.tolerance:g})"
        )
    return largest, allowed


def _quantised(given: Student, module: FromRaw, data: Any, folder: Path, options: Options) -> dict[str, float]:
    """Write the int8 file; return the main metric of both files on the test split, by onnxruntime."""
    plain = folder / MODEL_FILES["onnx"]
    assert options.quantize is not None
    onnx_runtime.quantise(plain, folder / INT8, options.quantize, _calibration(module, data))
    return {file.name: measured(given, module, data, onnx_runtime.answers(file)) for file in (plain, folder / INT8)}


def _calibration(module: FromRaw, data: Any) -> Iterator[Raw]:
    """Yield training samples, one at a time; of several views of each image the first one."""
    view = {"view": 0} if getattr(data, "views", 1) > 1 else {}
    samples = (one for batch in data.answering_dataloader(**view) for one in _singles(module.raw(batch.inputs)))
    return islice(samples, CALIBRATION)


def _singles(raw: Raw) -> Iterator[Raw]:
    for place in range(len(next(iter(raw.values())))):
        yield {name: values[place : place + 1] for name, values in raw.items()}


def measured(given: Student, module: FromRaw, data: Any, answer: Answer) -> float:
    """Return the task's main metric on the test split, through the run's own data and metrics.

    ``KdError`` for a task of tokens or embeddings.
    """
    if given.answers not in ("classes", "mask", "number"):
        raise KdError(f"quantize needs a task of classes or numbers, as its accuracy is measured: not {given.answers}")

    def exported(inputs: Any = None, **of_texts: Any) -> torch.Tensor:
        return torch.from_numpy(answer(module.raw(of_texts or inputs)))

    def network(batch: Batch) -> Output:
        return given.task.answer(exported, batch.inputs, batch, Want())  # type: ignore[arg-type]

    who = "the exported student"
    found, _ = measure(given.task, data.num_classes, network, data.test_dataloader(), torch.device("cpu"), who=who)
    return found[given.task.metrics[0].name]


def preprocessing(given: Student, module: FromRaw, inside: bool) -> dict[str, Any]:
    """Say how raw inputs are made of files or texts; ``inside``: whether the model normalises by itself."""
    found: dict[str, Any] = {"inputs": list(module.names), "answers": given.answers}
    if given.images:
        channels, height, width = given.facts["input_shape"]
        edge = round(height / (given.config["data"].get("crop_pct") or 1.0))
        cropped = height == width and given.answers != "mask"
        square = {"shorter_edge": edge, "interpolation": "bicubic"} if cropped else {"interpolation": "bilinear"}
        found |= {"mode": "L" if channels == 1 else "RGB", "shape": [channels, height, width], **square}
        found |= {"mean": given.facts["mean"], "std": given.facts["std"], "normalised_by_the_model": inside}
    elif given.tokenizer is not None:
        found |= {"max_length": given.config["data"].get("max_length"), "pairs": given.pairs}
        found |= {"pooling": given.network.pooling} if hasattr(given.network, "pooling") else {}
    else:
        found["shape"] = list(given.facts.get("input_shape") or ())
    return found


def _write_json(file: Path, content: Any) -> None:
    record.write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
