"""The sweepers and launchers that ``conf/hydra`` names. Nothing heavy is imported until one is used.

Hydra 1.3 makes a sweeper or launcher only of a ``_target_`` in ``hydra_plugins``, whatever was registered: the YAML
files say ``hydra_plugins.kd.NAME``, and :func:`register` says that NAME is the class of this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

NAMES = "hydra_plugins.kd"


class LocalLauncher(Launcher):
    """Jobs on this machine, each in a fresh process; ``hydra/launcher=local``.

    ``n_jobs``: how many at once, or "auto": as many as there are GPUs, else cores, for ``hardware.devices`` of each.
    ``jobs_per_gpu``: how many may share a GPU.
    """

    def __init__(self, n_jobs: int | str = 1, jobs_per_gpu: int = 1) -> None:
        self.n_jobs, self.jobs_per_gpu = n_jobs, jobs_per_gpu
        self.total: int | None = None  # jobs of the whole sweep, for the lines as they end; None: those of a launch

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives before :meth:`launch`."""
        self.context, self.task, self.config = hydra_context, task_function, config

    def at_once(self, *hardware: Mapping[str, Any]) -> int:
        """Count the jobs with these hardware sections that run together. ``KdError`` when there is no room for them."""
        from kd.sweeps.local import division  # start-up

        return division(hardware, self.n_jobs, self.jobs_per_gpu)[0]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run them all; one that fails or is killed does not stop the others."""
        from kd.sweeps.local import launch  # start-up

        settings = (self.n_jobs, self.jobs_per_gpu, self.total)
        return launch(self.context, self.task, self.config, job_overrides, initial_job_idx, *settings)


class SlurmLauncher(Launcher):
    """Each job a Slurm job, by submitit; ``hydra/launcher=slurm``. ``settings``: of the queue, see its YAML."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives before :meth:`launch`."""
        from kd.sweeps.slurm import PatientLauncher  # start-up

        self.patient = PatientLauncher(**self.settings)
        self.patient.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        """Wait for all of them; for one that was lost, the error that says so."""
        return self.patient.launch(job_overrides, initial_job_idx)


class _KdSweeper(Sweeper):
    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives before :meth:`sweep`."""
        from kd.sweeps.engine import Engine  # start-up

        self.engine = Engine(hydra_context, task_function, config)


class ResumableSweeper(_KdSweeper):
    """Every combination of the swept values; the same command again runs what is missing. ``hydra/sweeper=resumable``.

    ``params``: swept like arguments, for a sweep that is written down in a configuration file.
    """

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = params or {}

    def sweep(self, arguments: list[str]) -> Any:
        """Plan, run what is missing, print the table."""
        from kd.sweeps.grid import sweep  # start-up

        return sweep(self.engine, [*(f"{k}={v}" for k, v in self.params.items()), *arguments])


class OptunaSweeper(_KdSweeper):
    """A search by Optuna for the values that are best on validation. ``hydra/sweeper=optuna``; options: its YAML."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def sweep(self, arguments: list[str]) -> Any:
        """Run trials until there are enough, print the table."""
        from kd.sweeps.options import Settings  # start-up
        from kd.sweeps.optuna import search  # start-up

        settings: Any = OmegaConf.to_container(OmegaConf.create(self.settings), resolve=True)
        return search(self.engine, arguments, Settings(**settings))


class StudySweeper(_KdSweeper):
    """The rows of a study; ``hydra/sweeper=study``, see ``kd study --help``."""

    def __init__(self, name: str, only: Sequence[str] = (), seeds: Sequence[int] | None = None, dry_run: bool = False):
        self.name, self.only, self.seeds, self.dry_run = name, list(only), seeds and list(seeds), dry_run

    def sweep(self, arguments: list[str]) -> Any:
        """Plan, run what is missing, evaluate, report."""
        from kd.sweeps.study import sweep  # start-up

        return sweep(self.engine, self.name, self.only, self.seeds, self.dry_run, arguments)


def register() -> None:
    """Make these classes known to Hydra, before it makes one of them."""
    plugins = Plugins.instance()
    for plugin in (LocalLauncher, SlurmLauncher, ResumableSweeper, OptunaSweeper, StudySweeper):
        plugins.register(plugin)
        plugins.class_name_to_class[f"{NAMES}.{plugin.__name__}"] = plugin
