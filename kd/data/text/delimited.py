"""Delimited text (.csv, .tsv) by RFC 4180: every cell under its header, or a sentence that says which line is wrong."""

from __future__ import annotations

import csv
from io import StringIO

from kd.errors import KdError, counted

LONGEST = 2**31 - 1  # characters of a cell: Python's own limit of 131,072 is shorter than some documents
DELIMITERS = {".csv": ",", ".tsv": "\t"}
WRITTEN = {",": '","', ";": '";"', "\t": "tab"}  # the value of the option, on a command line


def delimited(text: str, where: str, kind: str, delimiter: str | None, section: str = "data.") -> dict[str, list[str]]:
    """Read columns by the names of the first line; every cell is text: "NA" and "null" are words, "007" is no number.

    ``where``: how errors call the file; ``kind``: its ending; ``delimiter``: one character or ``tab``, None: by the
    ending; ``section``: what the name of that option begins with in errors, see :func:`kd.data.text.records.read_file`.
    Empty lines are left out, and a column without a name is called by its place, from 0.

    Raises ``KdError`` for a line with more or fewer cells than the header, a quote that is not closed, two columns of
    one name, a header that another delimiter would divide, and a delimiter of more than one character.
    """
    between = "\t" if delimiter == "tab" else delimiter or DELIMITERS[kind]
    if len(between) != 1:
        raise KdError(
            f'{section}delimiter = {delimiter} is not allowed: it must be one character, for example ";", or tab'
        )
    csv.field_size_limit(LONGEST)
    reader = csv.reader(StringIO(text), delimiter=between, strict=True)
    rows: list[list[str]] = []
    line = 1  # where a row begins: a quoted cell may have several lines
    try:
        for row in reader:
            if len(row) > 1 or "".join(row).strip():
                if rows and len(row) != len(rows[0]):
                    raise KdError(_other_length(where, line, len(row), len(rows[0]), between))
                if not rows and delimiter is None:  # before cells are counted by the wrong one
                    _refuse_other_delimiter(row, where, section)
                rows.append(row)
            line = reader.line_num + 1
    except csv.Error as error:
        raise KdError(
            f'{where} cannot be read as {kind[1:]}: line {line}: {error} (a cell that begins with " must end with it, '
            'and a " inside it be doubled)'
        ) from None
    if not rows:
        return {}
    names = [name or f"Unnamed: {place}" for place, name in enumerate(rows[0])]
    if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise KdError(f"{where} has two columns named {twice}")
    return {name: [row[place] for row in rows[1:]] for place, name in enumerate(names)}


def _other_length(where: str, line: int, cells: int, wanted: int, between: str) -> str:
    shown = "a tab" if between == "\t" else between
    hint = f': a cell with {shown} in it must be quoted ("…")' if cells > wanted else ""
    return f"{where}: line {line} has {counted(cells, 'cell')}, the header has {wanted}{hint}"


def _refuse_other_delimiter(names: list[str], where: str, section: str) -> None:
    found = next((other for other in WRITTEN if len(names) == 1 and other in names[0]), None)
    if found is not None:
        shown = " ".join(names[0].split("\t"))
        option = f"{section}delimiter={WRITTEN[found]}"
        option = f"'{option}'" if section and found != "\t" else option  # Hydra reads the quotes of the value itself
        raise KdError(f"{where} has one column, {shown}: set {section}delimiter, here {option}")
