"""One job of many: start it, go on with it, or leave it as it is; its record is written whatever happens."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from kd.config.compose import check_composed
from kd.errors import KdError, named
from kd.records import manifest, record
from kd.records.state import DONE, FAILED, RUNNING, resumable, state_of
from kd.records.weight_files import CHECKPOINT, LAST, SELECTED
from kd.run import resume
from kd.run.train import resume as go_on
from kd.run.train import train

# what a run writes into its directory beside its log and its lock, the record last
WRITTEN = (
    *(str(CHECKPOINT), SELECTED, LAST, record.METRICS, *record.PREDICTIONS.values()),
    *(record.EVALUATIONS, record.CONFIG, record.FILE),
)
LOGGED = ("wandb", "tensorboard")


def task(cfg: DictConfig) -> str:
    """Run a job for a Hydra launcher, perhaps on another machine: returns the status and never raises.

    A job that a scheduler preempted and queued again goes on from its last checkpoint.
    """
    settings = HydraConfig.get()
    run_dir = Path(settings.runtime.output_dir)
    overrides = [str(o) for o in settings.overrides.task]
    try:
        return work(check_composed(cfg), run_dir, overrides)
    except Exception as error:
        with suppress(KdError, OSError):  # where there is no room, the sweep says it for the job
            ensure_record(run_dir, overrides, FAILED, f"{error}" or type(error).__name__)
        return FAILED


def work(config: Mapping[str, Any], run_dir: Path, overrides: Sequence[str]) -> str:
    """Train unless the run is finished; on from its checkpoint if it has one. Returns the status.

    What failed by itself is started anew: the same weights would only fail again. Raises what the training raises.
    """
    state = state_of(run_dir, config)
    if state.status in (*DONE, RUNNING):
        return state.status
    if state.record is not None:
        try:
            if resumable(run_dir, state.record):
                return str(go_on(run_dir)["status"])
            clear(run_dir)
        except resume.Refused as error:  # nothing was written; whoever reads the table must know why
            record.write(run_dir, {**state.record, "status": state.status, "error": str(error)})
            raise
    return str(train(dict(config), run_dir, overrides)["status"])


def clear(run_dir: Path) -> None:
    """Remove what an attempt without a result has written; its log stays, and so does what others put there."""
    folder = (run_dir / CHECKPOINT).parent
    if folder.is_symlink():
        raise resume.Refused(f"{folder} is a link, and nothing behind it is removed: remove it to train the run anew")
    for name in LOGGED:
        _set_aside(run_dir / name)
    for name in WRITTEN:
        file = run_dir / name
        for old in (*file.parent.glob(f".{file.name}*.tmp"), file):  # a killed process leaves temporary files
            if old.is_file() or old.is_symlink():
                old.unlink()
    with suppress(OSError):  # not there, or not empty
        folder.rmdir()


def _set_aside(folder: Path) -> None:
    """Rename a logger's folder: what it holds is not all ours, and the next attempt must not go on with its curves."""
    if folder.is_dir() and not folder.is_symlink():
        number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}_{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}_{number}"))


def ensure_record(run_dir: Path, overrides: Sequence[str], status: str, error: str) -> None:
    """Write a record of why the job did not finish, unless it has one that ended.

    ``MachineFailure`` where it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise named(failure, run_dir) from failure
    content: dict[str, Any] = {}
    if (run_dir / record.FILE).exists():
        content = record.read(run_dir)
        if content["status"] != "running":
            return
    found = manifest.find(run_dir)
    name = found[1].label if found else run_dir.name
    opening = {"schema": record.SCHEMA, "name": name, "overrides": list(overrides)}
    record.write(run_dir, {**opening, **content, "status": status, "error": error})
