"""The run record: ``result.json``, written atomically, also when a run fails. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.errors import KdError
from kd.records.durable import replacing

FILE = "result.json"
CONFIG = "config.yaml"  # what else a run directory holds, beside weights
METRICS = "metrics.csv"
PREDICTIONS = {"val": "predictions_val.npz", "test": "predictions_test.npz"}
EVALUATIONS = "evaluations.json"  # measurements beside a run's own test: {name: {made: how, metrics: {metric: number}}}
SCHEMA = 1
NOT_THE_EXPERIMENT = ("seed", "name", "tags", "notes", "paths", "logger", "hardware", "resume")

PLACES_OF_DATA = ("root", "download")
RESULTS_OF_HARDWARE = ("precision", "trainer")
KEPT_ANSWERS = "kd.distill.cache.CachedAnswers"
PLACES_OF_ANSWERS = ("folder", "path", "verify")  # of its options, those that say where answers lie


def config_hash(config: Mapping[str, Any]) -> str:
    """Return twelve hex digits that runs of the same experiment share.

    Left out: seeds, names, paths, loggers, where the teacher's answers are kept, and of the hardware all that does not
    change the result. A teacher's run directory counts by the hash of its own experiment.
    """
    kept = {k: v for k, v in config.items() if k not in NOT_THE_EXPERIMENT}
    kept["data"] = {k: v for k, v in config["data"].items() if k not in (*PLACES_OF_DATA, "seed", "split_seed")}
    kept["hardware"] = {k: config["hardware"][k] for k in RESULTS_OF_HARDWARE}
    kept["hardware"]["sync_batchnorm"] = config["hardware"].get("sync_batchnorm") or None
    kept["protocol"] = {k: v for k, v in config["protocol"].items() if k != "keep_predictions"}
    for role in ("student", "teacher"):
        kept[role] = {**config[role], "checkpoint": _experiment_of(config[role]["checkpoint"])}
    for key in ("networks", "callbacks"):
        if not kept.get(key):
            kept.pop(key, None)
    for key in ("cache", "optimize", "trust"):  # the same answers, sooner, or from a file that is allowed to name code
        kept["teacher"].pop(key, None)
    kept["teacher"]["answers"] = _answers(config["teacher"])
    text = json.dumps(_without_nulls(kept), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def metrics_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the descriptions of the metrics that a finished run's task has measured, the main one first.

    Each has the keys of :class:`kd.tasks.base.Metric`. A run of an older kd has none: then its selecting metric stands
    for all, the more the better.
    """
    selecting = str((record.get("protocol") or {}).get("monitor") or "val/metric").partition("/")[2]
    plain = {"title": selecting, "better": "max", "share": False, "unit": "", "digits": 4, "beside_teacher": False}
    return list(record.get("metrics") or [{"name": selecting, **plain}])


def better(record: Mapping[str, Any], measure: str) -> str:
    """Tell whether ``max`` or ``min`` of a measure (``val/acc1``, ``latency_ms``) of a finished run is better."""
    split, _, name = measure.rpartition("/")
    found = [m["better"] for m in metrics_of(record) if m["name"] == name]
    return found[0] if split and found else "max" if split else "min"


def data_seeds(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the seeds of the data: :func:`config_hash` leaves them out."""
    return {key: config["data"].get(key) for key in ("seed", "split_seed")}


def changes_results(override: str) -> bool:
    """Tell whether an override may change what is measured: by :func:`config_hash`, or as a seed of the data."""
    key = override.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".")
    section, _, rest = key.partition(".")
    if section == "hardware":
        return not rest or rest.partition(".")[0] in (*RESULTS_OF_HARDWARE, "sync_batchnorm")  # a group has a precision
    aside = (*(f"data.{k}" for k in PLACES_OF_DATA), "protocol.keep_predictions", "teacher.cache", "teacher.trust")
    return section not in (*NOT_THE_EXPERIMENT, "hydra") and key not in aside


def _without_nulls(value: Any) -> Any:
    """Drop options that are null, which count like ones that do not exist: a new one changes no hash of before."""
    if isinstance(value, Mapping):
        return {str(k): _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(v) for v in value]
    return value


def _experiment_of(checkpoint: Any) -> Any:
    if isinstance(checkpoint, (list, tuple)):
        return [_experiment_of(c) for c in checkpoint]
    if checkpoint is not None and (Path(checkpoint) / FILE).is_file():
        found = read(checkpoint).get("config_hash")
        if found is None:
            raise KdError(f"{checkpoint} has no network: that run never began")
        return found
    return checkpoint


def _answers(teacher: Mapping[str, Any]) -> Any:
    """Return ``teacher.answers`` without where they lie; with no network beside them, what lies there is the teacher.

    Answers of a class of the user's own stay as they are: what its options mean is not known.
    """
    node = teacher.get("answers")
    if not isinstance(node, Mapping) or node.get("_target_") != KEPT_ANSWERS:
        return node
    alone = teacher.get("model") is None and teacher["checkpoint"] is None
    return {k: v for k, v in node.items() if k not in PLACES_OF_ANSWERS or (alone and k == "path")}


def commit(directory: str | Path = ".") -> str | None:
    """Return a directory's git commit, with ``+changes`` when tracked files differ; None outside of a repository."""
    try:
        head = _git(directory, "rev-parse", "HEAD")
        return head + ("+changes" if _git(directory, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(directory: str | Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def write(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Write ``result.json`` in one step: a reader finds the old record or the new one, never half of it."""
    write_text(run_dir / FILE, json.dumps(_finite(record), indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically. ``MachineFailure`` when it cannot be written."""
    with replacing(path, f".{os.getpid()}") as temporary:
        temporary.write_text(text, encoding="utf-8")


def read(run_dir: str | Path) -> dict[str, Any]:
    """Return the record of a run. ``KdError`` when the directory has none or it cannot be read."""
    file = Path(run_dir) / FILE
    if not file.is_file():
        raise KdError(f"{run_dir} is not a run directory: there is no {FILE} in it")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise broken(run_dir, "it is not valid JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("schema", 0), int):
        raise broken(run_dir)
    if record.get("schema", 0) > SCHEMA:
        raise KdError(f"{file} was written by a newer version of kd (schema {record['schema']}, known: {SCHEMA})")
    if "status" not in record:
        raise broken(run_dir)
    return record


def broken(run_dir: str | Path, why: str = "it is not what kd writes") -> KdError:
    """Return the error for a record that cannot be read: what is wrong, and the way on."""
    aside = "move that directory away (its sweep or study then trains the run anew)"
    return KdError(f"{Path(run_dir) / FILE} cannot be read: {why}; {aside}")


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """Return the resolved config of a run."""
    import yaml

    from kd.records import yaml_text  # start-up: as yaml, most commands read no config of a run

    file = Path(run_dir) / CONFIG
    if not file.is_file():
        raise KdError(f"{run_dir} is not a run directory: there is no config.yaml in it")
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as fast, where it is built
        return yaml_text.load(file.read_text(encoding="utf-8"), loader)
    except KdError as error:
        raise KdError(f"{file} {error}") from None
    except (OSError, ValueError, yaml.YAMLError):
        raise KdError(f"{file} cannot be read: it is not valid YAML") from None


def from_python(config: Mapping[str, Any]) -> bool:
    """Tell whether ``kd.distill`` was given the networks of a run: its config does not say how they are made."""
    return config["student"].get("model") is None and not config["student"].get("surgery")


def _finite(value: Any) -> Any:
    """Replace NaN by null: JSON has none."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
