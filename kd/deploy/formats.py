"""The formats of ``kd export``: each writes a folder, loads it again without ``kd``, and returns what answers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd.deploy import onnx_runtime
from kd.deploy.student import FromRaw, Raw, Student
from kd.errors import KdError
from kd.records import record

TIMM = "kd.models.timm_model.timm_model"
Answer = Callable[[Raw], np.ndarray]  # raw inputs to answers
MODEL_FILES = {"onnx": "model.onnx", "torch-export": "model.pt2"}  # of the other formats model.safetensors


def safetensors(given: Student, module: FromRaw, example: Raw, folder: Path, opset: int | None) -> Answer:
    """Write the plain state dict, and what makes the network as ``network.json``."""
    state = {name: tensor.contiguous().clone() for name, tensor in given.network.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if given.node is not None:
        record.write_text(folder / "network.json", json.dumps(given.node, indent=2) + "\n")
    loaded = copy.deepcopy(module)
    loaded.network.load_state_dict(load_file(folder / "model.safetensors"))
    return _by_torch(loaded)


def timm(given: Student, module: FromRaw, example: Raw, folder: Path, opset: int | None) -> Answer:
    """Write a folder for ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""
    import timm as library
    from timm.models import save_for_hf

    if given.node is None or given.node.get("_target_") != TIMM:
        kind = type(given.network).__name__
        raise KdError(f"format = timm is not possible: the student is a {kind}, made by another library (try onnx)")
    shape = tuple(given.facts["input_shape"])
    data = {"input_size": shape, "interpolation": "bicubic", "crop_pct": given.config["data"].get("crop_pct") or 1.0}
    data |= {name: tuple(given.facts[name]) for name in ("mean", "std") if given.facts.get(name)}
    if getattr(given.network, "pruned", None):
        raise KdError(
            "format = timm is not possible: student.model.prune cut the network, timm makes whole ones (try onnx)"
        )
    save_for_hf(
        given.network,
        str(folder),
        model_config={"label_names": given.class_names},
        safe_serialization=True,
        data_config=data,
    )
    loaded = copy.deepcopy(module)
    loaded.network = library.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return _by_torch(loaded)


def hf(given: Student, module: FromRaw, example: Raw, folder: Path, opset: int | None) -> Answer:
    """Write a folder for ``transformers.AutoModel….from_pretrained(FOLDER)``, the tokenizer with it."""
    if given.tokenizer is None:
        kind = type(given.network).__name__
        raise KdError(f"format = hf is not possible: the student is a {kind}, none of transformers (try timm or onnx)")
    from kd.models.transformers_model import AUTO, library_network, merged  # start-up: transformers

    if library_network(given.network) is None:
        kind = type(given.network).__name__
        raise KdError(f"format = hf is not possible: the student is a {kind}, none of transformers (try onnx)")
    inner: Any = copy.deepcopy(merged(given.network))
    if given.class_names and len(given.class_names) == inner.config.num_labels:
        inner.config.id2label = dict(enumerate(given.class_names))
        inner.config.label2id = {name: number for number, name in enumerate(given.class_names)}
    inner.save_pretrained(folder, safe_serialization=True)
    loaded = copy.deepcopy(module)
    factory = AUTO[given.task.architecture or ""]
    read = factory.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32).eval()
    if hasattr(given.network, "pooling"):  # the encoder alone is of the library, its pooling is in the model card
        loaded.network.encoder = read
    else:
        loaded.network = read
    return _by_torch(loaded)


def onnx(given: Student, module: FromRaw, example: Raw, folder: Path, opset: int | None) -> Answer:
    """Write ``model.onnx``, from raw inputs to logits."""
    onnx_runtime.needed("format = onnx")
    file = folder / MODEL_FILES["onnx"]
    onnx_runtime.write(module, _tensors(example), file, opset, {"labels": given.class_names})
    return onnx_runtime.answers(file)


def torch_export(given: Student, module: FromRaw, example: Raw, folder: Path, opset: int | None) -> Answer:
    """Write ``model.pt2`` for ``torch.export.load``, from raw inputs to logits."""
    tensors, file = _tensors(example), folder / MODEL_FILES["torch-export"]
    dynamic: Any = torch.export.Dim.DYNAMIC
    shapes = {n: {0: dynamic, 1: dynamic} if t.dtype == torch.int64 else {0: dynamic} for n, t in tensors.items()}
    try:
        with onnx_runtime.quiet():
            program = torch.export.export(module, (), kwargs=tensors, dynamic_shapes=shapes)
            torch.export.save(program, file)
            loaded = torch.export.load(file).module()
    except Exception as error:  # of the many kinds of torch.export
        raise onnx_runtime.refusal("torch-export", error) from error
    return lambda raw: loaded(**_tensors(raw)).detach().numpy()


FORMATS: Mapping[str, Callable[[Student, FromRaw, Raw, Path, int | None], Answer]] = {
    "safetensors": safetensors,
    "timm": timm,
    "hf": hf,
    "onnx": onnx,
    "torch-export": torch_export,
}


def _tensors(raw: Raw) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values) for name, values in raw.items()}


def _by_torch(module: FromRaw) -> Answer:
    def answer(raw: Raw) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = module(**_tensors(raw)).numpy()
        return found

    return answer
