"""Measure the networks of a config, or of a run, through the same build and the same metrics as in training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd.config.checks import check
from kd.config.composition import flat
from kd.config.schema import Root, Teacher
from kd.errors import KdError, did_you_mean
from kd.records import record
from kd.records.weight_files import TRAINED_ALONG
from kd.run import integrity

RESOLVED = {
    "seed": "set data.seed or data.split_seed",
    "paths.data": "set data.root",
    "student.checkpoint": "leave out run= to measure a checkpoint",
}

TYPES = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}  # precision → that of the weights


def run_config(run: str | Path, overrides: Sequence[str] = (), own: Collection[str] = ()) -> dict[str, Any]:
    """Read the config of a run and change some keys. ``KdError`` for keys that it does not have, or an edited file."""
    config = record.read_config(run)
    if record.from_python(config):
        raise KdError(f"run={run}: that run was started by kd.distill, its networks are not in its config.yaml")
    before = record.read(run) if (Path(run) / record.FILE).is_file() else {}
    if differs := integrity.config_changed(config, before):
        raise KdError(
            f"run = {run}: config.yaml was changed since the run began ({differs}): put it back, and give what is to "
            "be other for this measurement as KEY=VALUE"
        )
    return changed(config, overrides, own)


def changed(config: Mapping[str, Any], overrides: Sequence[str], own: Collection[str] = ()) -> dict[str, Any]:
    """Change some keys of a run's resolved config. ``KdError`` for keys that it does not have.

    ``own``: names that the caller takes itself, and may have been meant.
    """
    known = set(flat({**config, "teacher": {**asdict(Teacher()), **config["teacher"]}}))  # runs of before an option
    for override in overrides:
        key = override.partition("=")[0]
        if key not in known:
            raise KdError(
                f"{override}: the run has no key {key}{did_you_mean(key, {*known, *own})} (groups cannot be changed)"
            )
        if key in RESOLVED:
            raise KdError(f"{override} changes nothing here, a run's config is resolved: {RESOLVED[key]}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Root), config, OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise KdError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    return check(merged, training=False)  # type: ignore[arg-type]


def evaluate(
    config: dict[str, Any],
    who: str = "student",
    split: str = "test",
    weights_file: Path | None = None,
    keep: dict[str, Any] | None = None,
    run: str | Path | None = None,
) -> dict[str, Any]:
    """Measure a config's student or teacher on one split.

    ``weights_file``: the student's weights, else ``student.checkpoint``; a student without weights is refused.
    ``keep`` collects index, target and logits of every row. ``run``: whose config it is. A teacher whose weights are
    nowhere is refused, and beside a student left out: ``without`` says so. So is one that knows the training samples
    alone, or whose outputs are not those of the student.
    """
    import torch

    from kd.distill.evaluation import measure  # start-up: torch, as all of these
    from kd.losses.base import Batch  # start-up
    from kd.run import build, networks, trainer  # start-up

    trainer.quieten()
    source = weights_file or config["student"]["checkpoint"]
    if who == "student" and source is None:
        raise KdError("the student has no weights: give run=RUN or student.checkpoint=FILE")
    data = build.datamodule(config)
    data.setup("test")
    without = unkept_teacher(config, run)
    task = build.task(config)
    if keep is not None and task.row != "sample":
        raise KdError(f"answers are kept by sample, and a row of task = {config['task']['_target_']} is a {task.row}")
    teacher = _made_again(config, data, task, run) if without else networks.teacher(config, data, task)
    without = "" if teacher is not None else without
    if without and who == "teacher":
        raise KdError(f"{without}: there is nothing to measure (teacher.checkpoint=RUN measures another one)")
    device = torch.device("cuda" if torch.cuda.is_available() and config["hardware"]["accelerator"] != "cpu" else "cpu")
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    dtype = getattr(torch, TYPES.get(config["hardware"]["precision"], "float32"))  # of the weights, as in the run

    def answers(network: Any) -> Any:
        return lambda batch: network(batch.cast(dtype))

    few: Batch = task.rows(task.few(next(iter(loader))).to(device))
    data_of_who = getattr(data, "for_teacher", data) if who == "teacher" else data
    beside = None
    if teacher is not None:
        if not teacher.live and who == "teacher":
            raise KdError("the teacher knows its answers to the training samples only: it cannot be measured")
        beside = answers(teacher.to(device=device, dtype=dtype).measured) if teacher.live else None
    if who == "teacher":
        if beside is None:
            raise KdError("there is no teacher: give teacher.checkpoint=RUN or model@teacher=NAME")
        source = config["teacher"]["checkpoint"]
        network, beside = beside, None
        loader, few = (batch.of_teacher for batch in loader), few.of_teacher
    else:
        network = answers(_student(config, data, task, source, weights_file is not None, (device, dtype)))
    with torch.no_grad():
        outputs = {name: made(few) for name, made in ((who, network), ("teacher", beside)) if made is not None}
    task.agree(outputs[who], outputs[who], data_of_who.num_classes, compared=False)
    if beside is not None and (why := _incomparable(outputs, few)):
        beside, without = None, why
    classes = data_of_who.num_classes if data_of_who.num_classes is not None else _width(outputs[who])
    metrics, per_class = measure(task, classes, network, loader, device, beside, keep, f"the {who} ({source})", split)
    names = data.class_names or [str(number) for number in range(len(per_class))]
    return {
        "who": who,
        "split": split,
        "source": str(source),
        "rows": data.sizes[split],
        "metrics": metrics,
        "per_class": dict(zip(names, per_class, strict=True)) if per_class else {},
        "by_class": task.metrics[0].by_class,
        **({"without": without} if without else {}),
    }


def _incomparable(outputs: Mapping[str, Any], few: Any) -> str:
    """Tell why the teacher cannot be measured beside the student; "" where it can."""
    if few.of_teacher is not few:
        return "the teacher has another tokenizer, and is measured alone (who=teacher)"
    widths = {name: _width(output) for name, output in outputs.items()}
    if widths["teacher"] != widths["student"]:
        return f"the teacher answers {widths['teacher']} outputs a row, the student {widths['student']}"
    return ""


def _width(output: Any) -> int | None:
    """Return the number of outputs a row, None for a network without logits."""
    return output.logits.shape[-1] if output.has_logits else None


def _student(
    config: dict[str, Any], data: Any, task: Any, source: Any, of_the_run: bool, like: tuple[Any, Any]
) -> Callable[[Any], Any]:
    """Make the student with its weights, as a function of batches; with the heads that its run's terms left on it."""
    import torch

    from kd.distill.teacher import InputMap  # start-up: torch, as all of these
    from kd.run import described  # start-up
    from kd.run.data_facts import same_data  # start-up
    from kd.tasks.base import Want  # start-up

    device, dtype = like
    state, about = integrity.read_weights(source, None if of_the_run else config["student"].get("epoch"))
    recorded = about.get("data", {})
    same_data(recorded, data, str(source))
    if list(recorded.get("input_shape", data.input_shape)) != list(data.input_shape):
        raise KdError(f"{source} was trained on images of shape {recorded['input_shape']}, not {data.input_shape}")
    node = config["student"]["model"]
    if node is None and not about.get("heads"):  # it was made from its teacher: the file says what came out
        node = described.network(about.get("model"), str(source))
    network = student_network(config, data, task, node, (state, about, source))
    network.to(device=device, dtype=dtype).eval()
    own = [recorded.get(name) or None for name in ("mean", "std")]
    prepare = InputMap(data.mean, data.std, *own) if data.mean else torch.nn.Identity()
    prepare.to(device=device, dtype=dtype)
    return lambda batch: task.answer(network, prepare(batch.inputs), batch, Want())


def student_network(
    config: Mapping[str, Any], data: Any, task: Any, node: Any, file: tuple[dict[str, Any], Mapping[str, Any], Any]
) -> Any:
    """Make the network of a student's weights ``file``, see :func:`kd.run.networks.trained`, with heads of its terms.

    ``node``: what makes it, where no term leaves a head; with one it is made as in its run.
    """
    from kd.run import build, networks, weights  # start-up: torch

    state, about, source = file
    if not about.get("heads"):
        return networks.trained(node, "student.model", data, networks.of_text(data, task), file)
    start = {**config["student"], "checkpoint": None, "epoch": None}
    network = build.distiller({**config, "student": start}, data).trained
    weights.load(network, state, source, "student")
    return network


def _made_again(config: Mapping[str, Any], data: Any, task: Any, run: str | Path | None) -> Any:
    """Make the teacher of ``run``, which has no checkpoint, where its own code gives it the weights that taught."""
    from kd.run import networks, weights  # start-up: torch

    there = record.read(run).get("teacher") or {} if run is not None and (Path(run) / record.FILE).is_file() else {}
    if there.get("digest") is None or there.get("weights") == TRAINED_ALONG:
        return None
    made = networks.teacher(config, data, task)
    return made if made is not None and weights.digest(made.state_dict()) == there["digest"] else None


def unkept_teacher(config: Mapping[str, Any], run: str | Path | None = None) -> str:
    """Tell why the network that taught cannot be had: its weights were random, or the run changed them; else ""."""
    from kd.run.networks import teacher_members  # start-up: torch

    if run is not None and (Path(run) / record.FILE).is_file():
        about = record.read(run).get("teacher") or {}
        if about.get("weights") == TRAINED_ALONG and about.get("checkpoint") == config["teacher"]["checkpoint"]:
            return f"the teacher of {run} was trained along with the student and was not kept"
    for model, checkpoint in teacher_members(config["teacher"]):
        if checkpoint is None and not model.get("pretrained"):
            return "the teacher has random weights, which were not kept"
    return ""
