"""The table and the figures of a report as one W&B run of type ``report``. No torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.tracking import wandb_run

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def log_report(
    directory: Path, name: str, table: pd.DataFrame, figures: Mapping[str, Path], settings: Mapping[str, Any]
) -> None:
    """Log a report, grouped with the runs it is about; made again, it goes on in the same W&B run. Never raises.

    ``directory``: of the study or sweep, where it is kept until it can be sent; ``name``: of the study or sweep;
    ``figures``: title → PNG file; ``settings``: the keys of ``conf/logger/wandb.yaml`` (project, entity, offline,
    timeout).
    """
    about = {key: settings.get(key) for key in ("project", "entity")}
    try:
        run = wandb_run.open_run(
            directory,
            float(settings.get("timeout", 20)),
            settings.get("offline"),
            id=wandb_run.run_id(directory),
            resume="allow",
            name=f"report {name}"[:128],
            group=name[:128],
            job_type="report",
            tags=["report"],
            **about,
        )
    except Exception as error:
        log.warning("W&B failed (%s): the report is on disk only", wandb_run.reason(error))
        return
    try:
        import wandb

        pictures = {f"figures/{title}": wandb.Image(str(path)) for title, path in figures.items()}
        run.log({"results": wandb.Table(dataframe=table), **pictures})
    except Exception as error:
        log.warning("W&B failed (%s): the report is on disk only", wandb_run.reason(error))
    wandb_run.close_run(run, directory, {"rows": len(table)})
