"""Lightning's W&B logger, made safe: whatever happens to W&B, the run goes on and its results stay on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from kd.tracking import wandb_run

log = logging.getLogger(__name__)


class WandbLogger(LightningWandbLogger):
    """Opens its run offline when the server does not take it within ``timeout`` seconds (``kd.tracking.wandb_run``).

    ``offline``: null: when no key is found. The first complaint of W&B while logging is said, and is the last: nothing
    more is logged. ``timeout`` bounds the end of the run as well.
    """

    def __init__(
        self,
        save_dir: str,
        project: str,
        id: str,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        notes: str | None = None,
        offline: bool | None = None,
        timeout: float = 20.0,
    ) -> None:
        about: dict[str, Any] = {
            "entity": entity,
            "group": group,
            "job_type": job_type,
            "tags": list(tags),
            "notes": notes,
        }
        super().__init__(name=name, project=project, save_dir=save_dir, id=id, offline=bool(offline), **about)
        del self._wandb_init["anonymous"]  # wandb warns of it, whatever its value
        del self._wandb_init["dir"]
        self._directory, self._ask_offline, self._timeout = Path(save_dir), offline, timeout
        self._lost = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The ``wandb.Run``, opened when first asked for; on other processes a dummy."""
        if self._experiment is None:
            run = wandb_run.open_run(self._directory, self._timeout, self._ask_offline, **self._wandb_init)
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
            self._experiment = run
        return self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log the resolved config."""
        self._safely(lambda: super(WandbLogger, self).log_hyperparams(params))

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log one row of the history."""
        self._safely(lambda: super(WandbLogger, self).log_metrics(metrics, step))

    def _safely(self, act: Callable[[], Any]) -> None:
        if self._lost:
            return
        try:
            act()
        except Exception as error:
            self._lost = True
            log.warning("W&B failed (%s): the run goes on without it", wandb_run.reason(error))
