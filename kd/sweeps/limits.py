"""The limits of a search: candidates are measured before they are trained, and those above a limit are not.

What was measured of a network stands in ``candidates.json`` of the search's directory, so that a search that goes on
judges as it did.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kd.config.rules import number, refusals, refuse
from kd.deploy import cost, cost_file
from kd.errors import KdError, counted, did_you_mean
from kd.records import record
from kd.sweeps import pool

FILE = "candidates.json"
NAMES = {  # limit → what it limits
    "parameters": "parameters",
    "macs": "multiply-accumulates of a sample",
    "mb": "MB of weights in memory",
    "peak_mb": "MB that a pass takes, weights among them",
    "ms": "milliseconds of a pass",
    "latency_ratio": "the time of a pass ÷ the teacher's",
    "cost_month": "money a month",
}
DEAREST = (
    "latency_ratio",
    "ms",
    "cost_month",
    "macs",
    "peak_mb",
    "mb",
    "parameters",
)  # the first limited one is an objective
TIMED = ("ms", "latency_ratio", "cost_month")
BATCH, ROUNDS = 1, 30  # of a pass that is timed, and how often
STUDENTS = 48  # that are measured before a search begins, where there are no more
JOB = "job"  # beside what was measured of a network above a limit: the trial that stands for it
ERROR = "error"  # as kd.deploy.candidates, which is not imported here: it needs torch


def check(limits: Any, prices: Any) -> None:
    """Raise ``KdError`` for a limit that there is not, a value that is none, or money without prices by the hour."""
    if limits is None:
        return
    if not isinstance(limits, Mapping) or not limits:
        raise KdError(f"hydra.sweeper.limits = {limits} is not allowed: it must be a mapping of {', '.join(NAMES)}")
    unknown = [str(name) for name in limits if name not in NAMES]
    refuse(
        [
            f"hydra.sweeper.limits: there is no limit {name}{did_you_mean(name, NAMES)}; limits: {', '.join(NAMES)}"
            for name in unknown
        ]
    )
    refuse(refusals("hydra.sweeper.limits.", limits, dict.fromkeys(NAMES, number(above=0))))
    if ("cost_month" in limits) != (prices is not None):
        raise KdError("hydra.sweeper.limits.cost_month and hydra.sweeper.cost go together: a limit, and the prices")
    if prices is not None and cost_file.read(str(prices)).student.price_per_hour is None:
        raise KdError(f"hydra.sweeper.cost = {prices} has prices by the token, which no network changes: by the hour")


def objective(limits: Mapping[str, float]) -> str:
    """Return the cost that a search with these limits makes small."""
    return next(name for name in DEAREST if name in limits)


class Candidates:
    """The networks of a search, measured once each; :meth:`above` names those that are above a limit.

    ``base``: the config of a trial, for what all share.
    """

    def __init__(self, directory: Path, limits: Mapping[str, float], prices: str | None, base: Mapping[str, Any]):
        self.file, self.limits = directory / FILE, dict(limits)
        self.cost = None if prices is None else cost_file.read(prices)
        taught = any(base["teacher"].get(key) for key in ("model", "checkpoint"))
        if "latency_ratio" in limits and not taught:
            raise KdError("a limit of latency_ratio needs a teacher: give teacher.checkpoint=RUN or model@teacher=NAME")
        self.known: dict[str, dict[str, Any]] = {}
        if self.file.is_file():
            self.known = json.loads(self.file.read_text(encoding="utf-8"))

    def of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return what was measured of the student of a config, {} where nothing was."""
        return self.known.get(_network(config), {})

    def above(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Measure the networks that are not known yet; job → which limit its network is above, and by how much."""
        self.measure(configs.values())
        found = {name: reason for name, config in configs.items() if (reason := self._reason(self.of(config)))}
        for name in found:
            self.known[_network(configs[name])].setdefault(JOB, name)
        record.write_text(self.file, json.dumps(self.known, indent=2) + "\n")
        return found

    def job(self, config: Mapping[str, Any]) -> str | None:
        """Return the job that stands for all of this network, which is above a limit; None: it is not, or not known."""
        return self.of(config).get(JOB)

    def survey(self, configs: Sequence[Mapping[str, Any]]) -> str:
        """Measure all networks that there are before anything is written, and say how many are within the limits.

        ``KdError`` when none is.
        """
        self.measure(configs)
        within = sum(not self._reason(found) for found in self.known.values())
        if not within:
            raise self.none()
        return f"{len(self.known)} networks measured, {within} within {self.wanted}"

    def measure(self, configs: Iterable[Mapping[str, Any]]) -> None:
        """Measure the networks that are not known yet."""
        new = {key: config for config in configs if (key := _network(config)) not in self.known}
        if new:
            from kd.deploy.candidates import measure  # start-up: torch

            pool.preload()
            timed = any(name in TIMED for name in self.limits)
            call = functools.partial(measure, new, timed, BATCH, ROUNDS, "peak_mb" in self.limits)
            for key, found in pool.run_in_subprocess(call).items():
                self.known[key] = self._priced(found)

    def _priced(self, found: dict[str, Any]) -> dict[str, Any]:
        if self.cost is None or ERROR in found:
            return found
        prices = replace(self.cost.student, requests_per_second=found["samples_per_second"])
        return {**found, "cost_month": cost.month(prices, self.cost.volume)}

    def _reason(self, found: Mapping[str, Any]) -> str:
        if ERROR in found:
            return str(found[ERROR])
        wrong = [
            f"{name} {shown(found[name])} is above {shown(most)}"
            for name, most in self.limits.items()
            if found[name] > most
        ]
        return "; ".join(wrong)

    @property
    def wanted(self) -> str:
        """Write the limits."""
        return ", ".join(f"{name} ≤ {shown(most)}" for name, most in self.limits.items())

    def none(self) -> KdError:
        """Return the error of a search in which no network is within the limits."""
        made = [found for found in self.known.values() if ERROR not in found]
        if not made:
            reason = next(iter(self.known.values()), {}).get(ERROR, "none was measured")
            return KdError(f"no candidate could be made: {reason}")
        least = ", ".join(f"{name} {shown(min(found[name] for found in made))}" for name in self.limits)
        of = counted(len(made), "network")
        return KdError(
            f"no candidate is within {self.wanted}: of {of} the smallest numbers are {least}; "
            "raise the limit, or search over smaller networks"
        )


def shown(value: float) -> str:
    """Write a measured number: whole ones in full, others with four digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _network(config: Mapping[str, Any]) -> str:
    """Return what configs share whose students are the same network beside the same teacher."""
    kept = ("student", "teacher", "data", "task", "hardware", "protocol")
    return record.config_hash({key: config[key] for key in kept})


def recommended(found: Sequence[tuple[str, Mapping[str, float]]], sizes: Mapping[str, Any], share: bool) -> str:
    """Name the cheapest trial whose validation is within one row of the best; ``found``: job and its objectives.

    The first objective is of validation, where more is better, the second a cost. ``sizes``: rows of the splits;
    ``share``: whether the first is a share of rows.
    """
    first, second = list(found[0][1])[:2]
    least = 1 / sizes["val"] if share and sizes.get("val") else 0.0
    best = max(values[first] for _, values in found)
    near = [(values[second], -values[first], name) for name, values in found if values[first] >= best - least - 1e-9]
    return min(near)[2]
