"""Which tokenizers the data of a run takes: those that its pretrained networks were trained with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.config.hub import online, reason
from kd.data.text.teacher_tokens import same_vocabulary
from kd.errors import KdError

log = logging.getLogger(__name__)

TEACHER = "teacher_tokenizer"  # the option of data that can have a teacher of another tokenizer
FILES = ("tokenizer.json", "tokenizer_config.json")


def with_tokenizers(config: Mapping[str, Any], members: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Return the config's data, with the tokenizers of its networks where its options name none and some are found.

    ``tokenizer``, in the place of one that is trained: that of the pretrained student, by its name or folder; of the
    teacher, pretrained or of a run, where the student is cut from it, or where the data has one tokenizer for both.
    ``teacher_tokenizer``: found in the folder of a run or of a network of transformers that the teacher comes from, or
    by that network's name. ``members``: model and checkpoint of each teacher. Where a tokenizer cannot be loaded, or
    there are several teachers, the option stays as it is. The data makes nothing of a teacher's that has its own
    vocabulary.
    """
    data = dict(config["data"])
    two = TEACHER in data and data.get("masking") is None  # whether the teacher may have another one
    if "tokenizer" in data and (data["tokenizer"] is None or isinstance(data["tokenizer"], Mapping)):
        own = _named(config["student"]["model"])
        if own is None and len(members) == 1 and (config["student"].get("surgery") or not two):
            own = _place(*members[0])
        if own is not None:
            log.info("data.tokenizer = %s: the one that the network was trained with", own)
            data["tokenizer"] = own
    places = {place for model, checkpoint in members if (place := _place(model, checkpoint))}
    if not two or data[TEACHER] is not None or len(places) != 1:
        return data
    (place,) = places
    if place != data.get("tokenizer") and (found := _loaded(place)) is not None:
        data[TEACHER] = found
    return data


def refuse_another(model: Mapping[str, Any], path: str, data: Any) -> None:
    """Refuse a pretrained network whose tokenizer has other ids than the data's: they mean other tokens to it.

    ``model``: its node, called ``path`` in the sentence. A network without a tokenizer beside it is let through, and
    data without one.
    """
    name, tokenizer, restriction = _named(model), *(getattr(data, key, None) for key in ("tokenizer", "restriction"))
    if name is None or tokenizer is None or name == getattr(tokenizer, "name_or_path", None):
        return
    if (own := _loaded(name)) is None:
        return
    if restriction is None or len(restriction.kept) == restriction.whole:
        same = same_vocabulary(tokenizer, own)
    else:
        ids = own.get_vocab()
        same = all(ids.get(token) == restriction.kept[number] for token, number in tokenizer.get_vocab().items())
    if not same:
        raise KdError(
            f"{path}.name = {name} was trained with another tokenizer than data.tokenizer, so that ids mean other "
            f"tokens to it: set data.tokenizer={name}"
        )


def _loaded(place: str) -> Any:
    """Load the tokenizer of a folder or name; None where there is none."""
    from transformers import AutoTokenizer  # start-up: transformers

    local = Path(place).is_dir() or not online()
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # of many kinds: no such name, no connection, a library that it needs
        log.info("no tokenizer was found beside the network (%s: %s)", place, reason(error))
        return None


def _place(model: Any, checkpoint: Any) -> str | None:
    """Return the folder, or the name on the hub, of a teacher's tokenizer; None where nothing says any."""
    if checkpoint is None:
        return _named(model)
    run = Path(checkpoint).expanduser()
    folder = (run if run.is_dir() else run.parent) / "selected"
    return str(folder) if any((folder / file).is_file() for file in FILES) else None


def _named(model: Any) -> str | None:
    """Return the folder or name of a pretrained network of transformers that has a tokenizer; None of all others."""
    name = model.get("name") if isinstance(model, Mapping) and model.get("pretrained") else None
    if name is None or (Path(name).is_dir() and not any((Path(name) / file).is_file() for file in FILES)):
        return None
    return str(name) if str(model.get("_target_", "")).endswith(".transformers_model") else None
