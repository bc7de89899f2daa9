"""What decides a teacher's answers, as digests: its weights, the tokenizer, the data as they are seen, the task."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd.data.base import as_batch
from kd.data.images.base import DataModule
from kd.data.text.base import TextModule
from kd.data.text.tokenizer import digest as tokenizer_digest
from kd.distill.cache_forms import Form
from kd.distill.teacher import Teacher
from kd.errors import KdError
from kd.losses.base import Batch
from kd.tasks.base import Task

# key → what a sentence says of a cache with another one
DIFFERS = {
    "teacher": "is of another teacher",
    "tokenizer": "is of another tokenizer",
    "data": "is of other training data",
    "seen": "is of a teacher that has seen the data otherwise",
    "task": "is of another task",
    "arithmetic": "was computed in another precision",
    "kept": "keeps something else",
}


def key_of(facts: Mapping[str, Any]) -> str:
    """Return sixteen hexadecimal digits of all facts: the name of a cache."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return the end of a sentence on the first fact in which a cache differs from what a run needs; "" if none does.

    What is not known of one of the two (a teacher that is not there) is not compared.
    """
    for name, words in DIFFERS.items():
        one, other = there.get(name), here.get(name)
        if (name in here and name in there) and one != other:
            return f"{words} ({name} {one or 'none'} there, {other or 'none'} in this run)"
    return ""


def facts_of_run(data: Any, task: Task, form: Form) -> dict[str, Any]:
    """Return facts that are known without the teacher; ``data`` is read once where it has no digest of its own."""
    own = own_kind(data) or getattr(data, "own", data)
    known = sorted((k, v) for k, v in vars(task).items() if isinstance(v, (str, int, float, bool, type(None))))
    return {
        "tokenizer": _tokenizer(own),
        "data": _data(data),
        "seen": _seen(own),
        "task": f"{type(task).__module__}.{type(task).__qualname__} {dict(known)}",
        "kept": form.described(),
    }


def arithmetic(teacher: nn.Module, device: torch.device) -> str:
    """Name the precision that a teacher answers in, here and now."""
    own = sorted({str(p.dtype).removeprefix("torch.") for p in teacher.parameters()})
    if torch.is_autocast_enabled(device.type):
        own.append(f"autocast to {str(torch.get_autocast_dtype(device.type)).removeprefix('torch.')}")
    return ", ".join(own)


def digest_of_teacher(teacher: Teacher) -> str:
    """Compute the digest of weights, architecture, how inputs are made and how several answers are combined."""
    found = hashlib.blake2b(digest_size=8)
    several = [] if len(teacher.networks) == 1 else [teacher.combine, *map(repr, teacher.shares)]
    for part in several:
        found.update(part.encode())
    for network, prepare in zip(teacher.networks, teacher.input_maps, strict=True):
        found.update(_architecture(network).encode())
        for name, tensor in sorted(network.state_dict().items()):
            _update(found, name, tensor)
        found.update(f"{type(prepare).__name__} {getattr(prepare, 'resize', None)}".encode())
        for name, buffer in sorted(prepare.named_buffers()):
            _update(found, name, buffer)
    return found.hexdigest()


def _architecture(network: nn.Module) -> str:
    kinds = " ".join(f"{type(m).__module__}.{type(m).__qualname__}" for m in network.modules())
    aside = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
    settings = {}
    for name, module in network.named_modules():
        config: Any = getattr(module, "config", None)
        known = config.to_dict() if hasattr(config, "to_dict") else {}
        numbers = {k: v for k, v in vars(module).items() if k != "training" and isinstance(v, (str, int, float))}
        settings[name] = {**{k: v for k, v in known.items() if k not in aside}, **numbers}
        settings[name] |= {"scaling": getattr(module, "scaling", None)}  # of low-rank matrices
    shown = re.sub(r" at 0x[0-9a-f]+", "", f"{network} {json.dumps(settings, sort_keys=True, default=str)}")
    return f"{kinds} {shown}"


def _update(found: Any, name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):  # extra state of a module
        found.update(f"{name} {tensor!r}".encode())
        return
    plain = tensor.detach().cpu().contiguous()
    found.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
    if plain.numel():
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data)


def _tokenizer(own: Any) -> str | None:
    if getattr(own, "tokenizer", None) is None:
        return None
    if isinstance(known := getattr(own, "tokenizer_digest", None), str):
        return known
    return tokenizer_digest(own.tokenizer)


def _seen(own: Any) -> str:
    """Compute the digest of how samples become inputs: what the content of the data does not say."""
    names: tuple[str, ...] = ("mean", "std", "input_shape", "image_size", "crop_pct")
    if isinstance(own, TextModule):
        names = ("mean", "std")  # the longest row may be one of validation, and changes no answer
    found = {name: _plain(getattr(own, name)) for name in names if getattr(own, name, None)}
    if isinstance(own, DataModule) and own.moving is not None:
        found |= {"augment": asdict(own.augment), "mixup": own.mixup, "view": own.teacher_view, "seed": own.seed}
    if isinstance(own, TextModule):
        found |= {"form": str(getattr(own, "form", None))}
    return hashlib.blake2b(json.dumps(found, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def own_kind(data: Any) -> DataModule | TextModule | None:
    """Return a data module of kd itself, which knows what it consists of; None: another one."""
    own = getattr(data, "own", data)
    if not isinstance(own, (DataModule, TextModule)):
        return None
    own.setup()
    return own


def answering(data: Any, view: int | None = None) -> Any:
    """Return batches of the training set once, in order; of one ``view`` where there are several."""
    loader = getattr(getattr(data, "own", data), "answering_dataloader", None) or data.answering_dataloader
    return loader() if view is None else loader(view)


def _data(data: Any) -> str:
    found, own = hashlib.blake2b(digest_size=8), own_kind(data)
    if own is not None:
        if not isinstance(own, TextModule):
            found.update(json.dumps([own.content, own.split_facts], sort_keys=True, default=str).encode())
        found.update(own.train_index.numpy().tobytes())
        if isinstance(own, TextModule):  # the inputs themselves: other texts to validate on change no answer
            for name, array in own.parts["train"].arrays():
                found.update(f"{name} {array.dtype} {array.shape}".encode())
                found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()
    seen = sorted(_samples(answering(data)))
    for index, one in seen:
        found.update(f"{index} {one}".encode())
    return found.hexdigest()


def _samples(batches: Any) -> Iterator[tuple[int, str]]:
    """Index and digest of each sample of data of which nothing is known, in whatever order they come."""
    for batch in map(as_batch, batches):
        for place, index in enumerate(index_of(batch).tolist()):
            found = hashlib.blake2b(digest_size=8)
            views = {name: view for name, view in batch.views.items() if name == "teacher"}
            parts = Batch(batch.inputs, batch.targets, mask=batch.mask, views=views)
            _update_all(found, parts, place, len(batch))
            yield index, found.hexdigest()


def _update_all(found: Any, batch: Batch, place: int, count: int) -> None:
    def one(tensor: Tensor) -> Tensor:
        _update(found, "", tensor[place] if tensor.ndim and len(tensor) == count else tensor)
        return tensor

    batch.map(one)


def index_of(batch: Batch) -> Tensor:
    """Return the index (samples,) of a batch. ``KdError`` where the data gives none."""
    if batch.index is None:
        raise KdError("teacher.answers keeps answers by the index of each sample, the data gives none")
    return batch.index
