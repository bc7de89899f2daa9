"""The rules of the hardware section, as far as they are known without the machine. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from kd.config.rules import Rule, list_of, one_of, refusals, whole
from kd.config.schema import Hardware

RULES = {
    "accelerator": one_of("auto", "cpu", "gpu", "cuda", "mps"),
    "cluster": one_of(None, "torchrun", "slurm"),
    "strategy": one_of("auto", "ddp", "fsdp"),
    "compile": one_of(None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "compiled": Rule("a list of student, teacher or both", lambda roles: {*roles} <= {"student", "teacher"}),
    "loss_chunk": whole(0).or_null,
    "liger": one_of("auto", False),
    "precision": one_of("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"),
    "threads": whole(1, 1024).or_null,  # of 100,000 the memory does not suffice: a crash
    "timeout_s": whole(1),
    "deterministic": one_of(True, False, "warn"),
}
GPUS = list_of(whole(0))


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the hardware section, also in the config of a run that is older than one of its options."""
    return {**asdict(Hardware()), **config["hardware"]}


def problems(hardware: Mapping[str, Any], batch_size: int) -> Iterator[str]:
    """Yield one sentence for each setting that is not allowed."""
    yield from refusals("hardware.", hardware, RULES)
    yield from _device_problems(hardware, batch_size)
    yield from _pair_problems(hardware)


def _device_problems(hardware: Mapping[str, Any], batch_size: int) -> Iterator[str]:
    devices, nodes, accelerator = hardware["devices"], hardware["num_nodes"], hardware["accelerator"]
    several = isinstance(devices, list)
    if several and not (GPUS.fits(devices) and len(set(devices)) == len(devices)):
        yield f"hardware.devices = {devices} is not allowed: a list holds the numbers of GPUs, each once"
    elif not several and devices != "auto" and not whole(1).fits(devices):
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
