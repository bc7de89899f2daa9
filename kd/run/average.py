"""The moving average of a student's weights: what is validated, selected, saved and reported where it is kept."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from kd.distill.distiller import Distiller


class AverageStudent(Callback):
    """Averages the student, with the heads that terms leave on it, after each step of the optimiser.

    ``average = decay · average + (1 - decay) · weights``, buffers as well; the first step is taken as it is.
    ``warmup``: the decay of step t is at most ``1 - t^(-2/3)`` (timm), so that a short run is not its own beginning.
    The average is part of the module, and so of its checkpoints; the optimiser goes on with the weights themselves.
    """

    def __init__(self, decay: float, warmup: bool = True) -> None:
        self.decay, self.warmup = decay, warmup
        self._seen = -1  # the step of the last update

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Copy the student, before a checkpoint is read and before its networks are moved to a device."""
        assert isinstance(module, Distiller)
        if stage == "fit" and module.average is None:
            from timm.utils import ModelEmaV3  # start-up: timm

            self.ema = ModelEmaV3(module.trained, decay=self.decay, use_warmup=self.warmup)
            module.average = self.ema.module.requires_grad_(False)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin to count at the step of the checkpoint."""
        assert isinstance(module, Distiller)
        self._seen = module.steps_done

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average, where the optimiser has stepped."""
        assert isinstance(module, Distiller)
        if module.steps_done > self._seen:
            self._seen = module.steps_done
            self.ema.update(module.trained, step=self._seen)
