"""Complete what a logger's YAML leaves open, and keep ``metrics.csv``."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from kd.records import manifest, record
from kd.tracking import wandb_run


def complete(name: str, node: Mapping[str, Any], config: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """Fill what a logger's YAML leaves null: directory, group, run name, job type, tags, id."""
    node = dict(node)
    target = node["_target_"].rpartition(".")[2]
    if target == "WandbLogger":
        node["save_dir"] = str(run_dir)
        node["notes"] = config["notes"] or None
        about = describe(config, run_dir)
        node["tags"] = about.pop("tags")
        node["id"] = about.pop("id")
        node.update({key: value for key, value in about.items() if node.get(key) is None})
    elif target == "TensorBoardLogger":
        node["save_dir"] = node.get("save_dir") or str(run_dir)
    elif target == "MLFlowLogger":
        node["run_name"] = node.get("run_name") or run_name(config)
    return node


def describe(config: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """Describe a run for W&B: id, group, name, job type and tags.

    A job of a sweep or study is grouped under its name, and named after what differs; a run that a W&B sweep agent
    started (``WANDB_SWEEP_ID``, ``WANDB_RUN_ID``) is the agent's run. Job types: "teacher" when other jobs learn from
    it, "distill" with a teacher, else "train". A resumed run is the run that its directory holds.
    """
    found = manifest.find(run_dir)
    agent = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    distils = any(config["teacher"][key] is not None for key in ("model", "checkpoint"))
    about = {
        "id": agent or wandb_run.run_id(run_dir),
        "group": config["name"],
        "name": _swept() or run_name(config),
        "job_type": "distill" if distils else "train",
    }
    tags = [*config["tags"]]
    if found is not None:
        belongs, job = found
        about.update(group=belongs.name, name=job.label)
        if not distils and any(job.name in other.after for other in belongs.jobs.values()):
            about["job_type"] = "teacher"
        tags.append(f"{belongs.kind}/{belongs.name}")
    data = config["data"]
    tags += [data.get("name") or data["_target_"].rpartition(".")[2].lower(), *config["loss"]]
    # W&B refuses a run whose tags are longer than 64 characters, or whose names are longer than 128
    short = {key: text[:128] for key, text in about.items()}
    return {**short, "tags": list(dict.fromkeys(tag[:64] for tag in tags))}


def run_name(config: Mapping[str, Any]) -> str:
    """Make a name of what differs: experiment, terms, seed."""
    return f"{config['name']} {'+'.join(config['loss'])} seed{config['seed']}"


def _swept() -> str:
    """Write what a W&B sweep agent chose, ``loss.kd.temperature=4, seed=1``; nothing without an agent."""
    import yaml

    try:
        chosen = yaml.safe_load(Path(os.environ["WANDB_SWEEP_PARAM_PATH"]).read_text(encoding="utf-8"))
        return ", ".join(f"{key}={node['value']}" for key, node in chosen.items() if isinstance(node, dict))
    except (KeyError, OSError, yaml.YAMLError):
        return ""


class MetricsFile(Logger):
    """``metrics.csv`` in the run directory, a line a call; of an interrupted run's rows the first ``done`` steps' stay.

    A line is appended in one piece. Where a column is new, the file is replaced in one piece: whoever kills the process
    loses no curve.
    """

    name = version = ""

    @property
    def save_dir(self) -> str:
        """Return the run directory: what ``trainer.log_dir`` says."""
        return str(self.file.parent)

    def __init__(self, run_dir: Path, done: int = 0) -> None:
        super().__init__()
        self.file, self.columns = run_dir / record.METRICS, list[str]()
        rows = [row for row in self._rows() if row.get("step", "").isdigit() and int(row["step"]) < done]
        if rows:
            self._rewrite(rows)
        else:
            self.file.unlink(missing_ok=True)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: ``config.yaml`` has them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write a row."""
        row = {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()} | {
            "step": step
        }
        if row.keys() <= set(self.columns):
            with self.file.open("a", newline="") as handle:
                csv.DictWriter(handle, self.columns).writerow(row)
        else:
            self._rewrite([*self._rows(), row])

    def _rows(self) -> list[dict[str, Any]]:
        """Read what is there, without a last line that a machine which lost power left torn."""
        text = self.file.read_text() if self.file.is_file() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        return [{k: v for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(whole)]

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.columns = sorted({key for row in rows for key in row})
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        record.write_text(self.file, text.getvalue())
