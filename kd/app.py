"""The Hydra application behind ``kd train``: composition first, all checks, and only then a run directory."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
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
    if not shows_only:
        for overrides in _samples(arguments.overrides) if arguments.multirun else [arguments.overrides]:
            checked(overrides, arguments.config_dir)
    failed: list[tuple[str, Exception]] = []

    def task(cfg: DictConfig) -> None:
        settings = HydraConfig.get()
        overrides = list(settings.overrides.task)
        try:
            job(_check(cfg), Path(settings.runtime.output_dir), overrides)
        except Exception as error:  # kept: Hydra would print it its own way, and stop a sweep
            failed.append((", ".join(overrides), error))
            if settings.mode == RunMode.MULTIRUN:
                print(f"kd: job {settings.job.num} failed: {error}", file=sys.stderr)

    flags = [a for a in argv if a not in arguments.overrides]  # Hydra wants them apart
    with _arguments([*flags, *arguments.overrides]), _full_errors():
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(task)()
        except SystemExit as stop:  # after printing help or a config
            if stop.code:
                raise
        except explain.KNOWN as error:
            raise KdError(explain.explain(error, arguments.overrides)) from error
        except OSError as error:
            if error.filename is None:
                raise
            raise KdError(
                f"the run directory cannot be written: {error.filename}: {error.strerror} (set paths.runs or "
                "hydra.run.dir)"
            ) from error
    if failed and not arguments.multirun:
        raise failed[0][1]
    if failed:
        sentences = [f"{overrides or 'defaults'}: {error}" for overrides, error in failed]
        raise KdError("\n".join([f"{len(failed)} of the sweep's jobs failed:", *sentences]))
    return 0


def _samples(overrides: list[str]) -> Iterator[list[str]]:
    """Of a sweep, every value of every axis once, with the first values of the others: enough to find a typo."""
    try:
        loader = ConfigLoaderImpl(config_search_path=create_config_search_path(str(CONF)))
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)  # globs ask the loader
    except explain.KNOWN as error:
        raise KdError(explain.explain(error, overrides)) from error
    settable = [o for o in parsed if not o.is_hydra_override()]
    axes = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line or ""]
        for o in settable
    ]
    empty = [o.input_line for o, axis in zip(settable, axes, strict=True) if not axis]
    if empty:
        raise KdError(f"{empty[0]} is a sweep over nothing")
    first = [axis[0] for axis in axes]
    yield first
    for position, axis in enumerate(axes):
        for value in axis[1:]:
            yield [*first[:position], value, *first[position + 1 :]]


def _parsed(argv: list[str]) -> Any:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return get_args_parser().parse_intermixed_args(argv)
    except SystemExit as stop:
        if stop.code:
            reason = said.getvalue().strip().rpartition("error: ")[2]
            raise KdError(f"the flags are not understood: {reason}") from None
        raise


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
