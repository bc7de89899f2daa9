"""One job of many: start it, go on with it, or leave it as it is; its record is written whatever happens."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from kd import manifest, record
from kd.config import check
from kd.sweeps.state import DONE, FAILED, INTERRUPTED, RUNNING, look
from kd.weight_files import CHECKPOINT


def task(cfg: DictConfig) -> str:
    """What a Hydra launcher calls in each job, perhaps on another machine: returns the status and never raises.

    A job that a scheduler preempted and queued again goes on from its last checkpoint.
    """
    settings = HydraConfig.get()
    run_dir = Path(settings.runtime.output_dir)
    overrides = [str(o) for o in settings.overrides.task]
    try:
        return work(checked(cfg), run_dir, overrides)
    except Exception as error:
        leave_a_record(run_dir, overrides, FAILED, f"{error}" or type(error).__name__)
        return FAILED


def checked(cfg: DictConfig) -> dict[str, Any]:
    """The config of a job, checked and resolved, without Hydra's node. ``KdError`` when it cannot work."""
    with open_dict(cfg):
        cfg.pop("hydra", None)
    return check(cfg)


def work(config: Mapping[str, Any], run_dir: Path, overrides: Sequence[str]) -> str:
    """Train unless the run is finished; on from its checkpoint if it was interrupted. Returns the status.

    What failed by itself is started anew: the same weights would only fail again. Raises what the training raises.
    """
    from kd.train import resume, train

    state = look(run_dir, config)
    if state.status in (*DONE, RUNNING):
        return state.status
    if state.status == INTERRUPTED and (run_dir / CHECKPOINT).is_file():
        return str(resume(run_dir)["status"])
    if state.record is not None:
        clear(run_dir)
    return str(train(dict(config), run_dir, overrides)["status"])


def clear(run_dir: Path) -> None:
    """Remove what an attempt without a result has written; its log stays."""
    for entry in sorted(run_dir.iterdir(), key=lambda entry: entry.name == record.FILE):  # the record last
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != "train.log":
            entry.unlink()


def leave_a_record(run_dir: Path, overrides: Sequence[str], status: str, error: str) -> None:
    """See to it that the job has a record of why it did not finish; what is there already is kept."""
    run_dir.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {}
    if (run_dir / record.FILE).exists():
        content = record.read(run_dir)
        if content["status"] != "running":
            return
    found = manifest.find(run_dir)
    name = found[1].label if found else run_dir.name
    opening = {"schema": record.SCHEMA, "name": name, "overrides": list(overrides)}
    record.write(run_dir, {**opening, **content, "status": status, "error": error})
