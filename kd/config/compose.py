"""Compose the config of a command line and check it, once. No torch."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict

from kd.config import explain
from kd.config.checks import check
from kd.config.composition import CONF
from kd.errors import KdError

NAME = "train"  # of the configuration file that everything is composed from
SEARCH = "hydra.searchpath="


def composed(overrides: Sequence[str], config_dir: str | None = None) -> DictConfig:
    """Compose the config of ``kd train`` for these overrides, with Hydra's own node.

    ``config_dir``: a folder of further configuration files. ``KdError`` when it does not compose.
    """
    search = places(overrides, config_dir)
    kept = [o for o in overrides if not o.startswith(SEARCH)]
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose(NAME, overrides=[*kept, *explain.searched(search)], return_hydra_config=True)
    except explain.COMPOSING as error:
        raise KdError(explain.explain(error, overrides, search)) from error
    return cfg


def places(overrides: Sequence[str], config_dir: str | None = None) -> list[str]:
    """List where configuration files are beside the package's own: ``--config-dir`` and ``hydra.searchpath``."""
    found = [f"file://{os.path.abspath(config_dir)}"] if config_dir else []
    for override in (o for o in overrides if o.startswith(SEARCH)):
        with contextlib.suppress(HydraException):  # a typo: Hydra says so
            listed = OverridesParser.create().parse_override(override).value()
            found += [str(place) for place in listed] if isinstance(listed, list) else []
    return found


def checked(overrides: Sequence[str], config_dir: str | None = None) -> dict[str, Any]:
    """Compose and check; return the resolved config as plain containers, without Hydra's node.

    ``HydraConfig`` is left with what was composed: a check reads from there which file or argument set a key.
    """
    cfg = composed(overrides, config_dir)
    HydraConfig.instance().set_config(cfg)
    return check_composed(cfg)


def check_composed(cfg: DictConfig) -> dict[str, Any]:
    """Check and resolve what Hydra composed, which stays as it is. ``KdError`` when it cannot work."""
    return check(without_hydra(cfg))


def without_hydra(cfg: DictConfig) -> DictConfig:
    """Copy a config without Hydra's own node, where there is one."""
    own = copy.deepcopy(cfg)
    with open_dict(own):
        own.pop("hydra", None)
    return own
