"""The processes of one run that torchrun, Slurm or kd started: how each joins, follows, and tells of its failure.

What torchrun and Slurm start is the command itself: process 0 keeps the record, the others follow it. No torch at
import.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kd.config.hardware import settings
from kd.errors import KdError, MachineFailure, kind, named, of_kind

WORKER = "KD_WORKER"  # set for the processes that kd starts: the number of their end of the pipe to the parent


def join(config: Mapping[str, Any]) -> int:
    """Meet the other processes of this run, if there are any; the number of this one."""
    hardware = settings(config)
    if hardware["cluster"] is None and WORKER not in os.environ:
        return 0
    from kd.parallel import group

    if group.joined():
        return group.rank()
    cluster = environment(hardware)
    nodes(hardware)
    if cluster.world_size() == 1:
        return 0
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = cluster.main_address, str(cluster.main_port)
    import torch

    on_gpu = torch.cuda.is_available() and hardware["accelerator"] != "cpu"
    if on_gpu:
        devices = hardware["devices"]
        torch.cuda.set_device(devices[cluster.local_rank()] if isinstance(devices, list) else cluster.local_rank())
    group.join("nccl" if on_gpu else "gloo", cluster.global_rank(), cluster.world_size(), hardware["timeout_s"])
    return group.rank()


def environment(hardware: Mapping[str, Any]) -> Any:
    """Lightning's view of the variables that kd, torchrun or Slurm set. ``KdError`` where they are missing."""
    from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if hardware["cluster"] != "slurm":
        if "LOCAL_RANK" not in os.environ:
            command = "torchrun --nproc_per_node=N -m kd.cli.main train …"
            raise KdError(f"hardware.cluster = torchrun, but torchrun has not started this process: {command}")
        return TorchElasticEnvironment()
    if "SLURM_PROCID" not in os.environ:
        raise KdError("hardware.cluster = slurm, but Slurm has not started this process: srun kd train …")
    try:
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:
        raise KdError(f"hardware.cluster = slurm: {str(error).splitlines()[0]}") from None


def nodes(hardware: Mapping[str, Any]) -> tuple[int, int]:
    """Nodes of this run, and processes on each of them. ``KdError`` when the config says otherwise."""
    variables = os.environ
    if hardware["cluster"] == "slurm":
        size, number = int(variables["SLURM_NTASKS"]), int(variables.get("SLURM_NNODES", "1"))
    else:
        size = int(variables["WORLD_SIZE"])
        number = size // int(variables["LOCAL_WORLD_SIZE"])
    found = {"num_nodes": number, "devices": size // number}
    for key, value in found.items():
        asked = len(hardware[key]) if isinstance(hardware[key], list) else hardware[key]
        if asked not in (None, "auto", value):
            raise KdError(
                f"hardware.{key} = {hardware[key]} is not what {hardware['cluster'] or 'kd'} started: {value} "
                "(leave it out)"
            )
    return number, size // number


def follow() -> dict[str, Any]:
    """A process of torchrun or Slurm that is not the first: train what process 0 says, write nothing."""
    from kd.parallel import group
    from kd.run.trainer import fit

    quiet()
    try:
        task: Any = group.broadcast(None)
    except RuntimeError:  # process 0 has refused the run, and says why
        sys.exit(1)
    config, run_dir, checkpoint = task
    try:
        with shared_fate(config, Path(run_dir)):
            fit(config, Path(run_dir), checkpoint and Path(checkpoint))
    except Exception as error:
        said = group.failed()
        if said is None or said[1] == _sentence(error):  # it is ours, not the echo of another's
            print(f"kd: {_sentence(error)}", file=sys.stderr)
            if not isinstance(error, KdError):
                traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    group.leave()
    return {}


@contextmanager
def shared_fate(config: Mapping[str, Any], run_dir: Path) -> Iterator[None]:
    """A failure here is told to the others; a connection that broke because another failed becomes its sentence.

    So does a process that does not answer in time.
    """
    from kd.parallel import group

    try:
        yield
    except BaseException as error:
        said = group.failed()
        if said is not None and group.rank() == 0:
            raise of_kind(said[1], said[0]) from error
        if not isinstance(error, Exception):
            raise
        shown = named(error, run_dir)
        if said is None and group.timed_out(error):
            shown = MachineFailure(unanswered(group.silent(), settings(config)["timeout_s"]))
        group.say_failed(_sentence(shown), kind(shown))
        if shown is error:
            raise
        raise shown from error


def unanswered(silent: Sequence[int], timeout: float) -> str:
    """The sentence on processes that have not answered in time; none: it is not known which."""
    who = f"process {', '.join(map(str, silent))}" if silent else "another process"
    return (
        f"{who} of the run did not answer within {timeout} s (hardware.timeout_s): stopped, hanging, or its machine is "
        "gone; kd train resume=RUN goes on from its checkpoint"
    )


def _sentence(error: BaseException) -> str:
    from kd.parallel import group

    return f"process {group.rank()}: {str(error) or type(error).__name__}"


def follower(argv: Sequence[str]) -> dict[str, Any] | None:
    """The config of the command line, in a process of torchrun or Slurm that is not the first; else None.

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
    from kd.cli import hydra_app

    given = hydra_app._parsed(list(argv))
    if any((given.help, given.hydra_help, given.cfg, given.info, given.shell_completion)):
        return None
    config = hydra_app.checked(given.overrides, given.config_dir)
    return config if settings(config)["cluster"] is not None else None


def quiet() -> None:
    """Process 0 speaks for all."""
    logging.getLogger("kd").propagate = False
    logging.getLogger("kd").addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")
