"""``kd train``: compose → check → build → fit → test → record."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kd import errors
from kd.config import hardware
from kd.errors import KdError, MachineFailure
from kd.records import inputs, lock, record
from kd.records.weight_files import CHECKPOINT
from kd.run import resume as resuming

log = logging.getLogger("kd.run.train")


def main(argv: Sequence[str]) -> int:
    """``kd train [GROUP=OPTION …] [KEY=VALUE …]``, a Hydra application; ``resume=RUN`` goes on with a run."""
    resumed = [a.split("=", 1)[1] for a in argv if a.startswith("resume=")]
    if resumed and resumed[-1] not in ("", "null"):
        if len(argv) > 1:
            others = ", ".join(a for a in argv if not a.startswith("resume="))
            raise KdError(f"resume={resumed[-1]} takes no other arguments (given: {others}): a run goes on as it began")
        resume(Path(resumed[-1]))
        return 0
    from kd.parallel import cluster

    config = cluster.follower(argv)
    if config is not None:
        cluster.join(config)
        cluster.follow()
        return 0
    from kd.cli.hydra_app import run

    return run(list(argv), train)


def resume(run_dir: Path) -> dict[str, Any]:
    """Go on with an interrupted run, to the result that it would have had."""
    config, before = record.read_config(run_dir), record.read(run_dir)
    if before["status"] == "finished":
        raise KdError(f"resume={run_dir}: that run is finished")
    if not (run_dir / CHECKPOINT).is_file():
        raise KdError(f"resume={run_dir}: there is no {CHECKPOINT} in it, the run ended before its first validation")
    resuming.check_config(run_dir, config, before)
    return train(config, run_dir, before["overrides"], checkpoint=run_dir / CHECKPOINT)


def train(
    config: dict[str, Any], run_dir: Path, overrides: Sequence[str] = (), checkpoint: Path | None = None
) -> dict[str, Any]:
    """One run from a checked, resolved config: writes the run directory and returns the record.

    The record is written when the run starts, and again when it finishes, fails or is interrupted.
    """
    from kd.parallel import cluster

    if cluster.join(config) > 0:
        return cluster.follow()
    hardware.refuse_missing(hardware.settings(config))
    with _in_use(run_dir), _logging(run_dir):
        _refuse_second(run_dir)
        if checkpoint is None:
            _refuse_to_overwrite(run_dir)
            return _train(config, run_dir, overrides, None, {})
        before = record.read(run_dir)
        # of a sitting that was killed the record does not know the time
        seconds = max(before.get("wall_clock_s", 0.0), resuming.check_files(run_dir).seconds)
        return _train(config, run_dir, overrides, checkpoint, {**before, "wall_clock_s": seconds})


def _train(
    config: dict[str, Any], run_dir: Path, overrides: Sequence[str], checkpoint: Path | None, before: dict[str, Any]
) -> dict[str, Any]:
    """The run of a directory that is this process's; ``before``: the record of an earlier sitting, if there was one."""
    from kd.parallel import launch

    start = time.perf_counter()
    result = _opening(config, overrides)
    earlier = before.get("wall_clock_s", 0.0)
    try:
        import yaml

        if checkpoint is not None:
            result["started"] = before.get("started", result["started"])
            result.update({key: before.get(key) for key in inputs.KEYS})  # of a run of before this is not known
            result["wall_clock_s"] = earlier
        else:
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            record.write_text(run_dir / record.CONFIG, text)
        record.write(run_dir, result)
        result.update({"status": "finished", **launch.fit(config, run_dir, checkpoint)})
    except (KeyboardInterrupt, SystemExit) as error:
        result.update(status="interrupted", error="interrupted")
        raise KeyboardInterrupt(_kept(run_dir)) from error
    except Exception as error:
        shown = errors.named(error, run_dir)
        result.update(status="failed", error=str(shown) or type(shown).__name__, failure=errors.kind(shown))
        _log_failure(error)
        if shown is error:
            raise
        raise shown from error
    finally:
        result.pop("process", None)
        result["wall_clock_s"] = round(earlier + time.perf_counter() - start, 3)
        result.setdefault("peak_memory_mb", peak_memory())
        result["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        try:
            record.write(run_dir, result)
        except MachineFailure:
            if result["status"] not in ("failed", "interrupted"):  # else there is an error already
                raise
        finally:
            _close_loggers(result)
    return result


def _kept(run_dir: Path) -> str:
    """What an interrupted run has left, and the command that goes on with it."""
    if (run_dir / CHECKPOINT).is_file():
        return f"all up to its last validation is kept; to go on: {shlex.join(['kd', 'train', f'resume={run_dir}'])}"
    return f"nothing is kept, as there was no validation yet: remove {run_dir} and start again"


def _close_loggers(result: dict[str, Any]) -> None:
    loggers = sys.modules.get("kd.tracking.loggers")  # not imported: nothing was opened in this process
    if loggers is not None:
        loggers.finish_wandb(result)


@contextmanager
def _in_use(run_dir: Path) -> Iterator[None]:
    """The directory is this process's until it ends, whatever happens to the other files in it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock.held(run_dir / lock.RUN, lock.PATIENCE))
        except BlockingIOError:
            raise KdError(f"{run_dir} is in use: another process trains in it") from None
        except OSError as error:
            raise _unwritable(error) from None
        yield


def _refuse_second(run_dir: Path) -> None:
    """Of a lock file that was deleted or moved while a run trains, a second process would lock another one."""
    there = record.read(run_dir) if (run_dir / record.FILE).exists() else {}
    if there.get("status") == "running" and lock.alive(there.get("process")):
        raise KdError(f"{run_dir} is in use: process {there['process']['pid']} trains in it")


def _refuse_to_overwrite(run_dir: Path) -> None:
    """A directory may be used again when what it holds failed before it had anything to lose."""
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
    from importlib.metadata import version

    from kd import __version__

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
        "protocol": {**config["protocol"], "epochs": config["recipe"]["epochs"]},
        "process": lock.this_process(),  # while it runs
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"kd": __version__, **{name: version(name) for name in ("torch", "lightning", "timm")}},
    }


# ---------------------------------------------------------------------- logging and resources


class _Console(logging.StreamHandler):
    """Writes to whatever ``sys.stdout`` is at that moment: progress bars and tests replace it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    def handleError(self, log_record: logging.LogRecord) -> None:
        """A reader that went away (``| head``) does not stop a run, nor fill the terminal; nor does a full disk."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(log_record)

    @property
    def stream(self) -> Any:
        return sys.stdout

    @stream.setter
    def stream(self, value: Any) -> None:
        pass


class _File(logging.FileHandler):
    """A line that does not fit on the disk is lost: the run fails where a file that counts does not fit."""

    def handleError(self, log_record: logging.LogRecord) -> None:
        """As of the console."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(log_record)


def start_logging(run_dir: Path) -> list[logging.Handler]:
    """Log to the console and to ``train.log``."""
    try:
        file = _File(run_dir / "train.log", encoding="utf-8")
    except OSError as error:
        raise _unwritable(error) from None
    assert file.stream is not None
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers: list[logging.Handler] = [file] if _is_stdout(file.stream) else [_Console(), file]
    logger = logging.getLogger("kd")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in handlers:
        logger.addHandler(handler)
    return handlers


def _is_stdout(stream: Any) -> bool:
    """Whether what is printed goes into this file already, as in the jobs of a sweep."""
    try:
        return os.path.samestat(os.fstat(sys.stdout.fileno()), os.fstat(stream.fileno()))
    except (OSError, ValueError, AttributeError):  # replaced by something that is no file
        return False


def _unwritable(error: OSError) -> KdError:
    return KdError(f"the run directory cannot be written: {error.filename}: {error.strerror}")


@contextmanager
def _logging(run_dir: Path) -> Iterator[None]:
    handlers = start_logging(run_dir)
    try:
        yield
    finally:
        for handler in handlers:
            logging.getLogger("kd").removeHandler(handler)
            with suppress(OSError):  # what a full disk has not taken
                handler.close()


def _log_failure(error: Exception) -> None:
    """The whole traceback, into the run's own log only: the console gets it, or one sentence, from the caller."""
    text = "".join(traceback.format_exception(error))
    for handler in logging.getLogger("kd").handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(logging.LogRecord("kd", logging.ERROR, __file__, 0, text, None, None))


def peak_memory() -> dict[str, float]:
    """Peak resident memory of the process since it began, and of the GPU in this run, in MiB."""
    import resource

    unit = 1024 if sys.platform != "darwin" else 1024**2
    peak = {"process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak["gpu"] = round(torch.cuda.max_memory_allocated() / 1024**2, 1)
    return peak


if __name__ == "__main__":
    from kd.cli.main import guarded

    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(guarded(main, sys.argv[1:]))
