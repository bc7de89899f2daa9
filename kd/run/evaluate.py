"""``kd eval``: a run, a checkpoint or a teacher alone, through the same build and the same metrics as in training."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kd.config.composition import flat
from kd.errors import KdError, near
from kd.records import record
from kd.records.weight_files import TRAINED_ALONG

OWN = {"run": None, "split": "test", "who": "student", "weights": "selected", "out": None}
CHOICES = {"split": ("val", "test"), "who": ("student", "teacher"), "weights": ("selected", "last")}

RESOLVED = {
    "seed": "set data.seed or data.split_seed",
    "paths.data": "set data.root",
    "student.checkpoint": "leave out run= to measure a checkpoint",
}

TYPES = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}  # precision → that of the weights

USAGE = """kd eval [RUN] [split=val|test] [who=student|teacher] [weights=selected|last] [out=FILE] [KEY=VALUE ...]

Measures top-1/5, NLL, expected calibration error, accuracy per class, and beside a teacher agreement and KL to it.

  kd eval RUN                                         the student of a run on its test split (run=RUN is the same)
  kd eval RUN who=teacher split=val                   that run's teacher
  kd eval RUN data.test_shift=1                       any key of the run's config can be changed
  kd eval student.checkpoint=FILE model@student=mlp   a checkpoint, with the groups and keys of kd train
  kd eval who=teacher teacher.checkpoint=RUN          a teacher alone

A run's config.yaml is a configuration: it names code, as a script does. out=FILE also writes the numbers as JSON;
--config-dir DIR as for kd train."""


def main(argv: Sequence[str]) -> int:
    """Parse, measure, print a table."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    own, overrides, config_dir = _split_arguments(argv)
    if own["out"] is not None and not Path(own["out"]).resolve().parent.is_dir():
        raise KdError(f"out = {own['out']} cannot be written: its folder does not exist")
    if own["run"]:
        config = run_config(own["run"], overrides)
    else:
        from kd.cli.hydra_app import checked

        config = checked(overrides, config_dir)
    file = _weights_file(own) if own["run"] and own["who"] == "student" else None
    result = evaluate(config, own["who"], own["split"], file, run=own["run"])
    _print(result)
    if own["out"]:
        record.write_text(Path(own["out"]), json.dumps(result, indent=2) + "\n")
    return 0


def _split_arguments(argv: Sequence[str]) -> tuple[dict[str, Any], list[str], str | None]:
    """The verb's own arguments, overrides of the config, and the folder of ``--config-dir``."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    try:
        given, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise KdError(f"kd eval does not understand this: {error}") from None
    own: dict[str, Any] = dict(OWN)
    overrides = []
    for argument in rest:
        key, equals, value = argument.partition("=")
        if argument.startswith("-"):
            raise KdError(f"{argument} is not understood: kd eval takes RUN, --config-dir DIR and KEY=VALUE")
        if not equals or Path(argument).exists():
            key, value = "run", _run_directory(argument)
        if key == "run" and own["run"] is not None:
            raise KdError(f"kd eval measures one run, given: {own['run']} and {value}")
        if key in own:
            own[key] = value
        else:
            overrides.append(argument)
    for key, allowed in CHOICES.items():
        if own[key] not in allowed:
            raise KdError(f"{key} = {own[key]} is not allowed: it must be {' or '.join(allowed)}")
    return own, overrides, given.config_dir


def _run_directory(argument: str) -> str:
    """An argument without a ``KEY=`` is a run directory. ``KdError`` for files and typos."""
    if Path(argument).is_file():
        raise KdError(f"{argument} is a file: kd eval takes a run directory, or student.checkpoint={argument}")
    if not Path(argument).is_dir():
        known = near(argument, OWN)
        raise KdError(f"{argument} is neither a run directory nor KEY=VALUE{known}")
    return argument


def run_config(run: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The config of a run with some keys changed. ``KdError`` for keys that it does not have."""
    return changed(record.read_config(run), overrides)


def changed(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A run's resolved config with some keys changed. ``KdError`` for keys that it does not have."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from kd.config.checks import check
    from kd.config.schema import Root, Teacher

    known = set(flat({**config, "teacher": {**asdict(Teacher()), **config["teacher"]}}))  # runs of before an option
    for override in overrides:
        key = override.partition("=")[0]
        if key not in known:
            raise KdError(f"{override}: the run has no key {key}{near(key, {*known, *OWN})} (groups cannot be changed)")
        if key in RESOLVED:
            raise KdError(f"{override} changes nothing here, a run's config is resolved: {RESOLVED[key]}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Root), config, OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise KdError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    return check(merged, training=False)  # type: ignore[arg-type]


def _weights_file(own: Mapping[str, Any]) -> Path:
    from kd.records.weight_files import LAST, SELECTED

    file = Path(own["run"]) / (SELECTED if own["weights"] == "selected" else LAST)
    if not file.is_file():
        raise KdError(f"run = {own['run']} holds no {file.name}: it ended before its first validation, or is running")
    return file


def evaluate(
    config: dict[str, Any],
    who: str = "student",
    split: str = "test",
    weights_file: Path | None = None,
    keep: dict[str, Any] | None = None,
    run: str | Path | None = None,
) -> dict[str, Any]:
    """Metrics of a config's student or teacher on one split.

    ``weights_file``: the student's weights, else ``student.checkpoint``; a student without weights is refused.
    ``keep`` collects index, target and logits of every row. ``run``: whose config it is. A teacher whose weights are
    nowhere is refused, and beside a student left out: ``without`` says so.
    """
    import torch

    from kd.distill.evaluation import measure
    from kd.distill.teacher import InputMap
    from kd.losses.base import Batch, Output
    from kd.run import build, trainer, weights
    from kd.run.data_facts import same_data
    from kd.tasks.base import Want

    trainer.quieten()
    source = weights_file or config["student"]["checkpoint"]
    if who == "student" and source is None:
        raise KdError("the student has no weights: give run=RUN or student.checkpoint=FILE")
    data = build.datamodule(config)
    data.setup("test")
    without = unkept_teacher(config, run)
    task = build.task(config)
    teacher = _made_again(config, data, task, run) if without else build.teacher(config, data, task)
    without = "" if teacher is not None else without
    if without and who == "teacher":
        raise KdError(f"{without}: there is nothing to measure (teacher.checkpoint=RUN measures another one)")
    device = torch.device("cuda" if torch.cuda.is_available() and config["hardware"]["accelerator"] != "cpu" else "cpu")
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    dtype = TYPES.get(config["hardware"]["precision"], "float32")  # of the weights, as in the run
    like_run = {"device": device, "dtype": getattr(torch, dtype)}
    if teacher is not None:
        teacher.to(**like_run)

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(like_run["dtype"]) if tensor.is_floating_point() else tensor

    def answered_by_teacher(batch: Batch) -> Output:
        assert teacher is not None
        return teacher.measured(batch.map(cast))

    if who == "teacher":
        if teacher is None:
            raise KdError("there is no teacher: give teacher.checkpoint=RUN or model@teacher=NAME")
        source = config["teacher"]["checkpoint"]
        network, beside, who_measured = answered_by_teacher, None, f"the teacher ({source})"
    else:
        student = build.network(config["student"]["model"], "student.model", data.num_classes, data.input_shape)
        state, about = weights.read(source, None if weights_file else config["student"].get("epoch"))
        recorded = about.get("data", {})
        same_data(recorded, data, str(source))
        if list(recorded.get("input_shape", data.input_shape)) != list(data.input_shape):
            raise KdError(f"{source} was trained on images of shape {recorded['input_shape']}, not {data.input_shape}")
        mapped = InputMap(data.mean, data.std, recorded.get("mean") or None, recorded.get("std") or None) if data.mean else None
        prepare = torch.nn.Identity() if mapped is None else mapped.to(**like_run)
        weights.load(student, state, source, "student")
        student.to(**like_run).eval()

        def answered_by_student(batch: Batch) -> Output:
            return task.answer(student, prepare(batch.map(cast).inputs), batch, Want())

        network, who_measured = answered_by_student, f"the student ({source})"
        beside = answered_by_teacher if teacher is not None else None
    metrics, per_class = measure(task, data.num_classes, network, loader, device, beside, keep, who_measured, split)
    return {
        "who": who,
        "split": split,
        "source": str(source),
        "rows": data.sizes[split],
        "metrics": metrics,
        "per_class": dict(zip(data.class_names, per_class, strict=True)) if per_class else {},
        **({"without": without} if without else {}),
    }


def _made_again(config: Mapping[str, Any], data: Any, task: Any, run: str | Path | None) -> Any:
    """The teacher of ``run``, which has no checkpoint, where its own code makes it with the weights that taught."""
    from kd.run import build, weights

    there = record.read(run).get("teacher") or {} if run is not None and (Path(run) / record.FILE).is_file() else {}
    if there.get("digest") is None or there.get("weights") == TRAINED_ALONG:
        return None
    made = build.teacher(config, data, task)
    return made if made is not None and weights.digest(made.state_dict()) == there["digest"] else None


def unkept_teacher(config: Mapping[str, Any], run: str | Path | None = None) -> str:
    """Why the network that taught cannot be had: its weights were random, or the run changed them; else ""."""
    from kd.run.build import teacher_members

    if run is not None and (Path(run) / record.FILE).is_file():
        about = record.read(run).get("teacher") or {}
        if about.get("weights") == TRAINED_ALONG and about.get("checkpoint") == config["teacher"]["checkpoint"]:
            return f"the teacher of {run} was trained along with the student and was not kept"
    for model, checkpoint in teacher_members(config["teacher"]):
        if checkpoint is None and not model.get("pretrained"):
            return "the teacher has random weights, which were not kept"
    return ""


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['who']} on {result['split']} ({result['rows']} rows): {result['source']}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in result["metrics"].items():
        table.add_row(name, f"{value:.4f}")
    if len(result["per_class"]) <= 20:
        for name, value in result["per_class"].items():
            table.add_row(f"accuracy of class {name}", f"{value:.4f}")
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110).print(table)
    if "without" in result:
        print(f"no agreement and KL: {result['without']}")
