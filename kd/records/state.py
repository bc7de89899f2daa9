"""What a run directory of a sweep holds: nothing, a result, or something to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.config.composition import flat
from kd.errors import KdError
from kd.records import inputs, lock, record, sources, weight_files
from kd.records.weight_files import CHECKPOINT

MISSING, FINISHED, FAILED, INTERRUPTED, PRUNED = "missing", "finished", "failed", "interrupted", "pruned"
INFEASIBLE = "infeasible"  # of a search: its network is above a limit, so that it was not trained
RUNNING = "running"  # in another process
DONE = (FINISHED, PRUNED, INFEASIBLE)  # what is not run again


@dataclass(frozen=True)
class State:
    """``status``: one of those above; ``reason``: why it did not finish; ``record``: what it wrote, if anything."""

    status: str
    reason: str = ""
    record: Mapping[str, Any] | None = None


def state_of(run_dir: Path, config: Mapping[str, Any] | None = None) -> State:
    """Read the state of a job. A run that says "running" was killed, unless its process lives or holds its lock.

    With ``config``: ``KdError`` when the directory holds a run of another configuration.
    """
    if not (run_dir / record.FILE).exists():
        return State(MISSING, "it did not start")
    found = record.read(run_dir)
    # a run that never began has no config yet; one that failed by itself is started anew in any case
    kept = found["status"] != FAILED or resumable(run_dir, found)
    if config is not None and kept and (run_dir / record.CONFIG).is_file():
        refuse_another(run_dir, record.read_config(run_dir), config)
        if other := inputs.changed(found, config):
            raise KdError(f"{run_dir}: {other}: remove that run, or choose another hydra.sweep.dir")
    if found["status"] in (*DONE, FAILED):
        return State(found["status"], found.get("error") or "", found)
    if found["status"] == RUNNING and (busy(run_dir) or lock.alive(found.get("process"))):
        return State(RUNNING, "another process trains in it", found)
    return State(INTERRUPTED, found.get("error") or "it was killed", found)


def resumable(run_dir: Path, before: Mapping[str, Any]) -> bool:
    """Tell whether a run of this record, not finished, has a checkpoint from which it is worth while to go on.

    Not where the run itself failed, by its configuration or a loss that is not finite: it would fail again. Nor where
    something unexpected was raised and the user's own code has been changed since: that was the repair.
    """
    failure = before.get("failure")
    if failure == "run" or (failure == "unexpected" and sources.changed(before)):
        return False
    return (run_dir / CHECKPOINT).is_file()


def busy(run_dir: Path) -> bool:
    """Tell whether a process, perhaps on another node, trains in a directory."""
    return lock.busy(run_dir / lock.RUN)


def same_run(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Tell whether two configs are of one experiment, with the same seeds of its own, its data and what it reads."""
    seeds = [(c["seed"], c["data"].get("seed"), c["data"].get("split_seed"), _seeds_read(c)) for c in (there, here)]
    return record.config_hash(there) == record.config_hash(here) and seeds[0] == seeds[1]


def refuse_another(run_dir: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise ``KdError`` when the two configs are not of the same experiment and seed; it names the keys that differ."""
    if same_run(there, here):
        return
    if gone := weight_files.absent(here):
        raise KdError(f"{gone} does not exist: whether {run_dir} is a run of it is not known (its results: kd report)")
    old, new = flat(there), flat(here)
    ignored = tuple(f"{section}." for section in record.NOT_THE_EXPERIMENT)
    differ = [
        f"{key} = {old.get(key)} there and {new.get(key)} here"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and not key.startswith(ignored) and key not in ("name", "notes")
    ]
    raise KdError(
        f"{run_dir} holds a run of another configuration ({'; '.join(differ[:3]) or 'its teacher differs'}): "
        "remove it, or choose another hydra.sweep.dir"
    )


def _seeds_read(config: Mapping[str, Any]) -> list[Any]:
    """Return the seeds of the runs that a run reads: those of one experiment have one hash, and are other networks."""
    given = [p for role in ("student", "teacher") for p in weight_files.paths(config[role]["checkpoint"])]
    return [record.read(p).get("seed") if (Path(p) / record.FILE).is_file() else None for p in given]
