"""The most memory that a forward pass takes: weights and what it makes beside them, in a fresh process on the CPU."""

from __future__ import annotations

import ctypes
import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.deploy.subjects import Subject, of_config, subject
from kd.errors import KdError


def on_cuda(measured: Subject, inputs: Mapping[str, Tensor], device: torch.device) -> int:
    """Return the most bytes allocated during a pass, the weights among them."""
    module = measured.module.to(device)
    given = {name: tensor.to(device) for name, tensor in inputs.items()}
    torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        module(**given)
    return int(torch.cuda.max_memory_allocated(device))


def in_fresh_process(source: list[Any] | Mapping[str, Any], samples: int, length: int, threads: int) -> int:
    """Return bytes of the weights, and of what a pass of so many samples adds to the resident memory.

    ``source``: the arguments of :func:`~kd.deploy.subjects.subject`, or the config of a run, whose student is measured
    with random weights. ``KdError`` when that process fails.
    """
    asked = json.dumps({"source": source, "samples": samples, "length": length, "threads": threads})
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        what = "the student" if isinstance(source, Mapping) else f"{source[0]} (memory=false leaves it out)"
        raise KdError(f"the peak memory cannot be measured of {what}: {reason}")
    return int(done.stdout.splitlines()[-1])


def main(argument: str) -> None:
    """Measure in this process, and print the bytes."""
    asked = json.loads(argument)
    torch.set_num_threads(asked["threads"])
    source = asked["source"]
    measured = of_config(source)["student"] if isinstance(source, dict) else subject(*source)
    with torch.inference_mode():
        measured.module(**measured.example(1, asked["length"]))  # what the libraries make once
        inputs = measured.example(asked["samples"], asked["length"])
        before = _reset()
        measured.module(**inputs)
    print(measured.weight_bytes + max(0, _peak() - before))


def _reset() -> int:
    """Forget the peak so far, where the system can; return the bytes from which it is counted.

    What the first pass has left is given back, where libc can: a pass that reuses it would seem to take nothing.
    """
    with suppress(OSError, AttributeError, TypeError):  # glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _field("VmRSS")
    except OSError:  # not Linux: the peak so far stays, and what lies below it is not seen
        return _peak()


def _peak() -> int:
    try:
        return _field("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _field(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(sys.stdin.read())
