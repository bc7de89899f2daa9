"""Forward and backward of output projection + KL over a large vocabulary: peak memory and time of each way to do it.

    OMP_NUM_THREADS=1 python experiments/benchmarks/vocabulary.py [V=32768,131072] [rounds=3] [tokens=2048]

Hidden states and weights of a student and a teacher, float32, of width 512 (256 with the larger vocabulary), T = 1:

- naive: all logits, :func:`kd.losses.functional.kl_divergence`, backward;
- checkpointed: the same 128 rows at a time, each under ``torch.utils.checkpoint``;
- fused: :func:`kd.losses.functional.fused_losses` in chunks of 128 and of 32 rows;
- fused, top-64: a stored top-k in the place of the teacher's hidden states.

Each run is a process of its own, and they take turns. Memory is the peak resident set over what is there before the
first step, once a tiny one has loaded the libraries; time is the CPU's in that step. The table has medians, also
relative to naive.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

WAYS = ("naive", "checkpointed", "fused, 128 rows", "fused, 32 rows", "fused, top-64")
WIDTH = {32_768: 512, 131_072: 256}


def measure(way: str, classes: int, tokens: int) -> tuple[float, float, float]:
    """MiB over start, seconds and loss of one step, in this process."""
    import torch
    from torch.utils.checkpoint import checkpoint

    from kd.losses.base import Fused, TopK
    from kd.losses.functional import fused_losses, kl_divergence
    from kd.losses.tokens.fused import Projection, TeacherRows

    def inputs(rows: int, size: int, width: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        made = [torch.randn(rows, width), torch.randn(size, width).mul_(2 * width**-0.5)]
        made += [torch.randn(rows, width), torch.randn(size, width).mul_(2 * width**-0.5)]
        if way == "fused, top-64":
            log_probs, ids = zip(*((h @ made[3].T).log_softmax(-1).topk(64) for h in made[2].split(16)), strict=True)
            made[2:] = [torch.cat(log_probs), torch.cat(ids)]
        return [t.requires_grad_(i < 2) for i, t in enumerate(made)]

    def loss_of(student: torch.Tensor, weight: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if way == "naive":
            return kl_divergence(student @ weight.T, one @ other.T, 1.0)
        if way == "checkpointed":
            parts = zip(student.split(128), one.split(128), strict=True)
            total = sum(checkpoint(chunk, s, weight, t, other, use_reentrant=False) for s, t in parts)
            return total / len(student)
        if way == "fused, top-64":
            teacher, form = TeacherRows(topk=TopK(other, one, len(weight))), Fused("topk_kl", k=64)
        else:
            teacher, form = TeacherRows(one, Projection(other)), Fused("forward_kl")
        rows = 32 if "32" in way else 128
        return fused_losses(student, Projection(weight), teacher, None, [form], [1.0], rows)[1]

    def chunk(s: torch.Tensor, weight: torch.Tensor, t: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return kl_divergence(s @ weight.T, t @ other.T, 1.0) * len(s)

    torch.set_num_threads(1)
    loss_of(*inputs(130, 1000, 32)).backward()
    given = inputs(tokens, classes, WIDTH.get(classes, 256))
    before, start = resident(), time.process_time()
    loss = loss_of(*given)
    loss.backward()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux: KiB
    return peak - before, seconds, float(loss.detach())


def resident() -> float:
    """MiB of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def compare(classes: int, rounds: int, tokens: int) -> None:
    """Print the lines of one vocabulary."""
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "measure", way, str(classes), str(tokens)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[way].append([float(word) for word in said.split()[-3:]])
    middle = {way: [statistics.median(column) for column in zip(*runs, strict=True)] for way, runs in found.items()}
    peak, seconds, loss = middle["naive"]
    for way, (mib, took, value) in middle.items():
        off = "" if "top" in way else f"   loss off by {abs(value / loss - 1):.0e}"
        print(f"{classes:7} {way:16} {mib:6.0f} MiB  1/{peak / mib:4.1f}  {took:6.2f} s  {took / seconds:4.2f} ×{off}")


def main(arguments: list[str]) -> None:
    """Compare the vocabularies that are named."""
    if arguments[:1] == ["measure"]:
        print(*measure(arguments[1], int(arguments[2]), int(arguments[3])))
        return
    options = dict(argument.split("=") for argument in arguments)
    for classes in options.get("V", "32768,131072").split(","):
        compare(int(classes), int(options.get("rounds", 3)), int(options.get("tokens", 2048)))


if __name__ == "__main__":
    main(sys.argv[1:])
