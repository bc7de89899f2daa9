"""``kd export``: a run's student as a folder that works without ``kd``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kd.config.rules import number, one_of, refusals, refuse, whole
from kd.errors import KdError, did_you_mean

FORMATS = ("safetensors", "timm", "hf", "onnx", "torch-export")
OWN: dict[str, Any] = {"run": None, "format": "onnx", "out": None, "weights": "selected", "quantize": None}
OWN |= {"tolerance": 1e-4, "opset": None}
RULES = {
    "format": one_of(*FORMATS),
    "weights": one_of("selected", "last"),
    "quantize": one_of("dynamic", "static").or_null,
    "tolerance": number(above=0),
    "opset": whole(18, 30).or_null,
}

USAGE = """kd export RUN [format=onnx] [out=DIR] [KEY=VALUE ...]        (or run=RUN)

Writes the student of a run, with the heads that its terms leave on it, as a folder that works without kd: the model,
preprocessing.json, labels.json, the tokenizer of texts, and a model card. Its answers to samples of the test split are
compared with the run's: a folder that differs is not written.

  format=onnx          raw bytes of images, or ids of tokens, to logits; run_onnx.py beside it needs onnxruntime alone
  format=torch-export  the same for torch.export.load
  format=hf            for from_pretrained of transformers        format=timm   for timm.create_model("local-dir:DIR")
  format=safetensors   the plain state dict

  out=DIR              complete or not there; default: RUN/export/FORMAT
  quantize=dynamic     also an int8 file (of ONNX), with the accuracy of both on the test split
  quantize=static      the same with scales of activations from training samples: for convolutions
  weights=last         of the last epoch, not those that validation selected
  tolerance=1e-4       largest difference, as a share of the largest logit where that is above 1
  opset=NUMBER         of ONNX; default: that of torch's exporter
  data.KEY=VALUE       of the run's config, as data.root where its data lies elsewhere now"""


def main(argv: Sequence[str]) -> int:
    """Parse, export, print what was written."""
    if not argv or any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0 if argv else 1
    own, overrides = parsed(argv)
    name = own["format"] if own["quantize"] is None else f"{own['format']}-{own['quantize']}"
    out = Path(own["out"] or Path(own["run"]) / "export" / name)

    from kd.deploy.export import Options, export  # start-up: torch
    from kd.deploy.student import student  # start-up: torch

    given = student(own["run"], own["weights"], overrides)
    made = export(given, Options(own["format"], own["quantize"], own["tolerance"], own["opset"]), out)
    _print(made)
    return 0


def parsed(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the options and the overrides of the data. ``KdError`` for a key or value that is not allowed."""
    import yaml

    own = dict(OWN)
    overrides = []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or Path(argument).is_dir():
            key, value = "run", argument
        if key.startswith("data."):
            overrides.append(argument)
        elif key not in OWN:
            raise KdError(f"{argument} is not understood: kd export has no {key}{did_you_mean(key, OWN)}")
        elif key == "run" and own["run"] is not None:
            raise KdError(f"kd export writes one run, given: {own['run']} and {value}")
        else:
            own[key] = value if key in ("run", "out") else yaml.safe_load(value)
    if isinstance(own["tolerance"], str):  # YAML reads 1e-4 as a text
        own["tolerance"] = _number(own["tolerance"])
    refuse(refusals("", own, RULES))
    if own["run"] is None:
        raise KdError("kd export needs a run: kd export RUN format=onnx")
    if own["format"] != "onnx" and (own["quantize"] is not None or own["opset"] is not None):
        key = "quantize" if own["quantize"] is not None else "opset"
        raise KdError(f"{key} = {own[key]} is of format=onnx: with format={own['format']} it does nothing")
    return own, overrides


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _print(made: Any) -> None:
    print(made.folder)
    table = Table()
    table.add_column("file")
    table.add_column("bytes", justify="right")
    if made.accuracy:
        table.add_column(f"test/{made.metric}", justify="right")
    for name, size in made.files.items():
        accuracy = [f"{made.accuracy[name]:.4f}" if name in made.accuracy else ""] if made.accuracy else []
        table.add_row(name, f"{size:,}", *accuracy)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110).print(table)
    print(
        f"largest difference to the run's answers {made.difference:.2e} on {made.compared} samples of the test split "
        f"(allowed: {made.allowed:.2e})"
    )
