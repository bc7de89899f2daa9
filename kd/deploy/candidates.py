"""Measure networks before they are trained: size, multiply-accumulates, memory, time alone and beside the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kd.deploy import peak_memory, subjects
from kd.deploy.bench import bench
from kd.errors import KdError
from kd.records.bench_file import Plan

ERROR = "error"  # in the place of numbers: why the network cannot be made


def measure(
    configs: Mapping[str, Mapping[str, Any]], timed: bool, batch_size: int, rounds: int, memory: bool = False
) -> dict[str, dict[str, Any]]:
    """Measure the student of each config: ``parameters``, ``macs``, ``mb`` of weights in memory.

    ``timed``: also ``ms``, the median time of a pass of PyTorch eager, ``latency_ratio`` to the teacher's where there
    is one, of interleaved rounds, and ``samples_per_second``. ``memory``: also ``peak_mb``, what a pass takes with the
    weights, as ``kd bench`` measures it, in a process for each network. One that cannot be made has :data:`ERROR`
    alone.
    """
    found = {}
    for name, config in configs.items():
        try:
            found[name] = _measured(config, timed, batch_size, rounds, memory)
        except KdError as error:
            found[name] = {ERROR: str(error)}
    return found


def _measured(config: Mapping[str, Any], timed: bool, batch_size: int, rounds: int, memory: bool) -> dict[str, Any]:
    made = subjects.of_config(config)
    cuda = torch.cuda.is_available() and config["hardware"]["accelerator"] != "cpu"
    plan = Plan(
        ["eager"] if timed else [],
        [batch_size],
        rounds,
        threads=torch.get_num_threads(),
        device="cuda" if cuda else "cpu",
        memory=False,
    )
    measured = bench(made, {name: [] for name in made}, plan)
    size = measured.sizes["student"]
    numbers: dict[str, Any] = {"parameters": size.parameters, "macs": size.macs, "mb": size.weight_bytes / 1e6}
    if memory:
        peak = size.peak_bytes
        if peak is None:
            peak = peak_memory.in_fresh_process(config, batch_size, plan.length, plan.threads)
        numbers["peak_mb"] = peak / 1e6
    for speed in measured.speeds:
        numbers |= {"ms": speed.milliseconds["student"]["p50"], "samples_per_second": speed.throughput["student"]}
        numbers |= {} if speed.ratio is None else {"latency_ratio": speed.ratio}
    if timed and not measured.speeds:
        raise KdError(f"its time cannot be measured: {'; '.join(measured.left_out.values())}")
    return numbers
