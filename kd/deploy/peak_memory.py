"""The most memory that a forward pass takes: weights and what it makes beside them, in a fresh process on the CPU."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.deploy.subjects import Subject, subject
from kd.errors import KdError


def on_cuda(measured: Subject, inputs: Mapping[str, Tensor], device: torch.device) -> int:
    """Return the most bytes allocated during a pass, the weights among them."""
    module = measured.module.to(device)
    given = {name: tensor.to(device) for name, tensor in inputs.items()}
    torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        module(**given)
    return int(torch.cuda.max_memory_allocated(device))


def in_fresh_process(source: list[Any], samples: int, length: int, threads: int) -> int:
    """Return bytes of the weights, and of what a pass of so many samples adds to the resident memory.

    ``source``: the arguments of :func:`~kd.deploy.subjects.subject`. ``KdError`` when that process fails.
    """
    asked = json.dumps({"source": source, "samples": samples, "length": length, "threads": threads})
    done = subprocess.run([sys.executable, "-m", __name__, asked], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise KdError(f"the peak memory of {source[0]} cannot be measured (memory=false leaves it out): {reason}")
    return int(done.stdout.splitlines()[-1])


def main(argument: str) -> None:
    """Measure in this process, and print the bytes."""
    asked = json.loads(argument)
    torch.set_num_threads(asked["threads"])
    measured = subject(*asked["source"])
    with torch.inference_mode():
        measured.module(**measured.example(1, asked["length"]))  # what the libraries make once
        inputs = measured.example(asked["samples"], asked["length"])
        before = _reset()
        measured.module(**inputs)
    print(measured.weight_bytes + max(0, _peak() - before))


def _reset() -> int:
    """Forget the peak so far, where the system can; return the bytes from which it is counted."""
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
    main(sys.argv[1])
