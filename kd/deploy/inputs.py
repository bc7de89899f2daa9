"""New, unlabelled inputs of ``kd predict``: image files, or texts of files and of standard input. No torch."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from kd.errors import KdError, did_you_mean

IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


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


def texts(given: Sequence[str], columns: Sequence[str], encoding: str = "utf-8") -> tuple[list[str], list[str] | None]:
    """Read texts, or pairs of them where ``columns`` names two, from tables, .txt (a line each) and ``-`` (the input).

    ``KdError`` for a file or column that is not there, and where there is no text.
    """
    firsts: list[str] = []
    seconds: list[str] = []
    for name in given:
        found = _lines(name, encoding) if _plain(name) else _columns(name, columns, encoding)
        if len(found) < len(columns):
            raise KdError(f"data = {name} has a text a line: the run reads pairs, give a table with two columns")
        firsts += found[0]
        seconds += found[1] if len(columns) > 1 else []
    if not firsts:
        raise KdError(f"data = {', '.join(given)} has no text")
    return firsts, seconds if len(columns) > 1 else None


def _plain(name: str) -> bool:
    return name == "-" or Path(name).suffix.lower() not in TABLES


def _lines(name: str, encoding: str) -> list[list[str]]:
    if name == "-":
        return [[line for line in sys.stdin.read().splitlines() if line.strip()]]
    path = Path(name).expanduser()
    if not path.is_file():
        raise KdError(f"data = {name} is no file: give .txt, {', '.join(TABLES)}, or - for standard input")
    try:
        return [[line for line in path.read_text(encoding).splitlines() if line.strip()]]
    except (UnicodeDecodeError, LookupError) as error:
        raise KdError(f"{path} is not {encoding}: {error}") from None


def _columns(name: str, columns: Sequence[str], encoding: str) -> list[list[str]]:
    from kd.data.text.records import of_articles, read  # start-up: pandas

    table = read(str(Path(name).expanduser().absolute()), None, encoding, "data")
    if "paragraphs" in table.columns and len(columns) == 2 and columns[1] not in table.columns:  # SQuAD's own file
        table = of_articles(table, dict(zip(("question", "context"), columns, strict=True)))
    for column in columns:
        if column not in table.columns:
            near = did_you_mean(column, table.columns)
            raise KdError(f"{name} has no column {column}{near}: it has {', '.join(table.columns)} (set column=NAME)")
    return [["" if value is None else str(value) for value in table.columns[column]] for column in columns]


def chunks(items: Sequence[object], size: int) -> Iterator[slice]:
    """Slices of ``size`` items each, the last one shorter."""
    return (slice(start, start + size) for start in range(0, len(items), size))
