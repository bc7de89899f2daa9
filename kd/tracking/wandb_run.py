"""A Weights & Biases run that cannot hurt the work it watches: no torch, and wandb is imported when one is opened.

Opened in bounded time, offline when the server is away; closed in bounded time; what was not taken stays on disk, in
``DIRECTORY/wandb``, where ``kd wandb sync`` finds it. A file that W&B holds entirely has a ``.synced`` mark beside it,
the mark of wandb's own ``wandb sync``.
"""

from __future__ import annotations

import logging
import netrc
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

SETTINGS: dict[str, Any] = {
    "silent": True,  # what a user must know is in our own lines
    "disable_git": True,  # it would keep patches of the working tree; the commit is in result.json
    "save_code": False,
    "disable_job_creation": True,
    "x_disable_viewer": True,  # a question of ten seconds to a server that may be away
    "x_stats_sampling_interval": 60.0,  # seconds between two system samples; wandb's 15 fill the disk
    "finish_timeout_raises": True,
}


def has_key() -> bool:
    """Tell whether wandb would log in without asking: a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    own = urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname
    return any("wandb" in host or host == own for host in hosts)


def mode(offline: bool | None) -> str:
    """Return ``WANDB_MODE`` when it forbids the network, else as asked; ``None``: online where there is a key."""
    asked = os.environ.get("WANDB_MODE")
    if asked in ("offline", "dryrun", "disabled"):
        return "disabled" if asked == "disabled" else "offline"
    return "offline" if offline or (offline is None and not has_key()) else "online"


def run_files(directory: Path) -> list[Path]:
    """Return the ``.wandb`` files below a directory, online or offline, oldest first."""
    return sorted(f for f in directory.rglob("wandb/*run-*/run-*.wandb") if not f.parent.is_symlink())


def run_id(directory: Path) -> str:
    """Return the id of the W&B run that the directory holds already, wherever it was moved to; else a new one."""
    for file in reversed(run_files(directory)):
        if file.parents[2] == directory:
            return file.stem.removeprefix("run-")
    return secrets.token_hex(6)


def send_later(directory: Path) -> str:
    """Return the command that sends what the directory holds."""
    return f"kd wandb sync {shlex.quote(str(directory))}"


def open_run(directory: Path, timeout: float, offline: bool | None = None, **init: Any) -> Any:
    """Return a ``wandb.Run`` that writes below ``directory``: online within ``timeout`` seconds, else offline.

    ``init``: arguments of ``wandb.init``. Raises only where not even the disk can be written.
    """
    # wandb's reports about itself wait for a dead server too, at the very end of the process
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.pop("WANDB_SERVICE", None)  # of a parent process, or of one that died: a run has a service of its own
    import wandb

    how = mode(offline)
    init["dir"] = str(directory)
    settings = wandb.Settings(**SETTINGS, init_timeout=timeout, finish_timeout=timeout)
    if how == "online":
        before = set(directory.glob("wandb/run-*"))
        try:
            reach(wandb.setup(settings).settings.base_url, timeout)
            run = wandb.init(mode="online", settings=settings, **init)
            log.info("W&B: %s", run.url)
            return run
        except Exception as error:
            log.warning("W&B cannot be used now (%s): this run is kept offline", reason(error))
            teardown()  # the service would call the run's id taken
            for empty in set(directory.glob("wandb/run-*")) - before:
                shutil.rmtree(empty, ignore_errors=True)
        how = "offline"
    return wandb.init(mode=how, settings=settings, **init)  # type: ignore[arg-type]


def reach(url: str, timeout: float) -> None:
    """Ask for any answer at all: a refused connection is known at once, wandb would go on trying. Raises if none."""
    import requests

    requests.get(url, timeout=timeout, allow_redirects=False, stream=True).close()


def close_run(run: Any, directory: Path, summary: Mapping[str, Any], exit_code: int = 0) -> None:
    """Write the summary, close the run within its timeout, and say where it is. Never raises."""
    problems: list[str] = []
    for act in (lambda: run.summary.update(dict(summary)), lambda: run.finish(exit_code=exit_code)):
        try:
            act()
        except (Exception, SystemExit) as error:
            problems.append(reason(error))
    teardown(run)
    online = not run.disabled and not run.offline
    problems += _refused(run) if online and not problems else []
    if problems:
        log.warning("W&B did not take everything (%s)", problems[0])
    sent = online and not problems
    if sent:
        Path(f"{run.settings.sync_file}.synced").touch()
    elif not run.disabled:
        log.info("W&B: kept in the run directory; send it with: %s", send_later(directory))


def _refused(run: Any) -> list[str]:
    """Return what the server refused: ``finish`` returns as if nothing had been, wandb's own log tells."""
    try:
        text = Path(run.settings.log_internal).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return [reason(error)]
    found = re.search(r"(filestream: fatal error|file transfer: upload: failed)[^\"]*", text)
    return [_short(found[0])] if found else []


def teardown(closed: Any = None) -> None:
    """End wandb's service process, so that neither the next run nor a forked one finds it; not under another's run."""
    import wandb

    try:
        if wandb.run is closed:  # its service died, so that it could not be closed
            wandb.run = None
        if wandb.run is None:
            wandb.teardown()
    except (Exception, SystemExit) as error:
        log.debug("wandb.teardown: %s", error)


def reason(error: BaseException) -> str:
    """Return what wandb or the network complains about, in one line without what no reader needs."""
    if isinstance(error, OSError) and (found := re.search(r"Connection refused|timed out|resolve \S+", str(error))):
        return _short(found[0].lower())
    return _short("; ".join(str(error).split("\n"))) or type(error).__name__


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:159]}…"
