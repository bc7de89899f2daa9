"""Images in the columns of Hugging Face ``datasets``: encoded bytes that are decoded when they are needed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd.data.content import FileContent


class StoredImage(NamedTuple):
    """One image of a data set whose ``column`` is not decoded; opened and read as a file is."""

    rows: Any  # a datasets.Dataset
    column: str
    number: int
    where: str

    def read_bytes(self) -> bytes:
        """Read the encoded image."""
        return self.rows[self.number][self.column]["bytes"]

    def open(self, mode: str = "rb") -> io.BytesIO:
        """Open the encoded image."""
        return io.BytesIO(self.read_bytes())

    def __str__(self) -> str:
        return f"the image in row {self.number + 1} of {self.where}"


class NamedContent(FileContent):
    """Files that are called as their table calls them, wherever they lie."""

    def __init__(self, files: Sequence[Any], bytes_each: Sequence[int], names: Sequence[str]) -> None:
        super().__init__(Path(), files, bytes_each)
        self.names = names

    def name(self, position: int) -> str:
        """Give its path as it is written, or its row."""
        return self.names[position]


def images_of(dataset: Any, column: str, where: str) -> tuple[list[Any], list[int], list[str]]:
    """List the images of a column: each as a file or in the data set, its bytes, its name.

    ``where``: how errors call the data set. Nothing is decoded; a data set that was made of files refers to them.
    """
    import datasets
    from pyarrow import compute

    rows = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    table = rows.with_format("arrow")[:][column].combine_chunks()
    places, bytes_ = compute.struct_field(table, "path"), compute.struct_field(table, "bytes")
    if len(table) and bytes_.null_count:
        files = [Path(str(place)) for place in places.to_pylist()]
        return files, [file.stat().st_size if file.is_file() else -1 for file in files], list(map(str, files))
    sizes = np.asarray(compute.binary_length(bytes_)).tolist()
    numbers = range(len(rows))
    return (
        [StoredImage(rows, column, number, where) for number in numbers],
        sizes,
        [f"row {number + 1}" for number in numbers],
    )
