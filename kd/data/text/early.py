"""What is wrong with the files of a text set or a table of images, before torch is imported. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.data.text.labels import class_label, class_names
from kd.data.text.records import Records, located, read

SENTENCES = ("kd.data.text.sentences.Sentences", "kd.data.text.features.SentenceFeatures")
DOCUMENTS = "kd.data.text.lm.Documents"
IMAGES = "kd.data.images.table.ImageTable"
MOST = 32 << 20  # bytes that are read twice, here and by the set: for larger files that would take seconds as well


def refuse_files(data: Mapping[str, Any]) -> None:
    """Raise the ``KdError`` that the set of a config would raise: a file, an encoding, a line, a column, one class.

    The imports that the set needs take seconds. Rows, sets of the hub and sets of other modules are left to themselves.
    """
    if data.get("_target_") not in (*SENTENCES, DOCUMENTS, IMAGES):
        return
    for split in ("train", "val", "test"):
        source: Any = data.get(split)
        files: list[Any] = source if isinstance(source, list) else [source]
        if not all(isinstance(file, (str, Path)) for file in files):
            continue
        paths = [located(file, data["root"], split) for file in files]
        if any(path.suffix.lower() == ".parquet" for path in paths) or sum(p.stat().st_size for p in paths) > MOST:
            continue
        how = data["root"], data["encoding"], split, data.get("delimiter")
        if data["_target_"] == DOCUMENTS:  # files of which each has columns of its own
            for file in files:
                read(file, *how)
            continue
        table = read(source, *how)
        if data["_target_"] == IMAGES:
            for key in ("image", "label"):
                table.column(data[key], key)
            continue
        _refuse_columns(table, data)
        if split == "train":
            _refuse_classes(table, data)


def _has_labels(table: Records, data: Mapping[str, Any]) -> bool:
    return data["label"] is not None and data["masking"] is None and not table.plain


def _refuse_columns(table: Records, data: Mapping[str, Any]) -> None:
    for key in ("text", "text_pair", *(["label"] if _has_labels(table, data) else [])):
        if data[key] is not None:
            table.column(data[key], key)


def _refuse_classes(table: Records, data: Mapping[str, Any]) -> None:
    if _has_labels(table, data) and data["label_names"] is None and not data.get("numbers"):
        labels = [class_label(value, None) for value in table.columns[data["label"]]]
        class_names(labels, data["label"], table.where)
