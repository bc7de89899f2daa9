"""What the loggers must be told, and what is kept of a run in Weights & Biases."""

from __future__ import annotations

import csv
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger

from kd.config import flat


def complete(name: str, node: Mapping[str, Any], config: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """Fill what a logger's YAML leaves null: directory, group, run name, tags, online or offline."""
    node = dict(node)
    target = node["_target_"].rpartition(".")[2]
    if target == "WandbLogger":
        sweep = run_dir.parent.name.startswith("sweep_")
        node["save_dir"] = str(run_dir)
        node["group"] = node.get("group") or (run_dir.parent.name if sweep else config["name"])
        node["name"] = node.get("name") or run_name(config)
        node["tags"] = list(config["tags"])
        node["notes"] = config["notes"] or None
        node["id"] = run_id(run_dir)
        node["resume"] = "allow"
        if node.get("offline") is None:
            node["offline"] = not has_wandb_key()
        if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
            node["offline"] = True
    elif target == "TensorBoardLogger":
        node["save_dir"] = node.get("save_dir") or str(run_dir)
    elif target == "MLFlowLogger":
        node["run_name"] = node.get("run_name") or run_name(config)
    return node


def run_name(config: Mapping[str, Any]) -> str:
    """A name that says what differs: experiment, terms, seed."""
    return f"{config['name']} {'+'.join(config['loss'])} seed{config['seed']}"


def run_id(run_dir: Path) -> str:
    """The same W&B run for the same directory, so that a resumed run goes on in it."""
    from hashlib import sha256

    return sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]


def has_wandb_key() -> bool:
    """Whether wandb would log in without asking: an API key in the environment or in ``~/.netrc``."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)


def csv_logger(run_dir: Path, done: int = 0) -> CSVLogger:
    """``metrics.csv`` in the run directory; of an interrupted run's rows those of its first ``done`` steps are kept."""
    file = run_dir / "metrics.csv"
    earlier: list[dict[str, Any]] = []
    if file.is_file():
        with file.open(newline="") as handle:
            rows = [{k: v for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(handle)]
        earlier = [row for row in rows if int(row["step"]) < done]
        file.unlink()  # the logger deletes it anyway, with a warning
    logger = CSVLogger(str(run_dir), name="", version="", flush_logs_every_n_steps=500)
    writer = logger.experiment
    writer.metrics = earlier
    writer.metrics_keys = sorted({key for row in earlier for key in row})
    return logger


def finish_wandb(loggers: list[Any], summary: Mapping[str, Any] | None) -> None:
    """Write the report row as the summary and close the run: jobs of one process must not share it."""
    from lightning.pytorch.loggers import WandbLogger

    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            if summary is not None:
                logger.experiment.summary.update(flat(summary))
            logger.experiment.finish(exit_code=0 if summary is not None else 1)
