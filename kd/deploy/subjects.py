"""The networks that ``kd bench`` measures: of a run, of a weights file, of timm and of transformers.

Inputs are drawn at random: what a network costs depends on their shape alone, and no data is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kd.deploy.formats import TIMM
from kd.deploy.student import FromRaw, Student, from_raw, recorded, student
from kd.distill.cache import CachedAnswers
from kd.errors import KdError
from kd.records import record
from kd.run import build, described, integrity, networks
from kd.tasks.base import Task
from kd.tasks.classification import Classification
from kd.tasks.embedding import Embedding
from kd.tasks.text_classification import TextClassification
from kd.tasks.text_regression import TextRegression
from kd.tasks.tokens import CausalLM, MaskedLM

# ending of the name of a class of transformers → the task that it is called by; all others are encoders
HEADS: Mapping[str, type[Task]] = {
    "ForCausalLM": CausalLM,
    "LMHeadModel": CausalLM,
    "ForMaskedLM": MaskedLM,
    "ForSequenceClassification": TextClassification,
}
TASKS: tuple[type[Task], ...] = (Classification, TextClassification, TextRegression, CausalLM, MaskedLM, Embedding)


@dataclass(frozen=True)
class Subject:
    """A network in eval mode from raw inputs to answers, and what is known of its size.

    ``added``: parameters of heads that terms leave on the student; ``adapters``: of the training alone;
    ``file_bytes``: of its weights file, None where there is none (random weights); ``vocabulary``: ids, 0 of images.
    """

    name: str
    module: FromRaw
    shape: tuple[int, ...]
    vocabulary: int = 0
    added: int = 0
    adapters: int = 0
    file_bytes: int | None = None
    generates: bool = False

    @property
    def parameters(self) -> int:
        """All of the network that answers."""
        return sum(p.numel() for p in self.module.network.parameters())

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters and buffers in memory."""
        tensors = [*self.module.network.parameters(), *self.module.network.buffers()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def example(self, samples: int, length: int, seed: int = 0) -> dict[str, Tensor]:
        """Draw raw inputs of so many samples; ``length``: of texts, in tokens."""
        random = torch.Generator().manual_seed(seed)
        if self.vocabulary:
            ids = torch.randint(0, self.vocabulary, (samples, length), generator=random)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.module.names == ("images",):
            return {"images": torch.randint(0, 256, (samples, *self.shape), dtype=torch.uint8, generator=random)}
        return {"inputs": torch.randn(samples, *self.shape, generator=random)}


def subject(source: str, beside: str | None = None, pretrained: bool = False) -> Subject:
    """Make what a source names: a run, a weights file, ``timm:NAME``, ``hf:NAME``; ``teacher``: that of ``beside``.

    ``pretrained``: of timm and transformers, whether the weights are fetched; random ones cost the same. ``KdError``
    where there is no such network.
    """
    kind, _, name = source.partition(":")
    if source == "teacher":
        if beside is None or not Path(beside).is_dir():
            raise KdError("against = teacher needs a run, whose teacher it is: kd bench RUN against=teacher")
        return _teacher(beside)
    if kind == "timm":
        return _timm(name, pretrained)
    if kind == "hf":
        return _transformers(name, pretrained)
    if Path(source).is_dir():
        return _student(source)
    if Path(source).is_file():
        return _file(source)
    raise KdError(f"{source} is neither a run, a weights file, timm:NAME nor hf:NAME")


def _made(name: str, given: Student, **more: Any) -> Subject:
    network: Any = given.network
    inner = getattr(network, "encoder", network)
    vocabulary = int(getattr(getattr(inner, "config", None), "vocab_size", 0)) if given.task.architecture else 0
    ids = torch.zeros(1, 1, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": ids} if vocabulary else None
    shape = tuple(given.facts.get("input_shape") or ())
    generates = given.task.architecture == "causal_lm"
    return Subject(name, from_raw(given, inputs), shape, vocabulary, generates=generates, **more)


def _student(run: str) -> Subject:
    given = student(run)
    part = record.read(run).get("student") or {}
    return _made(
        f"student of {run}",
        given,
        added=_added(given),
        adapters=int(part.get("adapter_parameters", 0)),
        file_bytes=given.file.stat().st_size,
    )


def _added(given: Student) -> int:
    """Count the parameters that heads of terms add to the network that the config names."""
    if given.node is not None or given.config["student"]["model"] is None:
        return 0
    bare = networks.network(
        given.config["student"]["model"], "student.model", given.facts["num_classes"], given.facts["input_shape"]
    )
    return sum(p.numel() for p in given.network.parameters()) - sum(p.numel() for p in bare.parameters())


def _teacher(run: str) -> Subject:
    """Return the one network that taught, with the resizing of its input."""
    beside = student(run)
    config = {**beside.config, "teacher": {**beside.config["teacher"], "allow_random": True}}
    data = recorded(beside.facts, beside.tokenizer)
    return _of_answers(f"run = {run}", networks.teacher(config, data, beside.task), beside)


def _of_answers(name: str, teacher: Any, beside: Student) -> Subject:
    """Make the one live network of a teacher. ``beside``: its student. ``KdError`` where there is none, or several."""
    if isinstance(teacher, CachedAnswers):
        teacher = teacher.teacher
    if teacher is None or len(teacher.networks) != 1:
        count = "no teacher" if teacher is None else f"{len(teacher.networks)} teachers"
        raise KdError(f"{name} has {count}: one is measured (kd bench RUN against=RUN measures another)")
    network, prepare = teacher.networks[0], teacher.input_maps[0]
    section = beside.config["teacher"]
    whole = network if isinstance(prepare, nn.Identity) else nn.Sequential(prepare, network)
    given = replace(beside, file=Path(), node=None, network=whole.float().eval())
    return _made(f"teacher of {name}", given, file_bytes=_bytes(section["checkpoint"], section.get("epoch")))


def of_config(config: Mapping[str, Any]) -> dict[str, Subject]:
    """Make the student of a config that was never trained, with random weights, and its teacher where it has one.

    ``KdError`` where they cannot be made, or where there are several teachers.
    """
    section = config["student"]
    node = section["model"] and {
        **section["model"],
        **({"pretrained": False} if "pretrained" in section["model"] else {}),
    }
    taught = any(config["teacher"].get(key) for key in ("model", "checkpoint", "answers"))
    config = {
        **config,
        "student": {**section, "model": node, "checkpoint": None},
        "teacher": {**config["teacher"], "allow_random": True},
    }
    data, task = build.datamodule(config), build.task(config)
    teacher = networks.teacher(config, data, task) if taught else None
    network = networks.student(config, data, task, teacher).float().eval()
    names = ("num_classes", "class_names", "mean", "std", "input_shape")
    facts = {name: getattr(data, name, None) for name in names}
    made = Student(Path(), Path(), config, node, network, task, facts, getattr(data, "tokenizer", None))
    found = {"student": _made("student", made)}
    return {**found, **({"teacher": _of_answers("the config", teacher, made)} if taught else {})}


def _bytes(checkpoint: Any, epoch: str | None) -> int | None:
    from kd.records import weight_files  # start-up: not needed to measure a network of a library

    if isinstance(checkpoint, list):
        checkpoint = checkpoint[0]
    return None if checkpoint is None else weight_files.locate(checkpoint, epoch).stat().st_size


def _file(source: str) -> Subject:
    """Read a weights file that says which network it belongs to."""
    state, about = integrity.read_weights(source)
    facts = about.get("data") or {}
    if about.get("model") is None or about.get("heads"):
        raise KdError(f"checkpoint = {source} does not say which network it belongs to: give the directory of its run")
    node = described.network(about["model"], source)
    data = SimpleNamespace(num_classes=facts.get("num_classes"), input_shape=tuple(facts.get("input_shape") or ()))
    network = networks.trained(node, "student.model", data, {}, (state, about, source))
    task = next((kind() for kind in TASKS if kind.architecture == node.get("architecture")), Classification())
    given = Student(Path(source).parent, Path(source), {"data": {}}, node, network.float().eval(), task, facts)
    return _made(source, given, file_bytes=Path(source).stat().st_size)


def _timm(name: str, pretrained: bool) -> Subject:
    import timm

    from kd.models.timm_model import timm_model  # start-up: timm

    try:
        known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        shape = (3, 224, 224) if known is None else known.input_size
        network = timm_model(name, pretrained, input_shape=shape)
    except ValueError as error:
        raise KdError(f"timm:{name}: {error}") from error
    own: Any = network
    facts = {"input_shape": shape, "mean": own.pretrained_cfg["mean"], "std": own.pretrained_cfg["std"]}
    given = Student(
        Path(), Path(), {"data": {}}, {"_target_": TIMM, "name": name}, network.eval(), Classification(), facts
    )
    return _made(f"timm:{name}", given)


def _transformers(name: str, pretrained: bool) -> Subject:
    """Load a model of the hub, or of a folder with ``config.json``, by the head that its configuration names."""
    from transformers import AutoConfig

    from kd.config.hub import online, reason  # start-up: with transformers
    from kd.models.transformers_model import transformers_model  # start-up: transformers

    try:
        local = Path(name).is_dir() or not online()
        found = AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
        written = (found.architectures or [""])[0]
        task: Task = next((kind() for ending, kind in HEADS.items() if written.endswith(ending)), Embedding())
        network = transformers_model(name, pretrained, architecture=task.architecture)
    except (ValueError, OSError) as error:
        raise KdError(f"hf:{name}: {reason(error)}") from error
    return _made(f"hf:{name}", Student(Path(), Path(), {"data": {}}, None, network.eval(), task, {}))
