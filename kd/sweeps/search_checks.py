"""What is checked and measured before a search begins: each end of its axes, its networks, how many run at once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from kd.errors import KdError
from kd.records.manifest import Job
from kd.sweeps.engine import Engine
from kd.sweeps.limits import STUDENTS, Candidates
from kd.sweeps.options import Settings
from kd.sweeps.refusals import refuse_duplicates, refuse_unbuildable
from kd.sweeps.space import Space


def batch(given: int | None, engine: Engine, base: Mapping[str, Any]) -> int:
    """Count the trials that are asked for together: what was given, or as many as the local launcher runs at once."""
    if given is not None:
        return given
    launcher = engine.launcher
    if not hasattr(launcher, "at_once"):
        raise KdError("hydra.sweeper.batch has no value: say how many trials this launcher shall run at once")
    return launcher.at_once(base["hardware"])


def limited(engine: Engine, where: Space, settings: Settings, base: Mapping[str, Any]) -> Candidates | None:
    """Return what keeps to the limits, if there are any. ``KdError`` when no network of the space is within them."""
    if not settings.limits:
        return None
    found = Candidates(engine.directory, settings.limits, settings.cost, base)
    configs = []
    for params in where.students(STUDENTS):
        with suppress(KdError):  # a combination that does not fit: said when it is drawn
            configs.append(engine.compose(Job("trial", where.label(params), where.overrides(params))))
    if configs:
        print(found.survey(configs), flush=True)
    return found


def try_out(engine: Engine, where: Space) -> dict[str, Any]:
    """Compose the ends of every axis, one axis after the other; the first config. ``KdError`` when one cannot work."""
    configs = {}
    for params in where.corners():
        try:
            configs[where.label(params)] = engine.compose(Job("trial", where.label(params), where.overrides(params)))
        except KdError as error:
            hint = ": write int(interval(…)) for whole numbers" if "converted to Integer" in str(error) else ""
            raise KdError(f"{error}{hint}") from None
    refuse_duplicates(configs)
    refuse_unbuildable(configs, engine.directory)
    return next(iter(configs.values()))
