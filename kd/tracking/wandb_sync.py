"""Sends to Weights & Biases what runs have kept on disk, by wandb's own command. No torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from kd.errors import KdError
from kd.records.state import busy
from kd.tracking import wandb_run

# wandb's own command tries for an hour by default; what the user has set in the environment wins
PATIENCE = {
    "WANDB_HTTP_TIMEOUT": "30",
    **{f"WANDB_X_{part}_RETRY_MAX": "4" for part in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER")},
    "WANDB_X_FILE_STREAM_TIMEOUT_SECONDS": "60",
    "WANDB_X_DISABLE_VIEWER": "true",
    "WANDB_ERROR_REPORTING": "false",
}
OF_A_RUN = ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_DIR", "WANDB_SILENT", "WANDB_QUIET")


def sync(directories: Sequence[Path], timeout: float = 600) -> int:
    """Send the W&B runs below the directories that are not sent, each within ``timeout`` seconds. The exit code.

    ``KdError`` when a directory does not exist, no key is found or the server gives no answer: nothing is sent then.
    """
    missing = [str(d) for d in directories if not d.is_dir()]
    if missing:
        raise KdError(f"there is no directory {', '.join(missing)}")
    files = sorted({f.resolve() for d in directories for f in wandb_run.run_files(d)}, key=_by_run)
    open_ones = [f for f in files if not _sent(f)]
    training = [f for f in open_ones if busy(f.parents[2])]
    waiting = [f for f in open_ones if f not in training]
    if waiting:
        _check_server()
    outcomes = [_send(list(group), timeout) for _, group in groupby(waiting, key=lambda f: _by_run(f)[0])]
    sent, failed = outcomes.count(True), outcomes.count(False)
    there = len({_by_run(f)[0] for f in files}) - len({_by_run(f)[0] for f in open_ones})
    parts = {"sent": sent, "failed": failed, "still training": len(training), "already there": there}
    print(", ".join(f"{count} {what}" for what, count in parts.items() if count) or "no W&B runs found")
    return 1 if failed else 0


def _by_run(file: Path) -> tuple[str, Path]:
    """Order by run, as the parts of a resumed one belong together, then by date."""
    return f"{file.parents[2]}/{file.stem}", Path(file.parent.name.removeprefix("offline-"))


def _mark(file: Path) -> Path:
    return Path(f"{file}.synced")


def _sent(file: Path) -> bool:
    return _mark(file).exists()


def _check_server() -> None:
    if not wandb_run.has_key():
        raise KdError("no W&B key is found: `wandb login`, or set WANDB_API_KEY; nothing was sent")
    import wandb

    url = wandb.setup(wandb.Settings(silent=True)).settings.base_url
    wandb_run.teardown()
    try:
        wandb_run.reach(url, timeout=10)
    except OSError as error:
        raise KdError(f"W&B at {url} cannot be reached ({wandb_run.reason(error)}): nothing was sent") from None


def _send(files: list[Path], timeout: float) -> bool:
    """Send the files of one run, the first first, by wandb's own command. Prints one line; whether it worked."""
    environment = {k: v for k, v in {**PATIENCE, **os.environ}.items() if k not in OF_A_RUN}
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", *(str(f) for f in files)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        output = re.sub(r"\x1b\[[0-9;]*m", "", done.stderr + done.stdout)
        errors = re.findall(r"ERROR (?:\[\S+\] )?(.*)", output)
        if not errors and not all(map(_sent, files)):
            errors = output.strip().splitlines()[-1:] or ["wandb sync said nothing"]
    except subprocess.TimeoutExpired:
        errors = [f"not done in {timeout:g} s"]
    if errors:  # its exit code is 0 and its mark is set even when the server refused the rows
        for file in files:
            _mark(file).unlink(missing_ok=True)
    where = os.path.relpath(files[-1].parents[2])
    print(f"{where}: failed: {errors[0]}" if errors else f"{where}: sent", flush=True)
    return not errors
