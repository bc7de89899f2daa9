"""Jobs on a Slurm cluster, as submitit's Hydra launcher runs them; but one that is lost does not end the sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import submitit
from hydra.core.singleton import Singleton
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from omegaconf import OmegaConf

EXECUTOR = {"submitit_folder": "folder", "max_num_timeout": "slurm_max_num_timeout"}


class PatientLauncher(SlurmLauncher):
    """The submitit launcher raises at the first job without a result, and lets go of those that still run."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        """Submit the jobs as one array and wait for each: its ``JobReturn``, or the error that says how it was lost."""
        general = OmegaConf.structured(BaseQueueConf)
        of_executor = {EXECUTOR[key]: value for key, value in self.params.items() if key in EXECUTOR}
        rest = {key: value for key, value in self.params.items() if key not in EXECUTOR}
        executor = submitit.AutoExecutor(cluster="slurm", **of_executor)
        executor.update_parameters(**{k if k in general else f"slurm_{k}": v for k, v in rest.items()})
        count, state = len(job_overrides), Singleton.get_state()
        numbers = range(initial_job_idx, initial_job_idx + count)
        names = [f"job_id_for_{number}" for number in numbers]
        given = ([list(overrides) for overrides in job_overrides], ["hydra.sweep.dir"] * count, numbers, names)
        return [_result(job) for job in executor.map_array(self, *given, [state] * count)]


def _result(job: submitit.Job[Any]) -> Any:
    try:
        return job.results()[0]
    except submitit.core.utils.FailedJobError as error:  # it raised before the run began; its trace is between rules
        reason = str(error).split("-" * 22)[1:2] or [str(error)]
        return RuntimeError(f"Slurm job {job.job_id} failed: {reason[0].strip().splitlines()[-1]}")
    except submitit.core.utils.UncompletedJobError:
        return RuntimeError(f"Slurm job {job.job_id} was lost: {job.state}, without a result (see {job.paths.stderr})")
