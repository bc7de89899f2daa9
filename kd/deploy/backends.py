"""The ways to run a network that ``kd bench`` compares: PyTorch eager, compiled and in bf16, ONNX Runtime, OpenVINO."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.deploy import onnx_runtime
from kd.deploy.subjects import Subject
from kd.errors import KdError

Inputs = Mapping[str, Tensor]
Run = Callable[[Inputs], Callable[[], Any]]  # a batch → one pass over it, without arguments


def eager(subject: Subject, device: torch.device, folder: Path, length: int, threads: int) -> Run:
    """Run it as it is, in float32."""
    return _of_torch(subject.module.to(device), device)


def compiled(subject: Subject, device: torch.device, folder: Path, length: int, threads: int) -> Run:
    """Run it compiled by ``torch.compile``, in float32."""
    return _of_torch(torch.compile(copy.deepcopy(subject.module).to(device)), device)


def bf16(subject: Subject, device: torch.device, folder: Path, length: int, threads: int) -> Run:
    """Run it with weights and activations in bfloat16."""
    module: Any = copy.deepcopy(subject.module).to(device)
    module.network.bfloat16()
    module.network.register_forward_pre_hook(_to_bfloat16, with_kwargs=True)
    return _of_torch(module, device)


def onnx(subject: Subject, device: torch.device, folder: Path, length: int, threads: int) -> Run:
    """Run it by ONNX Runtime on the CPU, in float32."""
    return _of_onnx(_written(subject, folder, length), threads)


def int8(subject: Subject, device: torch.device, folder: Path, length: int, threads: int) -> Run:
    """Run it by ONNX Runtime on the CPU with dynamic int8."""
    file = _written(subject, folder, length)
    small = file.with_name(f"int8_{file.name}")
    if not small.exists():
        onnx_runtime.quantise(file, small, "dynamic")
    return _of_onnx(small, threads)


def openvino(subject: Subject, device: torch.device, folder: Path, length: int, threads: int) -> Run:
    """Run the ONNX file by OpenVINO on the CPU."""
    import openvino as library

    model = library.Core().compile_model(
        str(_written(subject, folder, length)), "CPU", {"INFERENCE_NUM_THREADS": threads}
    )

    def run(inputs: Inputs) -> Callable[[], Any]:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        return lambda: model(arrays)

    return run


BACKENDS = {"eager": eager, "compiled": compiled, "bf16": bf16, "onnx": onnx, "int8": int8, "openvino": openvino}


def installed() -> list[str]:
    """Return the backends whose libraries are here."""
    lacking = {"onnx", "int8", "openvino"} if any(find_spec(name) is None for name in onnx_runtime.EXTRA) else set()
    lacking |= set() if find_spec("openvino") else {"openvino"}
    return [name for name in BACKENDS if name not in lacking]


def prepared(name: str, subject: Subject, device: torch.device, folder: Path, length: int, threads: int) -> Run:
    """Make a backend's form of a network. ``KdError`` says why it cannot be had."""
    if name in ("onnx", "int8", "openvino"):
        onnx_runtime.needed(f"backends = {name}")
    if name == "openvino" and find_spec("openvino") is None:
        raise KdError("backends = openvino needs openvino: pip install openvino")
    return BACKENDS[name](subject, device, folder, length, threads)


def _of_torch(module: Any, device: torch.device) -> Run:
    def run(inputs: Inputs) -> Callable[[], Any]:
        given = {name: tensor.to(device) for name, tensor in inputs.items()}

        def one() -> Any:
            with torch.inference_mode():
                return module(**given)

        return one

    return run


def _of_onnx(file: Path, threads: int) -> Run:
    opened = onnx_runtime.session(file, threads)

    def run(inputs: Inputs) -> Callable[[], Any]:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        return lambda: opened.run(None, arrays)

    return run


def _written(subject: Subject, folder: Path, length: int) -> Path:
    """Write the ONNX file of a network once."""
    file = folder / "model.onnx"
    if not file.exists():
        onnx_runtime.write(copy.deepcopy(subject.module).cpu(), subject.example(2, length), file, None, {})
    return file


def _to_bfloat16(module: Any, args: Any, kwargs: Any) -> Any:
    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.bfloat16() if floating else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}
