"""Measure what networks cost to run: size, MACs, memory, latency, throughput, and the ratio of two of them.

Two networks are measured in turns, in rounds whose order is drawn: what else the machine does meets both. Absolute
numbers hold for one machine at one time; the ratio, with its interval, is what can be compared.
"""

from __future__ import annotations

import math
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from kd.deploy import backends, peak_memory
from kd.deploy.subjects import Subject
from kd.errors import KdError
from kd.models.positions import positions_of
from kd.records.bench_file import Bench, Plan, Size, Speed, Writing

STABLE = 0.05  # change of the median from one group of passes to the next at which warm-up ends
GROUP, GROUPS = 5, 20  # passes of a group, groups at most
LEVEL, RESAMPLES = 0.95, 2000
PERCENTILES = (50, 95, 99)


def bench(subjects: Mapping[str, Subject], sources: Mapping[str, list[Any]], plan: Plan) -> Bench:
    """Measure one network, or two side by side.

    ``sources``: arguments of :func:`~kd.deploy.subjects.subject`, for the process that measures memory.
    """
    device = torch.device(plan.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        sizes = {name: _size(one, sources[name], plan, device) for name, one in subjects.items()}
        speeds: list[Speed] = []
        left_out: dict[str, str] = {}
        with tempfile.TemporaryDirectory() as folder:
            for backend in plan.backends:
                try:
                    speeds += _speeds(backend, subjects, plan, device, Path(folder))
                except KdError as error:
                    left_out[backend] = str(error)
        generators = {name: one for name, one in subjects.items() if one.generates}
        writing = _writing(generators, plan, device) if generators else None
    finally:
        torch.set_num_threads(threads)
    names = {name: str(source[0]) for name, source in sources.items() if source}
    return Bench(names, machine(plan), plan, sizes, speeds, writing, left_out)


def _size(subject: Subject, source: list[Any], plan: Plan, device: torch.device) -> Size:
    most = positions_of(subject.module.network) if subject.vocabulary else None
    if most is not None and plan.length + (plan.new_tokens if subject.generates else 0) > most:
        new = f" and new_tokens = {plan.new_tokens}" if subject.generates else ""
        raise KdError(f"length = {plan.length}{new} is not allowed: {subject.name} has {most} positions")
    largest = max(plan.batch_sizes)
    peak = None
    if device.type == "cuda":
        peak = peak_memory.on_cuda(subject, subject.example(largest, plan.length), device)
    elif plan.memory:
        peak = peak_memory.in_fresh_process(source, largest, plan.length, plan.threads)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        subject.module.to("cpu")(**subject.example(1, plan.length))
    macs = counter.get_total_flops() // 2
    return Size(
        *(subject.parameters, subject.added, subject.adapters, subject.file_bytes, subject.weight_bytes, macs, peak)
    )


def _speeds(
    backend: str, subjects: Mapping[str, Subject], plan: Plan, device: torch.device, folder: Path
) -> list[Speed]:
    """Measure a backend at every batch size."""
    made = {}
    for name, subject in subjects.items():
        (own := folder / name).mkdir(exist_ok=True)
        made[name] = backends.prepared(backend, subject, device, own, plan.length, plan.threads)
    found = []
    for size in plan.batch_sizes:
        passes = {name: made[name](subject.example(size, plan.length)) for name, subject in subjects.items()}
        try:
            seconds = interleaved(passes, plan.rounds, plan.threads, plan.seed)
        except Exception as error:  # of a compiler or a kernel that is lacking
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise KdError(f"{backend} cannot run a batch of {size}: {reason}") from error
        median = {name: float(np.median(times)) for name, times in seconds.items()}
        milliseconds = {
            name: {f"p{p}": 1000 * float(np.percentile(times, p)) for p in PERCENTILES}
            for name, times in seconds.items()
        }
        throughput = {name: size / time for name, time in median.items()}
        found.append(Speed(backend, size, milliseconds, throughput, *ratio(list(seconds.values()), plan.seed)))
    return found


def interleaved(passes: Mapping[str, Callable[[], Any]], rounds: int, threads: int, seed: int) -> dict[str, np.ndarray]:
    """Return seconds of one pass (rounds,) of each; a round measures each once, in an order drawn anew."""
    timers = {name: Timer("one()", globals={"one": one}, num_threads=threads) for name, one in passes.items()}
    for timer in timers.values():
        _warm_up(timer)
    found: dict[str, list[float]] = {name: [] for name in passes}
    random = np.random.default_rng(seed)
    for _ in range(rounds):
        for place in random.permutation(len(timers)):
            name = list(timers)[place]
            found[name].append(timers[name].timeit(1).mean)
    return {name: np.asarray(times) for name, times in found.items()}


def _warm_up(timer: Timer) -> None:
    """Run until the median of a group of passes is within 5 % of that of the group before, 20 groups at most."""
    before = math.inf
    for _ in range(GROUPS):
        now = float(np.median([timer.timeit(1).mean for _ in range(GROUP)]))
        if abs(now - before) <= STABLE * now:
            return
        before = now


def ratio(seconds: Sequence[np.ndarray], seed: int) -> tuple[float | None, tuple[float, float] | None]:
    """Return the median ratio over rounds of the first to the second, and its 95 % interval (percentile bootstrap)."""
    from scipy.stats import bootstrap

    if len(seconds) != 2:
        return None, None
    shares = seconds[0] / seconds[1]
    found = bootstrap(
        (shares,),
        np.median,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(np.median(shares)), (float(found.low), float(found.high))


def _writing(subjects: Mapping[str, Subject], plan: Plan, device: torch.device) -> Writing:
    """Measure ``generate`` of ``length`` given tokens: all new tokens, and the first one alone."""
    passes = {}
    for name, subject in subjects.items():
        network: Any = subject.module.to(device).network
        inputs = {key: tensor.to(device) for key, tensor in subject.example(1, plan.length).items()}
        for count in {1, plan.new_tokens}:
            passes[f"{name} {count}"] = _generate(network, inputs, count)
    rounds = max(5, plan.rounds // 5)
    seconds = interleaved(passes, rounds, plan.threads, plan.seed)
    whole = {name: seconds[f"{name} {plan.new_tokens}"] for name in subjects}
    return Writing(
        {name: plan.new_tokens / float(np.median(times)) for name, times in whole.items()},
        {name: 1000 * float(np.median(seconds[f"{name} 1"])) for name in subjects},
        *ratio(list(whole.values()), plan.seed),
    )


def _generate(network: Any, inputs: Mapping[str, Any], count: int) -> Callable[[], Any]:
    pad = network.config.pad_token_id
    pad = 0 if pad is None else pad

    def one() -> Any:
        with torch.inference_mode():
            return network.generate(
                **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=pad
            )

    return one


def machine(plan: Plan) -> dict[str, Any]:
    """Say what it was measured on: device, processor, threads, versions."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for name in ("kd", "torch", "timm", "transformers", "onnx", "onnxruntime", "openvino", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    cuda = torch.cuda.get_device_name() if plan.device == "cuda" else None
    return {
        "device": cuda or _processor(),
        "kind": plan.device,
        "cores": os.cpu_count(),
        "threads": plan.threads,
        "versions": versions,
        "system": platform.platform(),
    }


def _processor() -> str:
    """Name the processor, as Linux does; elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
