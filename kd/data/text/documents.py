"""Documents as they lie in text files, and where a file is cut in two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.data.split import round_half_up
from kd.data.text.content import normalised
from kd.data.text.records import Records, decoded, joined, located, read
from kd.errors import KdError

LINE = 40  # characters of a line, or more, by which files are compared: shorter ones repeat by chance


def text_files(source: Any) -> list[str | Path]:
    """Return the text files of a source, [] where it is a table or rows."""
    files = [source] if isinstance(source, (str, Path)) else source if isinstance(source, (list, tuple)) else []
    of_text = [f for f in files if isinstance(f, (str, Path)) and Path(f).suffix.lower() == ".txt"]
    return of_text if len(of_text) == len(files) else []


def read_documents(
    source: Any, document: str, root: str | None, encoding: str, key: str, delimiter: str | None = None
) -> tuple[list[str] | Records, str]:
    """Return the documents of a source and what errors call it; of prompts and messages their records.

    ``document``: what one is in a text file: the ``file``, a ``line`` or a ``paragraph``; a row of a table is one.
    """
    if files := text_files(source):
        paths = [located(file, root, key) for file in files]
        return [d for path in paths for d in divided(decoded(path, encoding), document)], str(paths[0])
    several = (
        isinstance(source, (list, tuple)) and len(source) > 0 and all(isinstance(file, (str, Path)) for file in source)
    )
    tables = [read(file, root, encoding, key, delimiter) for file in (source if several else [source])]
    if not all("text" in table.columns for table in tables):  # prompts: all files have the same columns
        records = tables[0] if len(tables) == 1 else joined(tables)
        return records, records.where
    values = []
    for table in tables:  # one column counts: files of other data sets may have others beside it
        texts = ["" if value is None else value for value in table.columns["text"]]
        if not all(isinstance(value, str) for value in texts):
            raise KdError(f"the column text of {table.where} holds no texts")
        values += texts
    return values, tables[0].where


def divided(text: str, document: str) -> list[str]:
    """Divide a text into documents."""
    if document == "file":
        return [text]
    if document == "line":
        return [line for line in text.split("\n") if line.strip()]
    paragraphs: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    return ["\n".join(lines) for lines in paragraphs if lines]


def long_lines(documents: Sequence[str]) -> list[str]:
    """Return the normalised lines of documents, those of fewer than 40 characters left out."""
    lines = (normalised(line) for document in documents for line in document.split("\n"))
    return [line for line in lines if len(line) >= LINE]


def cut_the_end(documents: Sequence[str], fraction: float, name: str) -> tuple[list[str], list[str]]:
    """Return the last ``fraction`` of the characters of files, from the beginning of a line on, and the rest."""
    wanted = round_half_up(fraction * sum(map(len, documents)))
    taken: list[str] = []
    left = list(documents)
    while left and wanted > 0:
        last = left.pop()
        place = last.rfind("\n", 0, len(last) - wanted) + 1 if len(last) > wanted else 0
        if place > 0:
            left.append(last[:place])
            last = last[place:]
        wanted -= len(last)
        taken.insert(0, last)
    if not left or not taken:
        raise KdError(f"data.{name}_fraction = {fraction} leaves none to train on: the files have too few lines")
    return taken, left
