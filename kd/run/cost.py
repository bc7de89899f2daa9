"""What networks cost: parameters, multiply-accumulates, latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kd.distill.distiller import Distiller
from kd.losses.base import Batch
from kd.losses.networks import in_eval
from kd.tasks.base import Task, Want


def sizes(module: Distiller, examples: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Count parameters and multiply-accumulates a sample, of student and teacher; adapters are counted apart.

    ``examples``: inputs of one sample, by role. A teacher without live networks has no size.
    """
    deployed = {id(p) for p in module.deployed.parameters()}  # a head that a term leaves on the student counts there
    adapters = sum(p.numel() for p in module.objective.parameters() if id(p) not in deployed)
    found = {"student": {**size(module.deployed, module.task, examples["student"]), "adapter_parameters": adapters}}
    if module.teacher is not None and len(module.teacher.networks):
        found["teacher"] = size(module.teacher, module.task, examples["teacher"])
    return found


def size(network: nn.Module, task: Task, example: Any) -> dict[str, int]:
    """Count parameters, and multiply-accumulate operations of one forward pass of ``example``."""
    with in_eval(network), torch.no_grad(), FlopCounterMode(display=False) as counter:
        _call(network, task, example)
    return {"parameters": sum(p.numel() for p in network.parameters()), "macs": counter.get_total_flops() // 2}


def latency_ms(network: nn.Module, task: Task, example: Any, passes: int = 30) -> float:
    """Measure the median milliseconds of a pass of one sample, where the weights are; a busy machine is noisy."""
    weight = next(network.parameters())
    device = weight.device

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, weight.dtype if tensor.is_floating_point() else None)

    example = Batch(example).map(moved).inputs
    times = []
    with in_eval(network), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for _ in range(3 + passes):  # the first ones warm up
            start = time.perf_counter()
            _call(network, task, example)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return round(1000 * statistics.median(times[3:]), 4)


def _call(network: Any, task: Task, example: Any) -> None:
    if hasattr(network, "measured"):  # a teacher calls its networks itself
        network(example)
    else:
        task.answer(network, example, task.rows(Batch(example)), Want())
