"""Stops a trial of a search that will not win. The run's config does not mention it: its directory does.

The callback of optuna-integration wants the trial in the process that trains: here it is in the parent, and the run may
be on another machine.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from kd.parallel import group
from kd.records import manifest
from kd.records.trials import job_of, open_storage, pruner, read_settings, require_optuna

log = logging.getLogger(__name__)


class StopWhenPruned(Callback):
    """Reports ``measure`` at every validation to ``trial``; stops the run when the pruner says so.

    The last validation is reported only: there is nothing left to save. ``epoch``: where it was stopped, else None.
    ``trial`` is None in all processes but the first.
    """

    def __init__(self, measure: str, trial: Trial | None) -> None:
        self.measure, self.trial = measure, trial
        self.epoch: int | None = None

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Report the measure, and stop all processes when the pruner says so."""
        if trainer.state.fn != "fit":
            return
        epoch, place, last = trainer.current_epoch, *_place(trainer)
        value = float(trainer.callback_metrics[self.measure])
        stop = self.trial is not None and self.trial.report(place, value) and not last
        if group.broadcast(stop):
            self.epoch = epoch
            trainer.should_stop = True

    def outcome(self, history: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
        """Return the part of the record that a stopped run yields: no test, nothing that a finished run would have."""
        assert self.epoch is not None
        metrics = {name.partition("/")[2]: float(value) for name, value in history[self.epoch].items()}
        value = history[self.epoch][self.measure]
        reason = f"at epoch {self.epoch + 1}: {self.measure} {value:.4f} is behind the other trials"
        log.info("pruned %s", reason)
        return {"status": "pruned", "error": reason, "pruned": {"epoch": self.epoch, "val": metrics}}


def _place(trainer: L.Trainer) -> tuple[int, bool]:
    """Return what counts the validations, epochs or steps, and whether this is the last one."""
    epochs, steps = trainer.max_epochs or -1, getattr(trainer, "max_steps", -1)
    last = trainer.current_epoch + 1 == epochs or 0 < steps <= trainer.global_step
    if epochs > 0 and getattr(trainer, "check_val_every_n_epoch", 1) is not None:
        return trainer.current_epoch + 1, last
    return trainer.global_step, last and (epochs < 0 or trainer.is_last_batch)


class Trial:
    """A running trial, as the process that trains it sees it."""

    def __init__(self, study: Any, storage: Any, identity: int) -> None:
        self.study, self.storage, self.identity = study, storage, identity

    def report(self, step: int, value: float) -> bool:
        """Write an intermediate value; whether the pruner wants to stop. A storage that is away stops nothing."""
        try:
            self.storage.set_trial_intermediate_value(self.identity, step, value)
            return bool(self.study.pruner.prune(self.study, self.storage.get_trial(self.identity)))
        except Exception as error:
            log.warning("this validation was not reported to the search: %s", error)
            return False


def callback(run_dir: Path) -> StopWhenPruned | None:
    """Return the callback for a run that is a running trial of a search with a pruner; None for every other run."""
    found = _find(run_dir) if group.rank() == 0 else None
    measure = group.broadcast(found and found[0])
    return StopWhenPruned(measure, found and found[1]) if measure is not None else None


def _find(run_dir: Path) -> tuple[str, Trial] | None:
    belongs = manifest.find(run_dir)
    if belongs is None or belongs[0].kind != "optuna":
        return None
    directory = run_dir.resolve().parent
    settings = read_settings(directory)
    if settings is None:
        return None
    require_optuna()
    import optuna

    storage = open_storage(directory, settings["storage"])
    study = optuna.load_study(study_name=belongs[0].name, storage=storage, pruner=pruner(settings["pruner"]))
    running = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
    mine = [t.number for t in running if job_of(t) == belongs[1].name]
    if not mine:
        return None
    name = storage.get_study_id_from_name(belongs[0].name)
    identity = storage.get_trial_id_from_study_id_trial_number(name, mine[0])
    return settings["measure"], Trial(study, storage, identity)
