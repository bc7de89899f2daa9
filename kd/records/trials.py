"""Where a search keeps its trials: a journal file in its directory, or a data base. Optuna's own formats."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.config.instantiate import make
from kd.errors import KdError
from kd.records import record

JOURNAL = "optuna.log"
SETTINGS = "optuna.json"  # what a job, perhaps on another machine, must know of the search; only with a pruner


PRUNERS = {
    "median": {"_target_": "optuna.pruners.MedianPruner"},
    "hyperband": {"_target_": "optuna.pruners.HyperbandPruner"},
}


def require_optuna() -> None:
    """Raise ``KdError`` with the command that installs Optuna, if it is missing."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise KdError("a search needs the package optuna: pip install 'kd[optuna]', or pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def absolute(url: str | None) -> str | None:
    """Return an SQLite URL with an absolute path: it must mean the same file from everywhere."""
    prefix = "sqlite:///"
    return prefix + os.path.abspath(url[len(prefix) :]) if url and url.startswith(prefix) else url


def open_storage(directory: Path, url: str | None) -> Any:
    """Open the storage of a search: its journal file, or a data base by URL. ``KdError`` when it cannot be used."""
    from filelock import FileLock
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        if url is not None:
            return RDBStorage(url)
        # Optuna's own locks are files that a killed process leaves behind; this one falls with it
        lock: Any = FileLock(directory / f"{JOURNAL}.lock")
        return JournalStorage(JournalFileBackend(str(directory / JOURNAL), lock_obj=lock))
    except Exception as error:  # SQLAlchemy's, its drivers', json's
        where = f"hydra.sweeper.storage = {url}" if url else f"{directory / JOURNAL}"
        raise KdError(f"{where} cannot be used: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def truncate_torn_line(journal: Path) -> None:
    """Cut off a last line that was not written to its end: a machine that lost power may leave one.

    Call it before anybody else may write.
    """
    if not journal.is_file():
        return
    content = journal.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(journal, whole)


def write_settings(directory: Path, settings: Mapping[str, Any] | None) -> None:
    """Write what the jobs must know, or remove what an earlier search wrote."""
    if settings is None:
        (directory / SETTINGS).unlink(missing_ok=True)
    else:
        record.write_text(directory / SETTINGS, json.dumps(settings, indent=2) + "\n")


def read_settings(directory: Path) -> dict[str, Any] | None:
    """Return what the parent wrote; None: the search has no pruner."""
    file = directory / SETTINGS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def pruner(node: Mapping[str, Any] | str) -> Any:
    """Make a pruner by its short name or as a node with ``_target_``. ``KdError`` when it cannot be made."""
    return make(PRUNERS[node] if isinstance(node, str) else node, "hydra.sweeper.pruner")


def job_of(trial: Any) -> str | None:
    """Name the directory of a trial's run; None for a trial that was killed before it had one."""
    return trial.user_attrs.get("job")
