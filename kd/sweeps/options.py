"""The options of a search by Optuna, ``hydra.sweeper.*``: checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kd.config.instantiate import make
from kd.config.rules import refusals, refuse, whole
from kd.errors import KdError, did_you_mean
from kd.records import trials
from kd.sweeps import limits, pool

SAMPLERS: Mapping[str, Mapping[str, Any]] = {
    "tpe": {"_target_": "optuna.samplers.TPESampler"},
    "random": {"_target_": "optuna.samplers.RandomSampler"},
    "nsga2": {"_target_": "optuna.samplers.NSGAIISampler"},
}
COSTS = ("latency_ms", "parameters", "macs", "wall_clock_s")  # objectives beside val/…: the smaller the better
Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Settings:
    """``hydra.sweeper``: see ``conf/hydra/sweeper/optuna.yaml``. ``KdError`` for the first value not allowed."""

    n_trials: Any
    objectives: Any = None
    sampler: Any = "tpe"
    pruner: Any = None
    seed: Any = 0
    batch: Any = None
    storage: Any = None
    params: Mapping[str, str] | None = None
    limits: Any = None
    cost: Any = None

    def __post_init__(self) -> None:
        """Look at what needs no config of a run."""
        rules = {"n_trials": whole(1), "batch": whole(1).or_null, "seed": whole(0).or_null}
        refuse(refusals("hydra.sweeper.", vars(self), rules))
        limits.check(self.limits, self.cost)
        self._check_made("sampler", SAMPLERS)
        self._check_made("pruner", {**trials.PRUNERS, "null": None})
        if self.storage is not None and "://" not in str(self.storage):
            raise KdError(
                f"hydra.sweeper.storage = {self.storage} is not allowed: it must be a URL, for that file "
                f"sqlite:///{self.storage}, or null"
            )

    def _check_made(self, name: str, known: Mapping[str, Any]) -> None:
        value = getattr(self, name)
        if isinstance(value, Mapping) and "_target_" in value:
            return
        if not (isinstance(value, str) or value is None) or str(value or "null") not in known:
            raise KdError(
                f"hydra.sweeper.{name} = {value} is not allowed{did_you_mean(str(value), known)}: it must be "
                f"{', '.join(known)} or a node with _target_: optuna.{name}s.…"
            )


def objectives(settings: Settings, base: Mapping[str, Any]) -> dict[str, Direction]:
    """Map measure to direction, for the config of a trial; the first one counts most in the table.

    ``KdError`` for a measure that the record does not have, one of the test split, or a pruner that cannot compare it.
    """
    given = settings.objectives
    known = _measures(base, settings.limits or ())
    names = given
    if given is None:
        names = [base["protocol"]["monitor"] or next(iter(known))]
        names += [limits.objective(settings.limits)] if settings.limits else []
    if not isinstance(names, Mapping):
        names = dict.fromkeys([names] if isinstance(names, str) else names)
    if not names:
        raise KdError("hydra.sweeper.objectives is empty: name a measure, for example {val/acc1: maximize}")
    for name, direction in names.items():
        _check_objective(str(name), direction, known)
    if settings.pruner is not None:
        if len(names) > 1 or not next(iter(names)).startswith("val/"):
            raise KdError(
                f"hydra.sweeper.pruner = {settings.pruner} is not allowed with the objectives {', '.join(names)}: a "
                "pruner compares one metric of the validation split"
            )
        trials.pruner(settings.pruner)
    return {str(name): known[str(name)] for name in names}


def _measures(base: Mapping[str, Any], limited: Iterable[str]) -> dict[str, Direction]:
    """Return every measure of the validation split, the task's main one first, and every cost, with its direction."""
    teacher = base["teacher"]["model"] is not None or base["teacher"]["checkpoint"] is not None

    def described() -> list[tuple[str, str]]:
        from kd.run import build  # start-up: torch

        return [(m.name, m.better) for m in build.task(base).metrics if teacher or not m.beside_teacher]

    pool.preload()
    metrics = {
        f"val/{name}": "maximize" if better == "max" else "minimize"
        for name, better in pool.run_in_subprocess(described)
    }
    return {**metrics, **dict.fromkeys((*COSTS, *limited), "minimize")}  # type: ignore[dict-item]


def _check_objective(name: str, direction: Any, known: Mapping[str, Direction]) -> None:
    if name.startswith("test/"):
        raise KdError(
            f"hydra.sweeper.objectives: {name} is not allowed: what is chosen by the test split cannot be tested on "
            f"it; choose by val/{name.partition('/')[2]}"
        )
    if name not in known:
        raise KdError(
            f"hydra.sweeper.objectives: there is no measure {name}{did_you_mean(name, known)}; measures: "
            f"{', '.join(known)}"
        )
    if direction not in (None, known[name]):
        raise KdError(f"hydra.sweeper.objectives: {name} = {direction} is not allowed: it must be {known[name]}")


def reseeded(node: Mapping[str, Any] | str) -> bool:
    """Tell whether a sampler is made anew for each trial: those that keep nothing but random numbers between trials."""
    return isinstance(node, str) or node["_target_"] in [known["_target_"] for known in SAMPLERS.values()]


def sampler(node: Mapping[str, Any] | str, seed: int | None, number: int) -> Any:
    """Make the sampler of trial ``number``, seeded by both (None: by chance); one not :func:`reseeded` as its node.

    ``KdError`` when it cannot be made.
    """
    import numpy as np
    import torch

    torch.set_num_threads(1)  # some compute with torch: the children of a process that has its threads would hang
    given = SAMPLERS[node] if isinstance(node, str) else node
    if not reseeded(node):
        return make(given, "hydra.sweeper.sampler")
    base = given.get("seed", seed)
    drawn = None if base is None else int(np.random.SeedSequence([base, number]).generate_state(1)[0])
    return make(given, "hydra.sweeper.sampler", seed=drawn)
