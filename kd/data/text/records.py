"""Rows of text with their columns, from files, from Hugging Face ``datasets`` and from Python objects."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kd.config.hub import online
from kd.config.rules import shown
from kd.data.text.delimited import DELIMITERS, delimited
from kd.errors import KdError, did_you_mean

Source = Any
"""Path, list of paths, list of mappings, {name, subset, split} of the hub, or a ``datasets.Dataset``."""
HUB = ("name", "subset", "split")  # keys of one split of a folder or a set of the hub
FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
LATE = "logprobs"  # of kd generate: decoded row after row by what reads it, as it takes 15 kB of memory a token
SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "dev"), "test": ("test",)}
MARKS = {  # the first bytes of files that say their encoding; those of UTF-32 begin as those of UTF-16 do
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass
class Records:
    """Columns of equal length.

    ``where``: how errors call them; ``classes``: column → names of its numbers; ``plain``: lines without anything else;
    ``files``: where they are of several, how errors call each, and its number of rows.
    """

    columns: dict[str, list[Any]]
    where: str
    classes: dict[str, list[str]] = field(default_factory=dict)
    plain: bool = False
    files: Sequence[tuple[str, int]] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def row(self, place: int) -> str:
        """Say for errors which row of which file one is, counted from 1 without the header; ``place``: from 0."""
        for file, rows in self.files:
            if place < rows:
                return f"row {place + 1} of {file}"
            place -= rows
        return f"row {place + 1} of {self.where}"

    def column(self, name: str, key: str) -> list[Any]:
        """Return a column. ``KdError`` that names those that are there; ``key``: the option that chooses it."""
        if name not in self.columns:
            there = ", ".join(self.columns) or "none"
            raise KdError(
                f"data.{key} = {name} is no column of {self.where}{did_you_mean(name, self.columns)}: it has {there}"
            )
        return self.columns[name]


class Undecoded(NamedTuple):
    """A value of a line of JSON that is not decoded yet, see ``LATE``."""

    line: str

    def value(self) -> Any:
        """Decode it."""
        return json.loads(self.line)[LATE]


def read(source: Source, root: str | None, encoding: str, key: str, delimiter: str | None = None) -> Records:
    """Read one source. ``key``: the option that names it; paths are relative to ``root``, or absolute.

    ``delimiter``: between the cells of csv and tsv; None: by the ending.

    Raises ``KdError`` for a file that is missing, empty, of another encoding or format.
    """
    if (found := dataset_of(source, root, key)) is not None:
        return of_dataset(*found)
    if isinstance(source, (str, Path)):
        source = [source]
    if not isinstance(source, Sequence) or not len(source):
        raise KdError(
            f"data.{key} = {source} is not allowed: it must be a file, a list of files, a list of rows, or "
            "{name: SET, subset: …, split: …}"
        )
    if all(isinstance(row, Mapping) for row in source):
        return _of_rows(list(source), f"data.{key}")
    parts = [read_file(located(path, root, key), encoding, delimiter) for path in source]
    return joined(parts)


def located(path: str | Path, root: str | None, key: str) -> Path:
    """Return the path of a file. ``KdError`` when there is none."""
    found = Path(path).expanduser()
    if not found.is_absolute() and root and (Path(root).expanduser() / found).exists():
        found = Path(root).expanduser() / found
    if not found.is_file():
        tried = "" if found.is_absolute() else f" (relative to paths.data = {root}, or here)"
        raise KdError(f"data.{key} = {path}: there is no such file{tried}")
    return found


def read_file(path: Path, encoding: str, delimiter: str | None = None, section: str = "data.") -> Records:
    """Read a file by its ending: csv and tsv with a header, json lines, json, parquet, or text with a row a line.

    ``section``: what the names of ``encoding`` and ``delimiter`` begin with in errors, "" where they are keys of a
    command. Raises ``KdError`` for a file that is empty, of another encoding or format.
    """
    kind = ".jsonl" if path.suffix.lower() == ".ndjson" else path.suffix.lower()
    if kind not in FORMATS:
        raise KdError(f"{path} cannot be read: its ending must be one of {', '.join(FORMATS)}")
    if path.stat().st_size == 0:
        raise KdError(f"{path} is empty")
    if kind == ".txt":
        text = decoded(path, encoding, section).removesuffix("\n")
        found = Records({"text": text.split("\n")}, str(path), plain=True)  # not splitlines: a form feed ends no row
    elif kind in (".json", ".jsonl"):
        found = _of_rows(_json_rows(path, encoding, section), str(path))
    elif kind in DELIMITERS:
        text = decoded(path, encoding, section)
        found = Records(delimited(text, str(path), kind, delimiter, section), str(path))
    else:
        found = _parquet(path)
    if not len(found):
        raise KdError(f"{path} has no rows")
    return found


def of_articles(found: Records, names: Mapping[str, str]) -> Records:
    """Return a row a question of SQuAD's own file, whose articles have paragraphs, and these their questions.

    ``names``: how the columns ``question``, ``context``, ``answers`` and ``id`` are to be called; one that is not in it
    is left out. ``KdError`` for a file of another form.
    """
    rows: dict[str, list[Any]] = {name: [] for name in names.values()}
    try:
        for paragraph in (one for paragraphs in found.columns["paragraphs"] for one in paragraphs):
            for each in paragraph["qas"]:
                values = {"question": each["question"], "context": paragraph["context"]}
                values |= {key: each.get(key) for key in ("answers", "id")}
                for key, name in names.items():
                    rows[name].append(values[key])
    except (AttributeError, KeyError, TypeError):
        raise KdError(
            f"{found.where} is not SQuAD's file: its articles must have paragraphs, each with a context and qas, each "
            "of these a question and answers"
        ) from None
    return Records(rows, found.where)


def decoded(path: Path, encoding: str, section: str = "data.") -> str:
    """Return the text of a file without the byte order mark at its beginning, if it has one.

    ``section``: what the name of ``encoding`` begins with in errors, see :func:`read_file`. Raises ``KdError`` where
    the bytes, or that mark, are of another encoding, and where the text holds NULs.
    """
    key = f"{section}encoding"
    content = path.read_bytes()
    marked = next((name for mark, name in MARKS.items() if content.startswith(mark)), None)
    try:
        if marked is not None and not codecs.lookup(encoding).name.startswith(marked):
            raise KdError(f"{path} is {marked}, by its byte order mark, and not {encoding}: set {key}={marked}")
        if marked is None and codecs.lookup(encoding).name in ("utf-16", "utf-32"):
            way = f"set {key}, for example {key}={_by_nuls(content, encoding) or 'utf-8'}"
            raise KdError(f"{path} is not {encoding}, whose files begin with a mark: {way}")
        text = content.decode("utf-8-sig" if marked == "utf-8" else marked or encoding)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        bytewise = "cp1252" if any(0x80 <= value <= 0x9F for value in content) else "latin-1"  # “ ” and € of Windows
        likely = _by_nuls(content, encoding) or bytewise
        raise KdError(f"{path} is not {encoding} ({byte}): set {key}, for example {key}={likely}") from None
    except LookupError:
        raise KdError(f"{key} = {encoding} is not allowed: there is no encoding of this name") from None
    if "\0" in text:  # ASCII in UTF-16 is valid in any encoding of bytes
        other = None if marked else _by_nuls(content, encoding)
        way = f"set {key}, for example {key}={other}, or " if other else ""
        raise KdError(f"{path}, read as {encoding}, holds NUL characters: {way}take them out")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _by_nuls(content: bytes, encoding: str) -> str | None:
    """Return the UTF-16 that bytes without a mark are, by NULs at every second place; None: none, or ``encoding``."""
    even, odd = content[::2].count(0), content[1::2].count(0)
    found = "utf-16-le" if odd > even else "utf-16-be" if even > odd else None
    return None if found == codecs.lookup(encoding).name else found


def _parquet(path: Path) -> Records:
    from pyarrow import parquet  # lists stay lists, as in jsonl

    try:
        return Records({str(k): v for k, v in parquet.read_table(path).to_pydict().items()}, str(path))
    except Exception as error:
        raise KdError(f"{path} cannot be read as parquet: {str(error).strip().splitlines()[0]}") from None


def _json_rows(path: Path, encoding: str, section: str) -> list[Any]:
    text = decoded(path, encoding, section)
    number = 0
    try:
        if path.suffix.lower() == ".json":
            rows = json.loads(text)
            if isinstance(rows, Mapping) and isinstance(rows.get("data"), list):
                rows = rows["data"]  # as in SQuAD's files, beside a version
        else:
            rows = []
            for number, line in enumerate(text.split("\n"), 1):  # noqa: B007  (named in the error)
                if line.strip():
                    rows.append(json.loads(line))
                    if isinstance(rows[-1], dict) and rows[-1].get(LATE) is not None:
                        rows[-1][LATE] = Undecoded(line)
    except ValueError as error:
        line_of = f" in line {number}" if number else ""
        raise KdError(f"{path} is not valid JSON{line_of}: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise KdError(f"{path} must hold objects with named values, one a row")
    return rows


def _of_rows(rows: list[Any], where: str) -> Records:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Records({name: [row.get(name) for row in rows] for name in names}, where)


def joined(parts: Sequence[Records]) -> Records:
    """Put files one after the other; ``KdError`` where their columns differ."""
    first = parts[0]
    for other in parts[1:]:
        if differ := sorted(set(first.columns) ^ set(other.columns)):
            raise KdError(f"{first.where} and {other.where} have other columns: {', '.join(differ)}")
    columns = {name: [value for part in parts for value in part.columns[name]] for name in first.columns}
    where = first.where if len(parts) == 1 else f"{first.where} and {len(parts) - 1} more"
    files = [(part.where, len(part)) for part in parts] if len(parts) > 1 else []
    return Records(columns, where, plain=all(part.plain for part in parts), files=files)


# ---------------------------------------------------------------------- Hugging Face


def of_dataset(dataset: Any, where: str) -> Records:
    """Return the columns of a ``datasets.Dataset``, and the names of its classes."""
    columns = {name: list(dataset[name][:]) for name in dataset.column_names}
    classes = {n: list(f.names) for n, f in dataset.features.items() if getattr(f, "names", None)}
    return Records(columns, where, classes)


def load_splits(name: str, subset: str | None, root: str | None) -> dict[str, Any]:
    """Load train, val and test, as far as they are there, of a folder or a set of the Hugging Face hub.

    Nothing but data is read: ``datasets`` runs no code of a set. ``KdError`` when it is not there.
    """
    found = _loaded(name, subset, root, "data.name")
    splits = {split: next((found[n] for n in names if n in found), None) for split, names in SPLITS.items()}
    if splits["train"] is None:
        raise KdError(f"data.name = {name} has no split train: it has {', '.join(found)}")
    return {split: part for split, part in splits.items() if part is not None}


def dataset_of(source: Any, root: str | None, key: str) -> tuple[Any, str] | None:
    """Return the ``datasets.Dataset`` that a source is, or names, and how errors call it; None: it is neither."""
    if hasattr(source, "column_names") and hasattr(source, "features"):
        return source, f"data.{key}"
    return _of_hub(source, root, key) if isinstance(source, Mapping) else None


def _of_hub(source: Mapping[str, Any], root: str | None, key: str) -> tuple[Any, str]:
    """Load one split of a folder or a set of the hub; without ``split`` the one that bears the name of ``key``."""
    if unknown := next((str(name) for name in source if name not in HUB), None):
        raise KdError(f"data.{key}.{unknown} is not a key of a set of the hub{did_you_mean(unknown, HUB)}")
    if not isinstance(source.get("name"), str):
        raise KdError(
            f"data.{key} = {dict(source)} is not allowed: it must have a name, of a folder or a set of the hub"
        )
    name, split = source["name"], source.get("split")
    found = _loaded(name, source.get("subset"), root, f"data.{key}.name")
    chosen = next((n for n in ([split] if split is not None else SPLITS[key]) if n in found), None)
    if chosen is None:
        there = ", ".join(map(str, found))
        near = did_you_mean(str(split), found) if split is not None else ""
        raise KdError(f"data.{key}.split = {shown(split)} is no split of {name}{near}: it has {there}")
    return found[chosen], f"{name} ({chosen})"


def _loaded(name: str, subset: str | None, root: str | None, key: str) -> Mapping[str, Any]:
    """Load all splits of a folder or a set of the hub. ``KdError``, with the option ``key``, when it is not there."""
    try:
        import datasets
    except ImportError:
        raise KdError(f"{key} = {name} needs the package datasets: pip install datasets") from None
    folder = next((p for p in (Path(name).expanduser(), Path(root or ".") / name) if p.is_dir()), None)
    if folder is None and (name.startswith(("~", ".")) or Path(name).is_absolute()):
        raise KdError(f"{key} = {name}: there is no such folder")
    offline = folder is None and not online()
    if offline and not _in_cache(name, Path(datasets.config.HF_DATASETS_CACHE)):
        raise _cannot_be_loaded(key, name, "the hub cannot be reached")  # datasets would try for half a minute
    try:
        saved = folder is not None and any((folder / f).is_file() for f in ("dataset_dict.json", "state.json"))
        how = datasets.DownloadConfig(local_files_only=True) if offline else None
        found: Any = (
            datasets.load_from_disk(str(folder))
            if saved
            else datasets.load_dataset(str(folder or name), subset, download_config=how)
        )
    except Exception as error:  # of many kinds: no such set, no connection, damaged files
        raise _cannot_be_loaded(key, name, str(error).strip().splitlines()[0]) from None
    return found if isinstance(found, Mapping) else {"train": found}


def _in_cache(name: str, cache: Path) -> bool:
    """Tell whether datasets may have kept a set of the hub: its folder is OWNER___SET, the set's name in snake case."""
    letters = [re.sub(r"[\W_]", "", text.lower()) for text in (name, *(f.name for f in cache.glob("*") if f.is_dir()))]
    return letters[0] in letters[1:]


def _cannot_be_loaded(key: str, name: str, why: str) -> KdError:
    return KdError(
        f"{key} = {name} cannot be loaded: {why} (it must be a folder, or a set of the Hugging Face hub that can be "
        "reached or is in its cache)"
    )
