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
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from kd.config import explain, keys
from kd.config.composition import CONF, command_line, key_of
from kd.config.hardware import refuse_missing, settings
from kd.errors import KdError
from kd.sweeps import job as jobs

log = logging.getLogger("kd.cli.hydra_app")

SEARCH = "hydra.searchpath="
SAME_COMMAND = "finished runs are kept, the others go on from their last validation: give the same command again"
Job = Callable[[dict[str, Any], Path, Sequence[str]], Any]


def composed(overrides: Sequence[str], config_dir: str | None = None) -> DictConfig:
    """The config of ``kd train`` for these overrides, with Hydra's own node. ``KdError`` when it does not compose."""
    search = places(overrides, config_dir)
    kept = [o for o in overrides if not o.startswith(SEARCH)]
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose("train", overrides=[*kept, *explain.searched(search)], return_hydra_config=True)
    except explain.COMPOSING as error:
        raise KdError(explain.explain(error, overrides, search)) from error
    return cfg


def places(overrides: Sequence[str], config_dir: str | None = None) -> list[str]:
    """Where configuration files are beside the package's own: ``--config-dir`` and what ``hydra.searchpath`` lists."""
    found = [f"file://{os.path.abspath(config_dir)}"] if config_dir else []
    for override in (o for o in overrides if o.startswith(SEARCH)):
        with contextlib.suppress(HydraException):  # a typo: Hydra says so
            listed = OverridesParser.create().parse_override(override).value()
            found += [str(place) for place in listed] if isinstance(listed, list) else []
    return found


def checked(overrides: Sequence[str], config_dir: str | None = None) -> dict[str, Any]:
    """The composed config, checked and resolved, without Hydra's node."""
    cfg = composed(overrides, config_dir)
    HydraConfig.instance().set_config(cfg)
    return jobs.checked(cfg)


def run(argv: list[str], job: Job) -> int:
    """Run ``job`` once; with ``-m`` the config's sweeper and launcher run :func:`kd.sweeps.job.task` many times.

    Bad input raises ``KdError`` before a directory exists. Returns the exit code.
    """
    arguments = _parsed(argv)
    shows_only = any((arguments.help, arguments.hydra_help, arguments.cfg, arguments.info, arguments.shell_completion))
    if arguments.config_dir and not os.path.isdir(arguments.config_dir):
        raise KdError(f"--config-dir {arguments.config_dir} is not a folder")
    if arguments.cfg and not arguments.multirun and any("." in key_of(o) for o in arguments.overrides):
        _refuse_typos(arguments.overrides, arguments.config_dir)
    if not shows_only and not arguments.multirun:
        refuse_missing(settings(checked(arguments.overrides, arguments.config_dir)))
    failed: list[Exception] = []

    def single(cfg: DictConfig) -> None:
        settings = HydraConfig.get()
        try:
            job(jobs.checked(cfg), Path(settings.runtime.output_dir), list(settings.overrides.task))
        except Exception as error:  # kept: Hydra would print it its own way
            failed.append(error)

    flags = [a for a in argv if a not in arguments.overrides]  # Hydra wants them apart
    with _arguments([*flags, *arguments.overrides]), _full_errors():
        try:
            task = jobs.task if arguments.multirun else single
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(task)()
        except SystemExit as stop:  # after printing help or a config
            if stop.code:
                raise
        except KeyboardInterrupt:
            if arguments.multirun:
                raise KeyboardInterrupt(SAME_COMMAND) from None
            raise
        except explain.KNOWN as error:
            search = places(arguments.overrides, arguments.config_dir)
            raise KdError(explain.explain(error, arguments.overrides, search)) from error
        except OSError as error:
            if error.filename is None:
                raise
            raise KdError(
                f"the run directory cannot be written: {error.filename}: {error.strerror} (set paths.runs or "
                "hydra.run.dir)"
            ) from error
    if failed:
        raise failed[0]
    return 0


def _refuse_typos(overrides: Sequence[str], config_dir: str | None) -> None:
    """``KdError`` for keys that there are not, before a config is shown; values may be missing or wrong."""
    cfg = composed(overrides, config_dir)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        cfg.pop("hydra")
    try:
        values: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:  # an interpolation that has no value yet
        return
    line = command_line()
    keys.drop_left_out(values, line)
    if problems := list(keys.problems(values, line)):
        raise KdError("\n".join(problems))


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
