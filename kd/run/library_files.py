"""Folders of a run that transformers loads by itself: ``AutoModel….from_pretrained(RUN / "selected")``."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kd.errors import named
from kd.parallel import group
from kd.records.durable import share
from kd.records.weight_files import LAST, SELECTED

FOLDERS = {"selected": SELECTED, "last": LAST}


def open_folders(run_dir: Path, network: nn.Module, tokenizer: Any, class_names: Sequence[str]) -> None:
    """Write configuration and tokenizer beside links to the run's weights files, so that each checkpoint loads.

    Nothing for networks of other libraries, nor for those whose weights bear other names (an encoder with its pooling,
    low-rank matrices): :func:`close_folder` writes these.
    """
    inner = _of_library(network)
    if inner is None or group.rank() != 0:
        return
    for folder, weights_file in FOLDERS.items():
        place = run_dir / folder
        _described(place, inner, tokenizer, class_names)
        if inner is network:
            link = place / "model.safetensors"
            try:
                link.unlink(missing_ok=True)
                link.symlink_to(os.path.join("..", weights_file))
            except OSError:  # a file system without links: close_folder copies
                continue


def close_folder(run_dir: Path | None, folder: str, network: nn.Module) -> None:
    """Write the weights of a network into a folder where a link could not stand for them."""
    inner = _of_library(network)
    if inner is None or run_dir is None or group.rank() != 0:
        return
    place = run_dir / folder / "model.safetensors"
    try:
        if place.is_symlink():
            return
        if inner is network:
            shutil.copyfile(run_dir / FOLDERS[folder], place)
        else:
            from kd.models.transformers_model import merged  # start-up: transformers

            merged(network).save_pretrained(place.parent, safe_serialization=True)
            for written in place.parent.glob("*.safetensors"):  # several of a large network
                share(written)
    except OSError as error:
        raise named(error, place) from error


def _described(place: Path, inner: Any, tokenizer: Any, class_names: Sequence[str]) -> None:
    try:
        place.mkdir(exist_ok=True)
        config = copy.deepcopy(inner.config)
        config.architectures = [type(inner).__name__]
        if class_names and len(class_names) == getattr(config, "num_labels", None):
            config.id2label = dict(enumerate(class_names))
            config.label2id = {name: number for number, name in enumerate(class_names)}
        config.save_pretrained(place)
        if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(place)
    except OSError as error:
        raise named(error, place) from error


def _of_library(network: nn.Module) -> Any:
    if "transformers" not in sys.modules:
        return None
    from kd.models.transformers_model import library_network  # start-up: transformers

    return library_network(network)
