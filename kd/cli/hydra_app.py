"""The Hydra application behind ``kd train``: composition first, all checks, and only then a run directory."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.callbacks import Callbacks
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd.config import explain, keys
from kd.config.compose import NAME, check_composed, composed, places, without_hydra
from kd.config.composition import CONF, command_line, key_of, typed
from kd.config.hardware import settings
from kd.errors import KdError
from kd.parallel.devices import refuse_missing
from kd.sweeps import job as jobs
from kd.sweeps.plugins import register

SAME_COMMAND = "finished runs are kept, the others go on from their last validation: give the same command again"
Job = Callable[[dict[str, Any], Path, Sequence[str]], Any]


def run(argv: list[str], job: Job) -> int:
    """Run ``job`` once; with ``-m`` the config's sweeper and launcher run :func:`kd.sweeps.job.task` many times.

    Bad input raises ``KdError`` before a directory exists. Returns the exit code.
    """
    arguments = parse_flags(argv)
    shows_only = any((arguments.help, arguments.hydra_help, arguments.cfg, arguments.info))
    if arguments.config_dir and not os.path.isdir(arguments.config_dir):
        raise KdError(f"--config-dir {arguments.config_dir} is not a folder")
    if arguments.cfg and not arguments.multirun and any("." in key_of(o) for o in arguments.overrides):
        _refuse_typos(arguments.overrides, arguments.config_dir)
    if shows_only or arguments.shell_completion or arguments.multirun:
        with _explained(arguments):
            _run_hydra(argv, arguments)
    else:
        _run_once(arguments, job)
    return 0


def _run_hydra(argv: Sequence[str], arguments: Any) -> None:
    """Let Hydra answer ``--help``, ``--cfg`` and ``--info``, and sweep."""
    register()
    flags = [a for a in argv if a not in arguments.overrides]  # Hydra wants them apart
    with _arguments([*flags, *arguments.overrides]), _full_errors():
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=NAME)(jobs.task)()
        except SystemExit as stop:  # after printing help or a config
            if stop.code:
                raise
        except KeyboardInterrupt:
            if arguments.multirun:
                raise KeyboardInterrupt(SAME_COMMAND) from None
            raise


def _run_once(arguments: Any, job: Job) -> None:
    """Compose and check, then run the job as ``hydra.main`` does, which would compose a second time."""
    for flag in ("config_name", "config_path", "experimental_rerun"):
        if getattr(arguments, flag):
            raise KdError(f"--{flag.replace('_', '-')} is not allowed here: kd train composes {NAME}.yaml")
    cfg = composed(arguments.overrides, arguments.config_dir)
    if cfg.hydra.mode is RunMode.MULTIRUN:
        raise KdError("hydra.mode = MULTIRUN is a sweep: add -m")
    HydraConfig.instance().set_config(cfg)
    config = check_composed(cfg)
    refuse_missing(settings(config))
    failed: list[Exception] = []

    def task(_: DictConfig) -> None:
        node = HydraConfig.get()
        try:
            job(config, Path(node.runtime.output_dir), typed(node.overrides.task))
        except Exception as error:  # kept: Hydra would print it its own way
            failed.append(error)

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks(cfg))
    context.callbacks.on_run_start(config=cfg, config_name=NAME)
    with _explained(arguments):
        ended = run_job(task, cfg, job_dir_key="hydra.run.dir", job_subdir_key=None, hydra_context=context)
    context.callbacks.on_run_end(config=cfg, config_name=NAME, job_return=ended)
    if failed:
        raise failed[0]


@contextmanager
def _explained(arguments: Any) -> Iterator[None]:
    """Say in a sentence what Hydra complains about, and where a run directory cannot be written."""
    try:
        yield
    except explain.KNOWN as error:
        search = places(arguments.overrides, arguments.config_dir)
        raise KdError(explain.explain(error, arguments.overrides, search)) from error
    except OSError as error:
        if error.filename is None:
            raise
        raise KdError(
            f"the run directory cannot be written: {error.filename}: {error.strerror} (set paths.runs or hydra.run.dir)"
        ) from error


def _refuse_typos(overrides: Sequence[str], config_dir: str | None) -> None:
    """Raise ``KdError`` for keys that there are not, before a config is shown; values may be missing or wrong."""
    cfg = composed(overrides, config_dir)
    HydraConfig.instance().set_config(cfg)
    try:
        values: Any = OmegaConf.to_container(without_hydra(cfg), resolve=True)
    except OmegaConfBaseException:  # an interpolation that has no value yet
        return
    line = command_line()
    keys.drop_left_out(values, line)
    if problems := list(keys.problems(values, line)):
        raise KdError("\n".join(problems))


def parse_flags(argv: list[str]) -> Any:
    """Parse as Hydra does; ``KdError`` for flags that it does not have."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return get_args_parser().parse_intermixed_args(argv)
    except SystemExit as stop:
        if stop.code:
            reason = printed.getvalue().strip().rpartition("error: ")[2]
            raise KdError(f"the flags are not understood: {reason}") from None
        raise


@contextmanager
def _arguments(argv: list[str]) -> Iterator[None]:
    """Put the arguments into ``sys.argv``, where Hydra reads them."""
    before = sys.argv
    sys.argv = ["kd train", *argv]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _full_errors() -> Iterator[None]:
    """Let Hydra raise instead of printing and exiting: the sentence is ours."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before
