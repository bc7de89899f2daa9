"""ONNX files: written by torch's exporter, answered by onnxruntime, quantised to int8 by its tools. Extra ``onnx``."""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd.errors import KdError

EXTRA = ("onnx", "onnxscript", "onnxruntime")
LARGE = 1_500_000_000  # bytes of weights above which they lie in a file of their own: protobuf ends at 2 GB
OPERATOR = re.compile(r"\b(?:aten|prims|torchvision|quantized)(?:[.:]+\w+)+")
INT8_OPS = ("Conv", "MatMul", "Gemm")


def needed(what: str) -> None:
    """Refuse ``what`` where the extra is not installed."""
    if lacking := [name for name in EXTRA if find_spec(name) is None]:
        raise KdError(f"{what} needs {' and '.join(lacking)}: pip install 'kd[onnx]'")


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what the libraries warn of: it concerns their own insides."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def write(
    module: nn.Module, example: Mapping[str, Tensor], file: Path, opset: int | None, about: Mapping[str, Any]
) -> None:
    """Write a module as ONNX with a dynamic batch, and length of tokens; ``about`` becomes its metadata.

    ``example``: raw inputs by name. ``KdError`` names the operator that ONNX lacks.
    """
    axes = {name: _axes(tensor) for name, tensor in example.items()}
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    try:
        with quiet():
            program = torch.onnx.export(
                module,
                kwargs=dict(example),
                dynamo=True,
                dynamic_shapes=axes,
                input_names=list(example),
                output_names=["logits"],
                opset_version=opset,
                verbose=False,
            )
            assert program is not None
            program.model.metadata_props.update({name: json.dumps(value) for name, value in about.items()})
            program.save(file, external_data=size > LARGE)
    except Exception as error:  # of the many kinds of torch.export and onnxscript
        raise refusal("onnx", error) from error


def _axes(tensor: Tensor) -> dict[int, str]:
    return {0: "batch", 1: "length"} if tensor.dtype == torch.int64 else {0: "batch"}


def refusal(form: str, error: BaseException) -> KdError:
    """Make one sentence of an export's failure: the operator, where one is lacking, else the innermost reason."""
    chain: list[BaseException] = []
    inner: BaseException | None = error
    while inner is not None and inner not in chain:
        chain.append(inner)
        inner = inner.__cause__ or inner.__context__
    lacking = [m for e in chain if "No " in str(e) or "not " in str(e) for m in OPERATOR.findall(str(e))]
    if lacking and form == "onnx":
        return KdError(f"format = onnx is not possible: the operator {lacking[0]} has no form in ONNX")
    lines = [line.strip() for line in str(chain[-1]).splitlines() if line.strip()]
    said = f"{type(chain[-1]).__name__}: {lines[0]}" if lines else type(chain[-1]).__name__
    return KdError(f"format = {form} is not possible: the network cannot be traced ({said})")


def session(file: Path, threads: int | None = None) -> Any:
    """Open an ONNX file on the CPU; ``threads`` of an operator, None: as many as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])


def answers(file: Path, threads: int | None = None) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """Return what answers raw inputs by onnxruntime."""
    opened = session(file, threads)
    return lambda raw: opened.run(None, dict(raw))[0]


def quantise(file: Path, out: Path, how: str, calibration: Iterable[Mapping[str, np.ndarray]] = ()) -> None:
    """Write a file with int8 weights of convolutions and matrix products.

    ``how``: ``dynamic``, scales of activations are found while it runs; ``static``, from ``calibration``, raw inputs.
    ``KdError`` where nothing in the network can be quantised, or onnxruntime cannot run what came out.
    """
    import onnx
    from onnxruntime import quantization

    kinds = {node.op_type for node in onnx.load(file, load_external_data=False).graph.node}
    if not kinds & {*INT8_OPS}:
        raise KdError(f"quantize = {how} is not possible: the network has no {', '.join(INT8_OPS)} in ONNX")
    prepared = out.with_name(f".{out.name}.prepared.onnx")
    large = (file.with_name(file.name + ".data")).exists()
    try:
        with quiet():
            quantization.quant_pre_process(file, prepared, skip_symbolic_shape=True, save_as_external_data=large)
            if how == "dynamic":  # onnxruntime's integer convolution takes unsigned weights
                kind = quantization.QuantType.QUInt8 if "Conv" in kinds else quantization.QuantType.QInt8
                options: dict[str, Any] = {"weight_type": kind}
                quantization.quantize_dynamic(
                    prepared, out, op_types_to_quantize=[*INT8_OPS], use_external_data_format=large, **options
                )
            else:
                # every operator: where a ReLU6 is left out, the wider range of its input is quantised. Weights of seven
                # bits: the products of eight overflow on CPUs without VNNI, wherever the file may run
                narrow: dict[str, Any] = {"per_channel": True, "reduce_range": True}
                quantization.quantize_static(
                    prepared, out, _Reader(calibration), **narrow, use_external_data_format=large
                )
            session(out)
    except Exception as error:  # onnxruntime and onnx raise kinds of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise KdError(f"quantize = {how} is not possible: {reason}") from error
    finally:
        for left in out.parent.glob(f"{prepared.name}*"):
            left.unlink()


class _Reader:
    """The calibration samples, as onnxruntime reads them: one after the other, None at the end."""

    def __init__(self, samples: Iterable[Mapping[str, np.ndarray]]) -> None:
        self.samples = iter(samples)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next sample."""
        found = next(self.samples, None)
        return None if found is None else dict(found)
