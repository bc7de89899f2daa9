"""The tokenizer that lies beside the teacher of a config: needed where it is another one than the data's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.config.hub import online, reason
from kd.run.networks import teacher_members

log = logging.getLogger(__name__)

KEY = "teacher_tokenizer"
FILES = ("tokenizer.json", "tokenizer_config.json")


def with_teacher_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config's data, with the teacher's tokenizer where its option is null and one is found.

    It is found in the folder of a run or of a network of transformers that the teacher comes from, or by that network's
    name. Where it cannot be loaded, or there are several teachers, the option stays null. The data makes nothing of one
    that has its own vocabulary.
    """
    data = dict(config["data"])
    places = {place for model, checkpoint in teacher_members(config["teacher"]) if (place := _place(model, checkpoint))}
    if data.get(KEY, "") is not None or data.get("masking") is not None or len(places) != 1:
        return data
    (place,) = places
    if place == data.get("tokenizer"):
        return data
    from transformers import AutoTokenizer  # start-up: transformers

    local = Path(place).is_dir() or not online()
    try:
        data[KEY] = AutoTokenizer.from_pretrained(place, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # of many kinds: no such name, no connection, a library that it needs
        log.info("no tokenizer was found beside the teacher (%s: %s)", place, reason(error))
    return data


def _place(model: Any, checkpoint: Any) -> str | None:
    """Return the folder, or the name on the hub, of a teacher's tokenizer; None where nothing says any."""
    if checkpoint is not None:
        run = Path(checkpoint).expanduser()
        folder = (run if run.is_dir() else run.parent) / "selected"
        return str(folder) if any((folder / file).is_file() for file in FILES) else None
    name = model.get("name") if isinstance(model, Mapping) and model.get("pretrained") else None
    if name is None or (Path(name).is_dir() and not any((Path(name) / file).is_file() for file in FILES)):
        return None
    return str(name) if str(model.get("_target_", "")).endswith(".transformers_model") else None
