"""Turn the hardware section into arguments of the trainer, and compile the networks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch._dynamo
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

from kd.config.hardware import settings
from kd.errors import KdError
from kd.models import checkpointing
from kd.parallel import group
from kd.parallel.cluster import environment, nodes
from kd.run import allocator
from kd.run.log import log_to_file

log = logging.getLogger(__name__)


def trainer_arguments(config: Mapping[str, Any], module: Any) -> dict[str, Any]:
    """Make the arguments of ``lightning.Trainer`` that depend on the hardware and on this run's other processes."""
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
    if hardware["strategy"] == "fsdp":
        size = group.world_size()
        return ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1, save_distributed_checkpoint=False)
    group.ignore_in_ddp(module, None if module.teacher_trained else "teacher.", "objective.")
    return DDPStrategy(find_unused_parameters=bool(module.unreached))


def compile_networks(config: Mapping[str, Any], module: Any) -> None:
    """Compile the networks in place with ``torch.compile``: names in their state dicts stay what they are."""
    hardware = settings(config)
    if hardware["compile"] is None:
        return
    # a forward is compiled anew for student and teacher, training and evaluation, a smaller last batch, taps on and
    # off: more often than the 8 times after which torch gives up
    name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, name, max(64, getattr(torch._dynamo.config, name)))
    networks = {"student": [module.student], "teacher": getattr(module.teacher, "answering", [])}
    for role in hardware["compiled"]:
        for network in networks[role]:
            network.compile(mode=hardware["compile"])
        if role == "teacher":
            module.run_whole_teacher()  # an exit half-way would break the graph at every block


def keep_memory(config: Mapping[str, Any]) -> None:
    """Let the allocator of this process keep what tensors leave, where the config wants it, and log that it does."""
    if settings(config)["keep_memory"] and allocator.keep_memory():
        log_to_file("the allocator keeps the memory that tensors leave (off by hardware.keep_memory=false)")


def checkpoint_gradients(config: Mapping[str, Any], networks: Mapping[str, nn.Module]) -> None:
    """Switch gradient checkpointing on in the networks that are trained, by their names in the config."""
    if not settings(config)["gradient_checkpointing"]:
        return
    for name, network in networks.items():
        try:
            checkpointing.checkpoint_gradients(network)
        except ValueError as error:
            raise KdError(f"hardware.gradient_checkpointing = true is not possible for {name}: {error}") from error


def warn_of_slow_precision(config: Mapping[str, Any]) -> None:
    """Warn of bfloat16 on a CPU without bfloat16 units: it costs 8 to 43 times the time of float32."""
    hardware = settings(config)
    on_cpu = hardware["accelerator"] == "cpu" or (hardware["accelerator"] == "auto" and not torch.cuda.is_available())
    if on_cpu and hardware["precision"].startswith("bf16") and not has_bfloat16():
        log.warning(
            "hardware.precision = %s: this CPU has no bfloat16 units, expect many times the time of 32-true",
            hardware["precision"],
        )


def has_bfloat16() -> bool:
    """Tell whether the CPU multiplies bfloat16 numbers by itself, as far as torch can tell."""
    if hasattr(torch.cpu, "get_capabilities"):
        return any("bf16" in name and bool(value) for name, value in torch.cpu.get_capabilities().items())
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
