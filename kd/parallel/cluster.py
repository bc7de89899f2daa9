"""The processes of one run that torchrun, Slurm or kd started: how each joins, follows, and reports its failure.

What torchrun and Slurm start is the command itself: process 0 says what to run, the others follow it. No torch at
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
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from kd.errors import KdError, MachineFailure, kind, named, of_kind

WORKER = "KD_WORKER"  # set for the processes that kd starts: the number of their end of the pipe to the parent


@dataclass(frozen=True)
class Work:
    """What all processes of a run do.

    ``entry``: a function by its dotted path, ``module:function``; ``arguments``: what it is given, as JSON can carry
    it; ``hardware``: the complete section of the config; ``where``: the directory that an error of the operating
    system is about, unless it names one.
    """

    entry: str
    arguments: Sequence[Any]
    hardware: Mapping[str, Any]
    where: str

    def run(self, *more: Any) -> Any:
        """Call the function, with ``more`` arguments behind its own."""
        module, _, name = self.entry.partition(":")
        return getattr(import_module(module), name)(*self.arguments, *more)


def join(hardware: Mapping[str, Any]) -> int:
    """Meet the other processes of this run, if there are any; return the number of this one."""
    if hardware["cluster"] is None and WORKER not in os.environ:
        return 0
    from kd.parallel import group  # start-up: torch

    if group.joined():
        return group.rank()
    cluster = environment(hardware)
    nodes(hardware)
    if cluster.world_size() == 1:
        return 0
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = cluster.main_address, str(cluster.main_port)
    import torch  # start-up

    on_gpu = torch.cuda.is_available() and hardware["accelerator"] != "cpu"
    if on_gpu:
        devices = hardware["devices"]
        torch.cuda.set_device(devices[cluster.local_rank()] if isinstance(devices, list) else cluster.local_rank())
    group.join("nccl" if on_gpu else "gloo", cluster.global_rank(), cluster.world_size(), hardware["timeout_s"])
    return group.rank()


def environment(hardware: Mapping[str, Any]) -> Any:
    """Read Lightning's view of the variables that kd, torchrun or Slurm set. ``KdError`` where they are missing."""
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
    """Count the nodes of this run, and the processes on each of them. ``KdError`` when the config says otherwise."""
    variables = os.environ
    if hardware["cluster"] == "slurm":
        size, number = int(variables["SLURM_NTASKS"]), int(variables.get("SLURM_NNODES", "1"))
    else:
        size = int(variables["WORLD_SIZE"])
        number = size // int(variables["LOCAL_WORLD_SIZE"])
    found = {"num_nodes": number, "devices": size // number}
    for key, value in found.items():
        wanted = len(hardware[key]) if isinstance(hardware[key], list) else hardware[key]
        if wanted not in (None, "auto", value):
            raise KdError(
                f"hardware.{key} = {hardware[key]} is not what {hardware['cluster'] or 'kd'} started: {value} "
                "(leave it out)"
            )
    return number, size // number


def follow() -> None:
    """Run what process 0 says, in a process of torchrun or Slurm that is not the first."""
    from kd.parallel import group  # start-up: torch

    quiet()
    try:
        work: Any = group.broadcast(None)
    except RuntimeError:  # process 0 has refused the run, and says why
        sys.exit(1)
    try:
        with propagate_failure(work):
            work.run()
    except Exception as error:
        first = group.failed()
        if first is None or first[1] == _sentence(error):  # it is ours, not the echo of another's
            print(f"kd: {_sentence(error)}", file=sys.stderr)
            if not isinstance(error, KdError):
                traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    group.leave()


@contextmanager
def propagate_failure(work: Work) -> Iterator[None]:
    """Send a failure to the other processes; raise theirs where a connection broke because another one failed.

    A process that does not answer in time is a failure as well.
    """
    from kd.parallel import group  # start-up: torch

    try:
        yield
    except BaseException as error:
        first = group.failed()
        if first is not None and group.rank() == 0:
            raise of_kind(first[1], first[0]) from error
        if not isinstance(error, Exception):
            raise
        shown = named(error, Path(work.where))
        if first is None and group.timed_out(error):
            shown = MachineFailure(unanswered(group.silent(), work.hardware["timeout_s"]))
        group.say_failed(_sentence(shown), kind(shown))
        if shown is error:
            raise
        raise shown from error


def unanswered(silent: Sequence[int], timeout: float) -> str:
    """Say which processes have not answered in time; ``silent`` empty: it is not known which."""
    who = f"process {', '.join(map(str, silent))}" if silent else "another process"
    return (
        f"{who} of the run did not answer within {timeout} s (hardware.timeout_s): stopped, hanging, or its machine is "
        "gone; kd train resume=RUN goes on from its checkpoint"
    )


def _sentence(error: BaseException) -> str:
    from kd.parallel import group  # start-up: torch

    return f"process {group.rank()}: {str(error) or type(error).__name__}"


def quiet() -> None:
    """Log and warn of nothing: process 0 does it for all."""
    logging.getLogger("kd").propagate = False
    logging.getLogger("kd").addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")
