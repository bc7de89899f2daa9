"""Callbacks of a run: the selected weights, whole checkpoints, one line an epoch, the bar on a terminal."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar

from kd.errors import KdError
from kd.parallel import group
from kd.records import weight_files
from kd.records.durable import replacing
from kd.run import weights
from kd.run.ending import Ending
from kd.tasks.base import Task

log = logging.getLogger(__name__)

TIE = "val/nll"  # decides between equal values of what is monitored


class SelectedWeights(Callback):
    """Keeps the student of the best validation, as a file that loads without this package.

    ``monitor``: a metric of the validation split; ``mode``: "max" or "min". Of equal ones that of the lower NLL on
    validation is the better, where there is an NLL, else the earlier: of 20 images many epochs get the same number
    right. Without a ``monitor`` the last validation stands. Without a ``run_dir`` they are kept in memory.

    The checkpoint of that epoch is written first and knows the digest of the weights, which are among its own: a run
    that is killed between the two writes finds them there (:mod:`kd.run.resume`).
    """

    def __init__(self, run_dir: Path | None, monitor: str | None, mode: str, about: dict[str, Any]) -> None:
        self.run_dir, self.monitor, self.mode, self.about = run_dir, monitor, mode, about
        self.best: float | None = None
        self.epoch: int | None = None
        self.step: int | None = None  # of the optimiser; several validations of an epoch differ in it
        self.metrics: dict[str, float] = {}
        self.digest: str | None = None
        self.unwritten: dict[str, torch.Tensor] = {}

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Keep the weights when this validation beats all before it, until :meth:`write`."""
        if trainer.state.fn != "fit":
            return
        value = float(trainer.callback_metrics[self.monitor]) if self.monitor is not None else None
        if value is None or self.best is None or self._better(value, module.history[trainer.current_epoch]):
            self.best, self.epoch, self.step = value, trainer.current_epoch, module.steps_done
            self.metrics = dict(module.history[trainer.current_epoch])
            self.unwritten = weights.whole_state(module.deployed)
            self.digest = weights.digest(self.unwritten)

    def _better(self, value: float, metrics: dict[str, float]) -> bool:
        assert self.best is not None
        if value == self.best:
            return TIE in metrics and TIE in self.metrics and metrics[TIE] < self.metrics[TIE]
        return value > self.best if self.mode == "max" else value < self.best

    def write(self) -> None:
        """Write what was kept; once its checkpoint is there."""
        if self.unwritten and self.run_dir is not None:
            weights.write(self.unwritten, self.run_dir / weight_files.SELECTED, {**self.about, "epoch": self.epoch})
            self.unwritten = {}

    def read(self) -> dict[str, torch.Tensor]:
        """Read the selected weights from their file. ``KdError`` when it holds others."""
        self.write()
        if self.run_dir is None:
            return self.unwritten
        state = weights.read(self.run_dir / weight_files.SELECTED)[0]
        if self.digest is not None and weights.digest(state) != self.digest:
            raise KdError(f"{self.run_dir / weight_files.SELECTED} was replaced while the run trained: start it anew")
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return what goes into the checkpoint: a resumed run must not forget its best."""
        where = {"epoch": self.epoch, "step": self.step}
        return {"best": self.best, **where, "digest": self.digest, "metrics": self.metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what was put into the checkpoint."""
        self.best, self.epoch, self.digest = state["best"], state["epoch"], state.get("digest")
        self.step, self.metrics = state.get("step"), state.get("metrics", {})


class WholeCheckpoints(TorchCheckpointIO):
    """A checkpoint is there or not, never half of it, whenever the process is killed.

    Lightning writes it to ``/tmp`` and moves it; where the run directory is on another disk, that is a slow copy.
    ``selected``: whose weights are written next.
    """

    def __init__(self, selected: SelectedWeights | None = None) -> None:
        super().__init__()
        self.selected = selected

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside ``path``, then replace it."""
        path = Path(path)
        if path.parent.parent.is_dir():  # a run directory that was deleted is not made again
            path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
        if self.selected is not None:
            self.selected.write()


class EpochLine(Callback):
    """One log line an epoch, and one a validation within it: training means, validation metrics, seconds."""

    start: float | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start it where a run goes on in the middle of an epoch."""
        self.start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Print the line of a validation that is counted in steps."""
        if trainer.state.fn != "fit" or trainer.check_val_every_n_epoch is not None or not trainer.is_global_zero:
            return
        of = f"/{module.steps}" if module.steps else ""
        shown = _shown(module.history[trainer.current_epoch], module.task)
        log.info("step %d%s (epoch %d)  %s", module.steps_done, of, trainer.current_epoch + 1, shown)

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        """Print the line (the first process only)."""
        module.close_epoch()  # of all processes
        if not trainer.is_global_zero:
            return
        epoch = trainer.current_epoch
        values = {**module.epoch_means, **module.history.get(epoch, {})}
        seconds = time.perf_counter() - (self.start or time.perf_counter())
        of = (
            f"/{trainer.max_epochs}"
            if (trainer.max_epochs or -1) > 0
            else f" (step {module.steps_done}/{module.steps})"
        )
        speed = "".join(f", {number:,.0f} {module.task.unit}/s" for number in module.speed.values())
        log.info("epoch %d%s  %s  (%.1f s%s)", epoch + 1, of, _shown(values, module.task), seconds, speed)


def _shown(values: Mapping[str, float], task: Task) -> str:
    """Write values in a line, of the counts of training those that the task's summary has as well."""
    aside = {f"train/{name}" for name in task.counts if name not in task.summary}
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items() if name not in aside)


class WallClock(Callback):
    """Seconds that the run has taken, kept in its checkpoints: one that is killed writes no record of them.

    ``earlier``: those of the sessions before this one.
    """

    def __init__(self, earlier: float) -> None:
        self.start = time.perf_counter() - earlier

    def state_dict(self) -> dict[str, Any]:
        """Return what goes into the checkpoint."""
        return {"seconds": time.perf_counter() - self.start}


class RunBar(RichProgressBar):
    """Shows on a terminal: epochs from 1, as the lines do, the loss of the last steps, the time left of the run."""

    observes_only = True
    _start, _before = 0.0, 1.0  # until the training starts nothing is known

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Start the clock; a resumed run has done a part before."""
        super().on_train_start(trainer, module)
        self._start, self._before = time.monotonic(), self._share(module)

    def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
        """Name the epoch."""
        super().on_train_epoch_start(trainer, module)
        whole = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description=f"epoch {trainer.current_epoch + 1}{whole}")

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move on every ``refresh_rate`` batches: in between Lightning would make the numbers for nobody."""
        if (batch_idx + 1) % self.refresh_rate == 0 or trainer.is_last_batch:
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: L.Trainer, module: Any) -> dict[str, Any]:
        """Return what stands behind the bar."""
        items = {name: value for name, value in super().get_metrics(trainer, module).items() if name != "v_num"}
        if "train/loss" in module.step_means:
            items["loss"] = f"{module.step_means['train/loss']:.4f}"
        done = self._share(module)
        if done > self._before:
            left = (time.monotonic() - self._start) * (1 - done) / (done - self._before)
            items["left"] = str(timedelta(seconds=round(left)))
        return items

    def _share(self, module: Any) -> float:
        epoch, epochs = module.place()
        return min(1.0, epoch / epochs)


class StopOnSigterm(Callback):
    """Makes SIGTERM an interruption of a run of several processes.

    Lightning would first tell the others, by a collective that meets theirs of another kind and waits.
    """

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Replace Lightning's handler, which has been set a moment ago."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Do the same for ``trainer.validate``."""
        self.on_train_start(trainer, module)

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Do the same for ``trainer.test``."""
        self.on_train_start(trainer, module)


def standard(
    run_dir: Path | None,
    protocol: dict[str, Any],
    about: dict[str, Any],
    earlier: float = 0.0,
    in_steps: bool = False,
    resumable: bool = True,
    bar: bool = True,
) -> list[Callback]:
    """Make the callbacks of every run: selected weights, the checkpoint to resume from, and progress.

    ``earlier``: seconds that a resumed run has taken before; ``in_steps``: its length is in steps; ``resumable``:
    whether there is a checkpoint to go on from; ``bar``: whether a terminal shows one.
    """
    by_epoch = protocol.get("val_every_steps") is None and not in_steps
    callbacks: list[Callback] = [SelectedWeights(run_dir, protocol["monitor"], protocol["mode"], about), Ending()]
    if run_dir is not None and resumable:
        last = ModelCheckpoint(
            dirpath=str((run_dir / weight_files.CHECKPOINT).parent),
            filename=weight_files.CHECKPOINT.stem,
            every_n_epochs=(protocol["val_every"] if by_epoch else None) or 1,
            save_on_train_epoch_end=by_epoch,  # else behind each validation
            enable_version_counter=False,
        )
        callbacks += [last, WallClock(earlier)]
    callbacks.append(EpochLine())
    if group.joined():
        callbacks.append(StopOnSigterm())
    if bar and sys.stderr.isatty() and group.rank() == 0:
        callbacks.append(RunBar(refresh_rate=50))
    return callbacks
