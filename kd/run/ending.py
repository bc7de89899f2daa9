"""How a run ends: with a validation of its last step, or before its length because a callback says so."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping


class Ending(Callback):
    """Validates the end of a run wherever it is, and knows why a run has ended before its length.

    ``stopped``: ``{epoch, step, why}`` of a run that another callback has ended (epochs and steps from 0 and 1), else
    None. It is kept in checkpoints: such a run does not go on when it is resumed.
    """

    def __init__(self) -> None:
        self.stopped: dict[str, Any] | None = None
        self._due = False  # the last step is done
        self._trainer: L.Trainer | None = None

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Know the trainer, for the checkpoints."""
        self._trainer = trainer

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """End a resumed run that was ended before."""
        if self.stopped is not None:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the last step ask for a validation, where none is due by itself."""
        by_steps = module.steps is not None and module.steps_done >= module.steps
        most = trainer.max_epochs or -1
        by_epochs = 0 < most == trainer.current_epoch + 1 and trainer.is_last_batch
        if by_steps or (by_epochs and trainer.check_val_every_n_epoch is None):
            self._due = True
            trainer.check_val_every_n_epoch = None  # in whichever epoch
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Return what goes into the checkpoint, which is written after the other callbacks have decided."""
        if self._trainer is not None:
            self.note(self._trainer)
        return {"stopped": self.stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what was put into the checkpoint."""
        self.stopped = state["stopped"]

    def note(self, trainer: L.Trainer) -> None:
        """Note that another callback wants the run to end."""
        if trainer.should_stop and not self._due and self.stopped is None:
            module: Any = trainer.lightning_module
            self.stopped = {"epoch": module.epoch_trained, "step": module.steps_done, "why": reason(trainer)}


def reason(trainer: L.Trainer) -> str:
    """Say which callback has ended the run: the sentence of an early stopping, else that one did."""
    stopping = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
    said = [c.stopping_reason_message for c in stopping if c.stopping_reason_message]
    return " ".join(said[0].split()) if said else "a callback has ended it"
