"""One run: check → build → fit → test → record. No torch at import."""

from __future__ import annotations

import logging
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from kd import __version__, errors
from kd.config.hardware import settings
from kd.config.recipe import recorded
from kd.data.text.early import refuse_files
from kd.errors import KdError, MachineFailure
from kd.parallel import cluster, launch
from kd.parallel.devices import refuse_missing
from kd.records import inputs, lock, record
from kd.records.weight_files import CHECKPOINT
from kd.run import resume as resuming
from kd.run.log import log_failure, logged, start_logging, unwritable
from kd.tracking.summary import finish_loggers

log = logging.getLogger(__name__)

ENTRY = "kd.run.train:fit"  # what every process of a run does, for kd.parallel.launch


def resume(run_dir: Path) -> dict[str, Any]:
    """Go on with an interrupted run, to the result that it would have had."""
    config, before = record.read_config(run_dir), record.read(run_dir)
    if before["status"] == "finished":
        raise KdError(f"resume={run_dir}: that run is finished")
    if record.from_python(config):
        raise KdError(f"resume={run_dir}: that run was started by kd.distill, its networks are not in its config.yaml")
    if not (run_dir / CHECKPOINT).is_file():
        raise KdError(f"resume={run_dir}: there is no {CHECKPOINT} in it, the run ended before its first validation")
    resuming.check_config(run_dir, config, before)
    return train(config, run_dir, before["overrides"], checkpoint=run_dir / CHECKPOINT)


def train(
    config: dict[str, Any], run_dir: Path, overrides: Sequence[str] = (), checkpoint: Path | None = None
) -> dict[str, Any]:
    """Run from a checked, resolved config: write the run directory and return the record.

    The record is written when the run starts, and again when it finishes, fails or is interrupted.
    """
    hardware = settings(config)
    if cluster.join(hardware) > 0:
        cluster.follow()
        return {}
    refuse_missing(hardware)
    with _in_use(run_dir), logged(run_dir):
        _refuse_second(run_dir)
        if checkpoint is None:
            _refuse_to_overwrite(run_dir)
            return _train(config, run_dir, overrides, None, {})
        before = record.read(run_dir)
        # of a session that was killed the record does not know the time
        seconds = max(before.get("wall_clock_s", 0.0), resuming.check_files(run_dir).seconds)
        return _train(config, run_dir, overrides, checkpoint, {**before, "wall_clock_s": seconds})


def run_from_python(
    config: dict[str, Any], run_dir: Path | None, work: Callable[[], dict[str, Any]], verbose: bool = True
) -> dict[str, Any]:
    """Do the ``work`` of a run that was started from Python, in this process, and return its record.

    ``work`` yields the part of the record that is known at its end. Without a ``run_dir`` nothing is written.
    ``verbose``: whether the console gets more than warnings.
    """
    if run_dir is None:
        start = time.perf_counter()
        result = _opening(config, ())
        result.pop("process")
        with logged(None, verbose):
            result.update({"status": "finished", **work()})
        _close(result, time.perf_counter() - start)
        return result
    run_dir.mkdir(parents=True, exist_ok=True)
    with _in_use(run_dir), logged(run_dir, verbose):
        _refuse_second(run_dir)
        _refuse_to_overwrite(run_dir)
        return _train(config, run_dir, (), None, {}, work)


def _close(result: dict[str, Any], seconds: float) -> None:
    result["wall_clock_s"] = round(seconds, 3)
    result.setdefault("peak_memory_mb", peak_memory())
    result["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")


def _train(
    config: dict[str, Any],
    run_dir: Path,
    overrides: Sequence[str],
    checkpoint: Path | None,
    before: dict[str, Any],
    work: Callable[[], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train in a directory that is this process's; ``before``: the record of an earlier session, if there was one.

    ``work``: what is done; None: what the config says, in as many processes as it asks for.
    """
    start = time.perf_counter()
    result = _opening(config, overrides)
    earlier = before.get("wall_clock_s", 0.0)
    try:
        if checkpoint is not None:
            result["started"] = before.get("started", result["started"])
            result.update({key: before.get(key) for key in inputs.KEYS})  # of a run of before this is not known
            result["wall_clock_s"] = earlier
        else:
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            record.write_text(run_dir / record.CONFIG, text)
        record.write(run_dir, result)
        outcome = work() if work is not None else _launch(config, run_dir, checkpoint)
        result.update({"status": "finished", **outcome})
    except (KeyboardInterrupt, SystemExit) as error:
        result.update(status="interrupted", error="interrupted")
        raise KeyboardInterrupt(_kept(run_dir)) from error
    except Exception as error:
        shown = errors.named(error, run_dir)
        result.update(status="failed", error=str(shown) or type(shown).__name__, failure=errors.kind(shown))
        log_failure(error)
        if isinstance(shown, KdError) and result["failure"] == "unexpected":
            log.info("the traceback is in %s", run_dir / "train.log")
        if shown is error:
            raise
        raise shown from error
    finally:
        result.pop("process", None)
        _close(result, earlier + time.perf_counter() - start)
        try:
            record.write(run_dir, result)
        except MachineFailure:
            if result["status"] not in ("failed", "interrupted"):  # else there is an error already
                raise
        finally:
            finish_loggers(result)
    return result


def _launch(config: dict[str, Any], run_dir: Path, checkpoint: Path | None) -> dict[str, Any]:
    """Fit in as many processes as the hardware section asks for; the part of the record that this yields."""
    refuse_files(config["data"])
    size = config["recipe"]["batch_size"]

    def check(processes: int) -> None:
        if size % processes:
            raise KdError(
                f"recipe.batch_size = {size} is not allowed on {processes} processes: it is the batch of all of them "
                "together, so it must be a multiple of their number"
            )

    where = str(run_dir.resolve())
    arguments = (config, where, checkpoint and str(checkpoint.resolve()))
    return launch.run(cluster.Work(ENTRY, arguments, settings(config), where), check)


def fit(
    config: dict[str, Any], run_dir: str, checkpoint: str | None, ending: ExitStack | None = None
) -> dict[str, Any]:
    """Fit in this process, alone or as one of several; the part of the record that this yields.

    ``ending``: given in a process that kd started for this alone. There process 0 also logs and closes its loggers;
    after a failure at that end, as a server that is away must not delay it.
    """
    from kd.parallel import group  # start-up: torch
    from kd.run import trainer  # start-up: torch

    where, last = Path(run_dir), Path(checkpoint) if checkpoint else None
    if ending is None:
        return trainer.fit(config, where, last)
    if group.rank() == 0:
        start_logging(where)  # the parent has the lock
    try:
        outcome = trainer.fit(config, where, last)
    except Exception as error:
        text = str(errors.named(error, where)) or type(error).__name__
        ending.callback(_finish, where, {"status": "failed", "error": text})
        raise
    _finish(where, {"status": "finished", **outcome})
    return {**outcome, "peak_memory_mb": peak_memory()}


def _finish(run_dir: Path, outcome: dict[str, Any]) -> None:
    """Close the loggers that this process has opened; the parent writes the record."""
    finish_loggers({**record.read(run_dir), **outcome})


def _kept(run_dir: Path) -> str:
    """Say what an interrupted run has left, and the command that goes on with it."""
    if record.from_python(record.read_config(run_dir)):
        return f"nothing is kept of a run that kd.distill started: remove {run_dir} and start again"
    if (run_dir / CHECKPOINT).is_file():
        return f"all up to its last validation is kept; to go on: {shlex.join(['kd', 'train', f'resume={run_dir}'])}"
    return f"nothing is kept, as there was no validation yet: remove {run_dir} and start again"


@contextmanager
def _in_use(run_dir: Path) -> Iterator[None]:
    """Hold the directory until the block ends, whatever happens to the other files in it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock.held(run_dir / lock.RUN, lock.PATIENCE))
        except BlockingIOError:
            raise KdError(f"{run_dir} is in use: another process trains in it") from None
        except OSError as error:
            raise unwritable(error) from None
        yield


def _refuse_second(run_dir: Path) -> None:
    """Refuse a second process: where the lock file was deleted or moved while a run trains, it would lock another."""
    there = record.read(run_dir) if (run_dir / record.FILE).exists() else {}
    if there.get("status") == "running" and lock.alive(there.get("process")):
        raise KdError(f"{run_dir} is in use: process {there['process']['pid']} trains in it")


def _refuse_to_overwrite(run_dir: Path) -> None:
    """``KdError`` for a directory that holds a run, unless that failed before it had anything to lose."""
    folder = (run_dir / CHECKPOINT).parent
    if folder.exists() and not folder.is_dir():
        raise KdError(f"{folder} is a file: a run keeps its checkpoint in a directory of that name; move it away")
    if not (run_dir / record.FILE).exists():
        return
    if (run_dir / CHECKPOINT).exists():
        raise KdError(f"{run_dir} holds a run already: go on with resume={run_dir}, or choose another hydra.run.dir")
    if record.read(run_dir)["status"] != "failed":
        raise KdError(f"{run_dir} holds a run already: choose another hydra.run.dir")


def _opening(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    return {
        "schema": record.SCHEMA,
        "status": "running",
        "error": None,
        "name": config["name"],
        "overrides": list(overrides),
        "config_hash": record.config_hash(config),
        "commit": record.commit(Path(__file__).parent),
        "project_commit": record.commit("."),
        **inputs.read_by(config),
        "seed": config["seed"],
        "data_seeds": record.data_seeds(config),
        "tags": config["tags"],
        "protocol": recorded(config["protocol"], config["recipe"]),
        "process": lock.this_process(),  # while it runs
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"kd": __version__, **{name: version(name) for name in ("torch", "lightning", "timm")}},
    }


def peak_memory() -> dict[str, float]:
    """Measure the peak resident memory of the process since it began, and of the GPU in this run, in MiB."""
    unit = 1024 if sys.platform != "darwin" else 1024**2
    peak = {"process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak["gpu"] = round(torch.cuda.max_memory_allocated() / 1024**2, 1)
    return peak
