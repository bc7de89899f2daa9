"""``kd train [GROUP=OPTION …] [KEY=VALUE …]``: one run, or a sweep with ``-m``; ``resume=RUN`` goes on with a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.cli import hydra_app
from kd.config.compose import checked
from kd.config.hardware import settings
from kd.errors import KdError
from kd.parallel import cluster
from kd.run.train import resume, train


def main(argv: Sequence[str]) -> int:
    """Compose and check, then train; ``--help``, ``--cfg``, ``--info`` and ``-m`` are Hydra's."""
    resumed = [a.split("=", 1)[1] for a in argv if a.startswith("resume=")]
    if resumed and resumed[-1] not in ("", "null"):
        if len(argv) > 1:
            others = ", ".join(a for a in argv if not a.startswith("resume="))
            raise KdError(f"resume={resumed[-1]} takes no other arguments (given: {others}): a run goes on as it began")
        resume(Path(resumed[-1]))
        return 0
    config = follower(argv)
    if config is not None:
        cluster.join(settings(config))
        cluster.follow()
        return 0
    asked = hydra_app.parse_flags(list(argv))
    if sys.stderr.isatty() and not any((asked.help, asked.hydra_help, asked.cfg, asked.info, asked.shell_completion)):
        print("checks the configuration, then loads torch …", file=sys.stderr, flush=True)  # that takes seconds
    return hydra_app.run(list(argv), train)


def follower(argv: Sequence[str]) -> dict[str, Any] | None:
    """Compose the command line in a process of torchrun or Slurm that is not the first; None in every other process.

    Such a process gets its run directory from process 0: Hydra would make one of its own. A sweep that torchrun or
    srun started several times is refused.
    """
    variables = os.environ
    copies = (
        variables.get("WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in variables else variables.get("SLURM_STEP_NUM_TASKS")
    )
    if copies not in (None, "1") and any(a in ("-m", "--multirun") for a in argv):
        raise KdError(
            f"a sweep (-m) was started {copies} times at once: start it once, and let kd start the processes of each "
            "job (hardware=ddp)"
        )
    if variables.get("RANK", variables.get("SLURM_PROCID", "0")) == "0":
        return None
    given = hydra_app.parse_flags(list(argv))
    if any((given.help, given.hydra_help, given.cfg, given.info, given.shell_completion)):
        return None
    config = checked(given.overrides, given.config_dir)
    return config if settings(config)["cluster"] is not None else None
