"""What this machine has: cores and GPUs, and whether a hardware section asks for more. No torch at import."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from typing import Any

from kd.errors import KdError

GPU = ("gpu", "cuda")


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def refuse_missing(hardware: Mapping[str, Any], gpus: int | None = None) -> None:
    """Raise ``KdError`` when a run that kd starts wants more GPUs than there are, or more CPU processes than cores.

    ``gpus``: how many there are; null: torch is asked, and imported, where that matters. Two processes may share one
    core: ``hardware=ddp_cpu`` is there to try what several GPUs will do.
    """
    accelerator, devices = hardware["accelerator"], hardware["devices"]
    if hardware["cluster"] is not None:
        return
    if gpus is None:
        gpus = _count_gpus(accelerator, devices)
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


def _count_gpus(accelerator: str, devices: Any) -> int:
    if accelerator not in GPU and (accelerator != "auto" or devices in (1, "auto")):
        return 0
    import torch  # start-up: only where GPUs are counted

    return torch.cuda.device_count()


def gpus() -> list[str]:
    """List the NVIDIA GPUs that this process may use, by number, found without touching them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [g for g in visible.split(",") if g.strip() and g.strip() != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    whole = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]  # parts (MIG) have lines as well
    return [str(number) for number in range(len(whole))]


def devices_of(hardware: Mapping[str, Any], there: int) -> int:
    """Count the GPUs, of those that are ``there``, or processes on the CPU, a job of this hardware section takes.

    A job that names its GPUs by number takes them all: nothing may be renumbered under it. ``KdError``: more than
    there are.
    """
    devices = hardware["devices"]
    if not there or hardware["accelerator"] == "cpu":
        return devices if isinstance(devices, int) else 1
    if isinstance(devices, int) and devices > there:
        raise KdError(f"hardware.devices = {devices} is not allowed: this machine has {there} GPUs")
    return devices if isinstance(devices, int) else there
