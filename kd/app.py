"""The Hydra application behind ``kd train``: composition first, all checks, and only then a run directory."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from kd import explain
from kd.config import CONF, check
from kd.errors import KdError

log = logging.getLogger("kd.app")

Job = Callable[[dict[str, Any], Path, Sequence[str]], Any]


def composed(overrides: Sequence[str], config_dir: str | None = None) -> DictConfig:
    """The config of ``kd train`` for these overrides, with Hydra's own node. ``KdError`` when it does not compose."""
    search = [f"hydra.searchpath=[file://{os.path.abspath(config_dir)}]"] if config_dir else []
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose("train", overrides=[*overrides, *search], return_hydra_config=True)
    except explain.KNOWN as error:
        raise KdError(explain.explain(error, overrides)) from error
    return cfg


def checked(overrides: Sequence[str], config_dir: str | None = None) -> dict[str, Any]:
    """The composed config, checked and resolved, without Hydra's node."""
    cfg = composed(overrides, config_dir)
    HydraConfig.instance().set_config(cfg)
    return _check(cfg)


def _check(cfg: DictConfig) -> dict[str, Any]:
    from omegaconf import open_dict

    with open_dict(cfg):
        cfg.pop("hydra", None)
    return check(cfg)


def run(argv: list[str], job: Job) -> int:
    """Run ``job`` once, or for each combination of a sweep. Returns the exit code.

    Bad input raises ``KdError`` before a run directory exists. In a sweep a failed job does not stop the others;
    the failures are listed at the end.
    """
    arguments = _parsed(argv)
    shows_only = any((arguments.help, arguments.hydra_help, arguments.cfg, arguments.info, arguments.shell_completion))
    if not shows_only and not arguments.multirun:
        _precheck(arguments)
    failures: list[str] = []

    def task(cfg: DictConfig) -> None:
        settings = HydraConfig.get()
        sweep = settings.mode == RunMode.MULTIRUN
        try:
            config = _check(cfg)
            job(config, Path(settings.runtime.output_dir), list(settings.overrides.task))
        except Exception as error:
            if not sweep:
                raise
            label = f"job {settings.job.num} ({settings.job.override_dirname})"
            failures.append(f"{label} failed: {error}")
            print(f"kd: {failures[-1]}", file=sys.stderr)

    with _arguments(argv), _full_errors():
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(task)()
        except explain.KNOWN as error:
            raise KdError(explain.explain(error, arguments.overrides)) from error
        except OSError as error:
            if error.filename is None:
                raise
            raise KdError(
                f"the run directory cannot be written: {error.filename}: {error.strerror} (set paths.runs or "
                "hydra.run.dir)"
            ) from error
    if failures:
        raise KdError("\n".join([f"{len(failures)} of the sweep's jobs failed:", *failures]))
    return 0


def _parsed(argv: list[str]) -> Any:
    try:
        return get_args_parser().parse_args(argv)
    except SystemExit as stop:
        if stop.code:
            raise KdError("the flags are not understood: kd train --help lists what there is") from None
        raise


def _precheck(arguments: Any) -> None:
    """Compose and check once before Hydra makes a directory, so that bad input leaves nothing behind."""
    cfg = composed(arguments.overrides, arguments.config_dir)
    HydraConfig.instance().set_config(cfg)
    _check(cfg)


@contextmanager
def _arguments(argv: list[str]) -> Iterator[None]:
    """Hydra reads ``sys.argv``."""
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
