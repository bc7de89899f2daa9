"""The samples of a run as people see them: its texts, and its images as small pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from kd.data.images.base import DataModule
from kd.data.images.files import decode
from kd.data.text import records
from kd.data.text.sentences import Sentences
from kd.errors import KdError, did_you_mean
from kd.run import build
from kd.run.evaluate import run_config

EDGE = 96  # pixels of a picture, at most


def texts(run: str, split: str) -> dict[int, str]:
    """Return the texts of a run's split by the index of their rows; a pair is two lines. {} of data without texts."""
    config = run_config(run)
    if "text" not in config["data"]:  # a column: other data is not read for nothing
        return {}
    data = build.datamodule(config)
    if not isinstance(data, Sentences):
        return {}
    found = data.divided()[split][0]
    second = found.second or [""] * len(found.first)
    both = ("\n".join(filter(None, pair)) for pair in zip(found.first, second, strict=True))
    return dict(zip(found.index.tolist(), both, strict=True))


def pictures(run: str, split: str, rows: Iterable[int]) -> dict[int, str]:
    """Return images of a run's split as addresses that hold a PNG, by their index; {} of data without images."""
    wanted = list(rows)
    if not wanted:
        return {}
    data = build.datamodule(run_config(run))
    if not isinstance(data, DataModule):
        return {}
    part = data.parts[split]
    if isinstance(part.inputs, torch.Tensor) and part.inputs.shape[1] not in (1, 3):
        return {}
    return {row: _address(_image(part.inputs, row)) for row in wanted}


def pictures_of_table(path: str, column: str, rows: Iterable[int], encoding: str) -> dict[int, str]:
    """Return images of some rows of a table, counted from 1, as :func:`pictures` does.

    ``column``: of their paths, relative to the table. ``KdError`` for a column, or an image, that is not there.
    """
    table = records.read_file(Path(path), encoding)
    if column not in table.columns:
        there = ", ".join(table.columns)
        raise KdError(f"image = {column} is no column of {path}{did_you_mean(column, table.columns)}: it has {there}")
    files = {row: Path(path).parent / str(table.columns[column][row - 1]) for row in rows}
    if lost := next((file for file in files.values() if not file.is_file()), None):
        raise KdError(f"image = {column}: there is no file {lost}")
    return {row: _address(decode(file, lambda image: image)) for row, file in files.items()}


def _image(inputs: Any, row: int) -> Any:
    """Open one image: an array (C, H, W) of bytes, or a file."""
    from PIL import Image

    if isinstance(inputs, torch.Tensor):
        pixels = inputs[row].permute(1, 2, 0).squeeze(-1).numpy()
        return Image.fromarray(pixels)
    whole: Any = decode(Path(inputs[row]), lambda image: image)
    return whole


def _address(image: Any) -> str:
    """Write it small, into an address."""
    image.thumbnail((EDGE, EDGE))
    held = BytesIO()
    image.save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()
