"""Student and teacher of a checked config: networks with their weights, and what the teacher's input needs."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Collection, Mapping
from typing import Any

from hydra.utils import get_object
from torch import Tensor, nn

from kd.config.instantiate import first_line, make
from kd.config.keys import targets
from kd.data.text.vocabulary import unpadded
from kd.distill.answers import Answers
from kd.distill.teacher import InputMap, Teacher
from kd.errors import KdError
from kd.records import weight_files
from kd.run import described, integrity, library_networks, starting_weights
from kd.run.data_facts import same_data
from kd.run.tokenizers import refuse_another
from kd.tasks.base import Task

log = logging.getLogger(__name__)


def network(
    spec: Mapping[str, Any], path: str, num_classes: int | None, input_shape: tuple[int, ...], **more: Any
) -> nn.Module:
    """Make a network from its ``_target_``; it is given what it takes of the class count and the input's shape.

    So is each network inside of it, a node with a ``_target_`` among its arguments, at any depth. ``more``: what else
    it may take, see :func:`of_text`.
    """
    known: dict[str, Any] = {"num_classes": num_classes} if num_classes is not None else {}
    known |= {key: value for key, value in more.items() if value is not None}
    if len(input_shape) == 3:
        shape = {"input_shape": tuple(input_shape), "in_chans": input_shape[0], "in_channels": input_shape[0]}
        known |= shape
    elif len(input_shape) == 1 and known.get("tokenizer") is None:  # vectors, not token ids
        known["input_shape"] = tuple(input_shape)
    if not isinstance(spec, Mapping) or "_target_" not in spec:
        raise KdError(f"{path} = {spec} is not a network: it needs a _target_")
    try:
        accepted = inspect.signature(get_object(spec["_target_"])).parameters
    except Exception as error:
        raise KdError(f"{path}._target_ = {spec['_target_']}: {first_line(error)}") from error
    given = {k: v for k, v in known.items() if k in accepted and k not in spec}
    wanted = accepted.get("num_classes")
    if num_classes is None and wanted is not None and wanted.default is wanted.empty and "num_classes" not in spec:
        raise KdError(
            f"{path}._target_ = {spec['_target_']} takes num_classes, which the data does not tell: give "
            f"the data module an attribute num_classes (data.num_classes), or set {path}.num_classes"
        )
    if known.get("tokenizer") is not None:
        _takes_texts(spec, path, accepted)
    anything = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    if anything and "num_classes" in known and not str(spec["_target_"]).startswith("transformers."):
        given.setdefault("num_classes", spec.get("num_classes", num_classes))
    built = make(_completed(spec, known), path, **given)
    if not isinstance(built, nn.Module):
        raise KdError(f"{path}._target_ = {spec['_target_']} makes a {type(built).__name__}, not a torch module")
    if "restriction" in known:
        library_networks.restrict(built, known["restriction"], known["tokenizer"], path)
    return built


def _takes_texts(spec: Mapping[str, Any], path: str, accepted: Mapping[str, inspect.Parameter]) -> None:
    """Refuse a network that must be told the shape of images or vectors."""
    shape = accepted.get("input_shape")
    if shape is None or shape.default is not shape.empty or "input_shape" in spec:
        return
    role = path.partition(".")[0]
    cut = ", or cut the student from the teacher by model@student=none and student.surgery" if role == "student" else ""
    raise KdError(
        f"{path}._target_ = {spec['_target_']} takes no texts: give a network of transformers, "
        f"model@{role}=transformers {path}.name=NAME{cut}"
    )


def _completed(spec: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a network's node with what the nodes inside of it take of ``known`` and do not set."""

    def filled(node: Any) -> Any:
        if isinstance(node, list):
            return [filled(part) for part in node]
        if not isinstance(node, Mapping):
            return node
        inner = {key: filled(value) for key, value in node.items()}
        if "_target_" not in inner:
            return inner
        try:
            accepted = inspect.signature(get_object(inner["_target_"])).parameters
        except Exception:  # said, with its path, where it is made
            return inner
        return {**{k: v for k, v in known.items() if k in accepted}, **inner}

    return {key: filled(value) for key, value in spec.items()}


def of_text(data: Any, task: Task) -> dict[str, Any]:
    """Give what factories of language models take: the architecture that the task wants, the tokenizer of the data.

    Beside them, for :func:`network`, how the data restricts that tokenizer.
    """
    own = {name: getattr(data, name, None) for name in ("tokenizer", "restriction")}
    return {"architecture": task.architecture, **own}


def trained(
    spec: Mapping[str, Any],
    path: str,
    data: Any,
    more: Mapping[str, Any],
    file: tuple[dict[str, Tensor], Mapping[str, Any], Any],
    input_shape: tuple[int, ...] | None = None,
    new_head: bool = False,
) -> nn.Module:
    """Make a network with the weights of a ``file``: its state dict, what it says of itself, its name; see `network`.

    ``new_head``: but for its classifier, which is random, see :func:`kd.run.starting_weights.put`.
    One that was not trained with the tokenizer as the data restricts it is cut to the kept tokens afterwards.
    """
    state, about, source = file
    recorded = about.get("data", {})
    cut = "vocabulary" in recorded and recorded.get("tokenizer") == data.tokenizer_digest
    whole = more.get("restriction") is not None and not cut
    given = {**more, "restriction": None} if whole else more
    known = recorded.get("vocabulary") or {}
    if cut and more.get("restriction") is None and known["kept"] == known["of"]:
        # its network had lost the rows behind the tokenizer, which the one that the config names may have
        given = {**more, "restriction": unpadded(data.tokenizer, data.tokenizer_digest)}
    # where the data of this run does not tell
    classes = recorded.get("num_classes") if data.num_classes is None and not new_head else data.num_classes
    net = network(spec, path, classes, input_shape or data.input_shape, **given)
    starting_weights.put(net, state, about, source, path.partition(".")[0], new_head)
    if whole:
        library_networks.restrict(net, data.restriction, data.tokenizer, str(source))
    return net


def student(config: Mapping[str, Any], data: Any, task: Task, teacher: Answers | None = None) -> nn.Module:
    """Make the student, from scratch, from its teacher (``student.surgery``), or from ``student.checkpoint``."""
    section = config["student"]
    checkpoint, more, new_head = section["checkpoint"], of_text(data, task), bool(section.get("new_head"))
    if section.get("surgery"):
        net = library_networks.cut_from(teacher, section["surgery"])
    elif checkpoint is None:
        refuse_another(section["model"], "student.model", data)
        net = network(section["model"], "student.model", data.num_classes, data.input_shape, **more)
    if checkpoint is not None:
        state, about = integrity.read_weights(checkpoint, section.get("epoch"))
        source = f"student.checkpoint = {checkpoint}"
        same_data(about.get("data", {}), data, source, None if new_head else starting_weights.NEW_HEAD["student"])
        _refuse_heads(about, source)
        if section.get("surgery"):
            starting_weights.put(net, state, about, checkpoint, "student", new_head)
        else:
            net = trained(section["model"], "student.model", data, more, (state, about, checkpoint), None, new_head)
    pretrained = checkpoint is None and (section["model"] or {}).get("pretrained")
    if pretrained and (getattr(net, "pretrained_cfg", None) or {}).get("num_classes") not in (None, data.num_classes):
        starting_weights.renew_heads(net)
    if data.mean and (pretrained or (checkpoint is not None and not about.get("data"))):
        _warn_of_other_statistics(getattr(net, "pretrained_cfg", None) or {}, data)
    return net


def _warn_of_other_statistics(own: Mapping[str, Any], data: Any) -> None:
    """Say where the weights that a student begins with were trained on inputs of another mean or spread."""
    if any(list(own.get(key) or getattr(data, key)) != list(getattr(data, key)) for key in ("mean", "std")):
        log.warning(
            "the student was pretrained on inputs of mean %s, std %s, the data has %s, %s: set data.mean, data.std",
            *(own.get("mean"), own.get("std"), data.mean, data.std),
        )


def description(network: nn.Module, node: Any) -> Any:
    """Return the node that makes a network again from its weights file: its own, or one that needs no other folder."""
    if "transformers" not in sys.modules:
        return node
    from kd.models.transformers_model import description as of_library  # start-up: transformers

    return of_library(network) or node


def _refuse_heads(about: Mapping[str, Any], source: str) -> None:
    """Refuse a student that has kept heads of its terms: its network is more than what a config can name."""
    if heads := about.get("heads"):
        raise KdError(
            f"{source} is a student that keeps a head of loss.{', loss.'.join(heads)}: kd eval RUN and resume=RUN make "
            "it again from the config of its run, no other run can"
        )


def teacher(config: Mapping[str, Any], data: Any, task: Task) -> Answers | None:
    """Make what the teacher's answers come from; None when no model, checkpoint or ``teacher.answers`` is given."""
    live, node = _live_teacher(config, data, task), config["teacher"].get("answers")
    if node is None:
        return live
    known = {"teacher": live, "data": data, "task": task}
    try:
        accepted = inspect.signature(get_object(node["_target_"])).parameters
    except Exception as error:
        raise KdError(f"teacher.answers = {node}: {first_line(error)}") from error
    built = make(node, "teacher.answers", **{k: v for k, v in known.items() if k in accepted and k not in node})
    if not isinstance(built, Answers):
        raise KdError(f"teacher.answers._target_ = {node['_target_']} is not a kd.distill.answers.Answers")
    return built


def _live_teacher(config: Mapping[str, Any], data: Any, task: Task) -> Teacher | None:
    """Make the frozen network, or several."""
    section = config["teacher"]
    pairs = teacher_members(section)
    if not pairs:
        if section.get("cache"):
            raise KdError("teacher.cache = true needs a teacher: give teacher.checkpoint=RUN or model@teacher=NAME")
        return None
    student, data = data, getattr(data, "for_teacher", data)
    if data is not student and config["student"].get("surgery"):
        raise KdError(
            "student.surgery makes the student from the teacher, so they have one tokenizer: data.tokenizer must be "
            "the teacher's"
        )
    named = {node["_target_"] for role in ("student", "teacher") for _, node in targets(config[role]["model"])}
    members = [_member(model, checkpoint, section, data, named, of_text(data, task)) for model, checkpoint in pairs]
    networks, maps = [n for n, _ in members], [i for _, i in members]
    built = Teacher(
        networks,
        maps,
        section["combine"],
        section["weights"],
        bool(section.get("cache")),
        task,
        section.get("optimize", True),
    )
    built.sources = [weight_files.source_of(c, section.get("epoch")) for _, c in pairs if c is not None]
    return built


def teacher_members(section: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Return model and checkpoint of each teacher of a config, None for what is not given; [] without a teacher."""
    models, checkpoints = _as_list(section["model"]), _as_list(section["checkpoint"])
    if len(checkpoints) > 1 and len(models) == 1:
        models = models * len(checkpoints)
    count = max(len(models), len(checkpoints))
    models += [None] * (count - len(models))
    checkpoints += [None] * (count - len(checkpoints))
    return list(zip(models, checkpoints, strict=True))


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _member(
    model: Any, checkpoint: Any, section: Mapping[str, Any], data: Any, named: Collection[str], more: Mapping[str, Any]
) -> tuple[nn.Module, nn.Module]:
    state, about = (None, {}) if checkpoint is None else integrity.read_weights(checkpoint, section.get("epoch"))
    if model is None and about.get("model") is None:
        raise KdError(
            f"teacher.checkpoint = {checkpoint} does not say which network it belongs to: add model@teacher=NAME"
        )
    spec = model
    if spec is None:
        spec = described.network(
            about["model"], f"teacher.checkpoint = {checkpoint}", named, bool(section.get("trust"))
        )
    recorded = about.get("data", {})
    same_data(recorded, data, f"teacher.checkpoint = {checkpoint}", starting_weights.NEW_HEAD["teacher"])
    _refuse_heads(about, f"teacher.checkpoint = {checkpoint}")
    shape = tuple(recorded.get("input_shape", data.input_shape)) if spec is not model else data.input_shape
    if state is not None:
        net = trained(spec, "teacher.model", data, more, (state, about, checkpoint), shape)
    else:
        refuse_another(spec, "teacher.model", data)
        net = network(spec, "teacher.model", data.num_classes, shape, **more)
    if state is None and not spec.get("pretrained") and not section["allow_random"]:
        raise KdError(
            "the teacher has random weights: give teacher.checkpoint=RUN (or a weights file), a pretrained model, or "
            "ask for it with teacher.allow_random=true"
        )
    pretrained: Mapping[str, Any] = {}
    if state is None and spec.get("pretrained"):
        pretrained = getattr(net, "pretrained_cfg", None) or {}
        _own_head(pretrained, data, section["allow_random"])
        fresh = getattr(net, "random_weights", [])
        if fresh and not section["allow_random"]:
            raise KdError(
                f"the teacher's {', '.join(fresh[:2])} have no weights in {spec.get('name')}, they would be random: "
                "fine-tune it first and give that run as teacher.checkpoint, or set teacher.allow_random=true if no "
                "term reads its logits"
            )
    elif state is not None and not recorded and section["mean"] is None and data.mean:
        log.warning(
            "%s does not record the statistics of its input: the data's are used (set teacher.mean and teacher.std)",
            checkpoint,
        )
    if not data.mean:  # not images that were normalised: fed as they are
        return net, nn.Identity()
    mean = _statistics("mean", section, recorded, pretrained)
    std = _statistics("std", section, recorded, pretrained)
    size = pretrained.get("input_size", recorded.get("input_shape", data.input_shape))
    return net, InputMap(data.mean, data.std, mean, std, _resize(section["resize"], size, data.input_shape))


def _own_head(pretrained: Mapping[str, Any], data: Any, allow_random: bool) -> None:
    """Refuse a pretrained network of other classes than the data's: its classifier would be new and random."""
    own = pretrained.get("num_classes")
    if own is not None and own != data.num_classes and not allow_random:
        raise KdError(
            f"the teacher was pretrained on {own} classes, the data has {data.num_classes}: its classifier would be "
            "random. Fine-tune it first (model@student=timm student.model.pretrained=true, loss=[ce]) and give that "
            "run as teacher.checkpoint, or set teacher.allow_random=true if no term reads its logits"
        )


def _statistics(
    which: str, section: Mapping[str, Any], recorded: Mapping[str, Any], pretrained: Mapping[str, Any]
) -> list[float] | None:
    """Return statistics of the teacher's input, by rank: the user's, those of its run, what came with the weights."""
    for source in (section, recorded, pretrained):
        if source.get(which):  # [] where the inputs of a run were not normalised
            return list(source[which])
    return None


def _resize(asked: Any, expected: Any, given: Any) -> int | None:
    """Return the edge to resize a teacher's input to, or None. Refuses sizes that differ unless the user decided."""
    if asked is False:
        return None
    if asked is not None:
        if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
            raise KdError(f"teacher.resize = {asked} is not allowed: an edge in pixels, false, or null")
        return asked
    if tuple(expected[-2:]) != tuple(given[-2:]):
        raise KdError(
            f"the teacher expects {expected[-2]}×{expected[-1]} images, the data gives {given[-2]}×{given[-1]}: set "
            f"teacher.resize={expected[-1]} to resize them, or teacher.resize=false to feed them as they are"
        )
    return None
