"""New, unlabelled inputs of ``kd predict``: image files, or texts of files and of standard input. No torch."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from kd.data.text.records import Records, decoded, joined, of_articles, read_file
from kd.errors import KdError, did_you_mean

IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
ID = "id"  # a column that comes along


def image_files(given: Sequence[str]) -> list[Path]:
    """List the images of files, folders (with all folders in them) and patterns, in the order given, a folder sorted.

    ``KdError`` for what is not there, and where there is no image.
    """
    found: list[Path] = []
    for name in given:
        path = Path(name).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGES and file.is_file())
        elif path.exists():
            files = [path]
        else:
            files = sorted(Path(match) for match in glob.glob(os.path.expanduser(name), recursive=True))
            files = [file for file in files if file.is_file()]
        if not files:
            kind = "is a folder without images" if path.is_dir() else "is no file, folder or pattern with a match"
            raise KdError(f"data = {name} {kind}: it must have {', '.join(IMAGES[:3])} …")
        found += files
    return found


def texts(
    given: Sequence[str], columns: Sequence[str], encoding: str = "utf-8", delimiter: str | None = None
) -> Records:
    """Read texts, or pairs of them where ``columns`` names two, from tables, .txt (a line each) and ``-`` (the input).

    The columns are called as ``columns`` are; a column ``id``, where a table has one, comes along: text, "" where there
    is none. ``delimiter``: between the cells of .csv and .tsv, a character or ``tab``; None: by the ending. ``KdError``
    for a file or column that is not there, and where there is no text.
    """
    parts = [
        _lines(name, columns, encoding) if _plain(name) else _columns(name, columns, encoding, delimiter)
        for name in given
    ]
    if any(ID in part.columns for part in parts):
        for part in parts:
            part.columns.setdefault(ID, [""] * len(part))
    found = joined(parts)
    if not len(found):
        raise KdError(f"data = {', '.join(given)} has no text")
    return found


def _plain(name: str) -> bool:
    return name == "-" or Path(name).suffix.lower() not in TABLES


def _lines(name: str, columns: Sequence[str], encoding: str) -> Records:
    if len(columns) > 1:
        raise KdError(f"data = {name} has a text a line: the run reads pairs, give a table with two columns")
    try:
        text = sys.stdin.read() if name == "-" else decoded(_file(name), encoding, section="")
    except UnicodeDecodeError as error:
        raise KdError(f"data = {name} is not {error.encoding}: {error}") from None
    return Records({columns[0]: [line for line in text.split("\n") if line.strip()]}, name)


def _file(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise KdError(f"data = {name} is no file: give .txt, {', '.join(TABLES)}, or - for standard input")
    return path


def _columns(name: str, columns: Sequence[str], encoding: str, delimiter: str | None) -> Records:
    table = read_file(_file(name), encoding, delimiter, section="")
    if "paragraphs" in table.columns and len(columns) == 2 and columns[1] not in table.columns:  # SQuAD's own file
        table = of_articles(table, dict(zip(("question", "context", ID), (*columns, ID), strict=True)))
    for column in columns:
        if column not in table.columns:
            near = did_you_mean(column, table.columns)
            raise KdError(f"{name} has no column {column}{near}: it has {', '.join(table.columns)} (set column=NAME)")
    kept = [column for column in (*columns, ID) if column in table.columns]
    written = {column: [_written(value) for value in table.columns[column]] for column in kept}
    return Records(written, name)


def _written(value: object) -> str:
    """Write a cell; whole numbers of a column with gaps, which are floats, as they were."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)


def chunks(items: Sequence[object], size: int) -> Iterator[slice]:
    """Yield slices of ``size`` items each, the last one shorter."""
    return (slice(start, start + size) for start in range(0, len(items), size))
