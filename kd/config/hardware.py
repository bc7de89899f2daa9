"""The hardware section: what it allows, and what it means for the trainer and the networks. No torch at import."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from kd.config.schema import Hardware
from kd.errors import KdError

log = logging.getLogger(__name__)

GPU = ("gpu", "cuda")
CHOICES: dict[str, tuple[str | None, ...]] = {
    "accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
    "cluster": (None, "torchrun", "slurm"),
    "strategy": ("auto", "ddp", "fsdp"),
    "compile": (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "precision": ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"),
}


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The hardware section, complete also in the config of a run that is older than one of its options."""
    return {**asdict(Hardware()), **config["hardware"]}


def problems(hardware: Mapping[str, Any], batch_size: int) -> Iterator[str]:
    """One sentence for each setting that is not allowed."""
    for key, choices in CHOICES.items():
        if hardware[key] not in choices:
            allowed = ", ".join("null" if c is None else c for c in choices)
            yield f"hardware.{key} = {hardware[key]} is not allowed: it must be one of {allowed}"
    for role in hardware["compiled"]:
        if role not in ("student", "teacher"):
            yield f"hardware.compiled = {hardware['compiled']} is not allowed: a list of student, teacher or both"
    if hardware["timeout_s"] < 1:
        yield f"hardware.timeout_s = {hardware['timeout_s']} is not allowed: it must be 1 second or more"
    yield from _device_problems(hardware, batch_size)
    yield from _pair_problems(hardware)


def _device_problems(hardware: Mapping[str, Any], batch_size: int) -> Iterator[str]:
    devices, nodes, accelerator = hardware["devices"], hardware["num_nodes"], hardware["accelerator"]
    several = isinstance(devices, list)
    numbers = devices if several else [devices]
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    if several and not (whole and devices and min(devices) >= 0 and len(set(devices)) == len(devices)):
        yield f"hardware.devices = {devices} is not allowed: a list holds the numbers of GPUs, each once"
    elif not several and devices != "auto" and not (whole and devices >= 1):
        yield f"hardware.devices = {devices} is not allowed: a whole number, 1 or more, a list of GPU numbers, or auto"
    elif several and accelerator == "cpu":
        yield f"hardware.devices = {devices} is not allowed with hardware.accelerator = cpu: say how many processes"
    elif nodes is not None and nodes < 1:
        yield f"hardware.num_nodes = {nodes} is not allowed: it must be 1 or more, or null"
    elif nodes is not None and nodes > 1 and hardware["cluster"] is None:
        yield f"hardware.num_nodes = {nodes} needs hardware=torchrun or hardware=slurm, to start the nodes"
    elif devices != "auto":
        count = (len(devices) if several else devices) * (nodes or 1)
        if accelerator == "mps" and count > 1:
            yield f"hardware.devices = {devices} is not allowed with hardware.accelerator = mps: it has one device"
        if batch_size % count:
            yield (
                f"recipe.batch_size = {batch_size} is not allowed on {count} devices: it is the batch of all processes "
                "together, so it must be a multiple of their number"
            )


def _pair_problems(hardware: Mapping[str, Any]) -> Iterator[str]:
    accelerator, precision, compiled = hardware["accelerator"], hardware["precision"], hardware["compile"]
    if accelerator == "cpu" and precision in ("16-mixed", "16-true"):
        yield f"hardware.precision = {precision} is not allowed on the CPU: use 32-true, or bf16-mixed"
    if accelerator in ("cpu", "mps") and hardware["sync_batchnorm"]:
        yield "hardware.sync_batchnorm = true is not allowed here: torch synchronises batch norm on NVIDIA GPUs only"
    if hardware["strategy"] == "fsdp" and precision in ("64-true", "16-mixed"):
        yield f"hardware.precision = {precision} is not allowed with hardware.strategy = fsdp: 32-true, or bf16-mixed"
    if hardware["strategy"] == "fsdp" and compiled is not None:
        yield f"hardware.compile = {compiled} is not allowed with hardware.strategy = fsdp: set one of them to null"


# ---------------------------------------------------------------------- what this machine has


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def refuse_missing(hardware: Mapping[str, Any], gpus: int | None = None) -> None:
    """``KdError`` when a run that kd starts wants more GPUs than there are, or more processes on the CPU than cores.

    ``gpus``: how many there are; null: torch is asked, and imported, where that matters. Two processes may share one
    core: ``hardware=ddp_cpu`` is there to try what several GPUs will do.
    """
    accelerator, devices = hardware["accelerator"], hardware["devices"]
    if hardware["cluster"] is not None:
        return
    if gpus is None:
        gpus = _gpus(accelerator, devices)
    if accelerator in GPU or (accelerator == "auto" and (gpus or isinstance(devices, list))):
        if not gpus:
            key = "accelerator" if accelerator in GPU else "devices"
            raise KdError(f"hardware.{key} = {hardware[key]} is not allowed here: torch finds no GPU (hardware=cpu)")
        wanted = max(devices) + 1 if isinstance(devices, list) else devices
        if wanted != "auto" and wanted > gpus:
            raise KdError(f"hardware.devices = {devices} is not allowed: this machine has {gpus} GPUs")
    elif isinstance(devices, int) and devices > max(2, cores()):
        raise KdError(
            f"hardware.devices = {devices} is not allowed on the CPU, where it is the number of processes: it must be "
            f"1 to {max(2, cores())} (cores: {cores()})"
        )


def _gpus(accelerator: str, devices: Any) -> int:
    if accelerator not in GPU and (accelerator != "auto" or devices in (1, "auto")):
        return 0
    import torch

    return torch.cuda.device_count()


# ---------------------------------------------------------------------- once torch may be imported


def trainer_arguments(config: Mapping[str, Any], module: Any) -> dict[str, Any]:
    """What ``lightning.Trainer`` must be told of the hardware, and of the processes that this one belongs to."""
    from lightning.pytorch.plugins.environments import LightningEnvironment

    from kd.parallel import group

    hardware = settings(config)
    same = {key: hardware[key] for key in ("accelerator", "precision", "deterministic")}
    if not group.joined():
        if hardware["strategy"] == "fsdp":
            raise KdError(
                "hardware.strategy = fsdp shards over two devices or more, and here is one (hardware.devices)"
            )
        devices = hardware["devices"] if hardware["cluster"] is None else 1
        # named, so that variables of a Slurm job are not taken for orders to train in several processes
        return {**same, "devices": devices, "plugins": [LightningEnvironment()]}
    from kd.parallel.cluster import environment, nodes

    node_count, per_node = nodes(hardware)
    devices = hardware["devices"] if isinstance(hardware["devices"], list) else per_node
    strategy = _strategy(hardware, module)
    return {
        **same,
        "devices": devices,
        "num_nodes": node_count,
        "strategy": strategy,
        "plugins": [environment(hardware)],
    }


def _strategy(hardware: Mapping[str, Any], module: Any) -> Any:
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    from kd.parallel import group

    if hardware["strategy"] == "fsdp":
        size = group.world_size()
        return ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1, save_distributed_checkpoint=False)
    group.ignore_in_ddp(module, None if module.teacher_trained else "teacher.", "objective.")
    return DDPStrategy(find_unused_parameters=bool(module.unreached))


def compile_networks(config: Mapping[str, Any], module: Any) -> None:
    """``torch.compile`` the networks in place: names in their state dicts stay what they are."""
    hardware = settings(config)
    if hardware["compile"] is None:
        return
    import torch._dynamo

    # a forward is compiled anew for student and teacher, training and evaluation, a smaller last batch, taps on and
    # off: more often than the 8 times after which torch gives up
    name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, name, max(64, getattr(torch._dynamo.config, name)))
    networks = {"student": [module.student], "teacher": list(module.teacher.networks) if module.teacher else []}
    for role in hardware["compiled"]:
        for network in networks[role]:
            network.compile(mode=hardware["compile"])
        if role == "teacher":
            module.run_whole_teacher()  # an exit half-way would break the graph at every block


def warn_of_slow_precision(config: Mapping[str, Any]) -> None:
    """bfloat16 without bfloat16 units costs 8 to 43 times the time of float32."""
    import torch

    hardware = settings(config)
    on_cpu = hardware["accelerator"] == "cpu" or (hardware["accelerator"] == "auto" and not torch.cuda.is_available())
    if on_cpu and hardware["precision"].startswith("bf16") and not has_bfloat16():
        log.warning(
            "hardware.precision = %s: this CPU has no bfloat16 units, expect many times the time of 32-true",
            hardware["precision"],
        )


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 numbers by itself, as far as torch can tell."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return any("bf16" in name and bool(value) for name, value in torch.cpu.get_capabilities().items())
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
