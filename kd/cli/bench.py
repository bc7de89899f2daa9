"""``kd bench``: what networks cost to run, one alone or two side by side."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kd.config.rules import FLAG, list_of, number, one_of, refusals, refuse, whole
from kd.errors import KdError, did_you_mean
from kd.records import bench_file
from kd.records.bench_file import Bench, Plan, Speed, Writing

BACKENDS = ("eager", "compiled", "bf16", "onnx", "int8", "openvino")
OWN: dict[str, Any] = {"run": None, "checkpoint": None, "against": None, "backends": None, "batch_sizes": [1, 8, 32]}
OWN |= {"rounds": 50, "length": 128, "new_tokens": 32, "threads": None, "device": "auto", "memory": True, "seed": 0}
OWN |= {"pretrained": False, "out": None}
TEXTS = ("run", "checkpoint", "against", "out", "device")  # read as they stand
RULES = {
    "batch_sizes": list_of(number(least=1)),
    "rounds": whole(10),
    "length": whole(1),
    "new_tokens": whole(2),
    "threads": whole(1).or_null,
    "device": one_of("auto", "cpu", "cuda"),
    "memory": FLAG,
    "seed": whole(0),
    "pretrained": FLAG,
}

USAGE = """kd bench RUN|FILE|timm:NAME|hf:NAME [against=teacher|RUN|FILE|timm:NAME|hf:NAME] [KEY=VALUE ...]

Measures parameters, MACs (1 MAC = 2 FLOPs), bytes, peak memory, latency and throughput, and of two networks the ratio
with its 95 % interval: they are measured in turns, so that the ratio holds where absolute numbers do not. Inputs are
drawn at random, and networks of timm and transformers have random weights: neither changes the cost.

  kd bench RUN against=teacher                     a student and its teacher (run=RUN, checkpoint=FILE are the same)
  kd bench timm:resnet18 against=timm:resnet50     networks of timm; hf:NAME of transformers, or a folder

  backends=eager,onnx     of eager, compiled, bf16, onnx, int8 (dynamic, ONNX Runtime), openvino; default: all there are
  batch_sizes=1,8,32 rounds=50
  length=128              tokens of a text; new_tokens=32: written by generators, for tokens a second
  device=auto threads=N   of PyTorch: cpu, cuda; the other backends run on the CPU; default: the threads that torch uses
  memory=false            without the peak memory, which a fresh process measures
  pretrained=true         fetch the weights of timm and transformers
  seed=0 out=FILE.json    the order of the rounds; all numbers"""


def main(argv: Sequence[str]) -> int:
    """Parse, measure, print tables, write the numbers."""
    if not argv or any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0 if argv else 1
    own = parsed(argv)

    import torch

    from kd.deploy import backends  # start-up: torch, as all of these
    from kd.deploy.bench import bench  # start-up
    from kd.deploy.subjects import subject  # start-up

    if own["device"] == "cuda" and not torch.cuda.is_available():
        raise KdError("device = cuda is not allowed: there is no CUDA device here")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if own["device"] == "auto" else own["device"]
    plan = Plan(
        backends=own["backends"] or backends.installed(),
        threads=own["threads"] or torch.get_num_threads(),
        device=device,
        **{key: own[key] for key in ("batch_sizes", "rounds", "length", "new_tokens", "memory", "seed")},
    )
    sources = {"student" if own["against"] else "network": [own["source"], None, own["pretrained"]]}
    if own["against"]:
        name = "teacher" if own["against"] == "teacher" else "against"
        sources[name] = [own["against"], own["source"], own["pretrained"]]
    found = bench({name: subject(*source) for name, source in sources.items()}, sources, plan)
    _print(found)
    if own["out"]:
        bench_file.write(Path(own["out"]), found)
    return 0


def parsed(argv: Sequence[str]) -> dict[str, Any]:
    """Return the options, and ``source``. ``KdError`` for a key or value that is not allowed."""
    import yaml

    own = {**OWN, "source": None}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or Path(argument).exists():
            key, value = "run", argument
        if key not in OWN:
            raise KdError(f"{argument} is not understood: kd bench has no {key}{did_you_mean(key, OWN)}")
        if key in ("run", "checkpoint"):
            if own["source"] is not None:
                raise KdError(f"kd bench measures one network, or two with against=: given {own['source']} and {value}")
            own["source"] = value
        elif key == "backends":
            own[key] = value.strip("[]").split(",")
        elif key == "batch_sizes":
            own[key] = yaml.safe_load(f"[{value.strip('[]')}]")
        else:
            own[key] = value if key in TEXTS else yaml.safe_load(value)
    _check(own)
    return own


def _check(own: Mapping[str, Any]) -> None:
    """Raise ``KdError`` for values that are not allowed."""
    refuse(refusals("", own, RULES))
    if own["source"] is None:
        raise KdError("kd bench needs a network: kd bench RUN, a weights file, timm:NAME or hf:NAME")
    if wrong := [name for name in own["backends"] or () if name not in BACKENDS]:
        near = did_you_mean(wrong[0], BACKENDS)
        raise KdError(f"backends = {wrong[0]} is not allowed: it must be of {', '.join(BACKENDS)}{near}")
    if wrong := [size for size in own["batch_sizes"] if not isinstance(size, int)]:
        raise KdError(f"batch_sizes = {wrong[0]} is not allowed: it must be whole numbers, 1 or more")
    if own["out"] is not None and not Path(own["out"]).resolve().parent.is_dir():
        raise KdError(f"out = {own['out']} cannot be written: its folder does not exist")


def _print(found: Bench) -> None:
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 118)
    where = found.machine
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    print(f"{where['device']}, {where['threads']} of {where['cores']} cores; {versions}")
    console.print(_sizes(found))
    console.print(_speeds(found))
    if found.writing is not None:
        for name, rate in found.writing.tokens_per_second.items():
            first = found.writing.first_token_ms[name]
            print(f"{name}: {rate:,.1f} tokens/s, first token after {first:,.1f} ms (given {found.plan.length} tokens)")
        if found.writing.ratio is not None:
            print(f"time ratio of the writing {_ratio(found.writing)}")
    for name, reason in found.left_out.items():
        print(f"{name} is left out: {reason}")


def _speeds(found: Bench) -> Table:
    names = list(found.sizes)
    table = Table(title="latency and throughput")
    for title in ("backend", "batch"):
        table.add_column(title)
    for name in names:
        for title in (f"{name} p50/p95/p99 ms", "samples/s"):
            table.add_column(title, justify="right")
    if len(names) == 2:
        table.add_column("time ratio [95 %]", justify="right")
    for speed in found.speeds:
        cells = [speed.backend, str(speed.batch_size)]
        for name in names:
            cells.append(" / ".join(f"{value:.3g}" for value in speed.milliseconds[name].values()))
            cells.append(f"{speed.throughput[name]:,.0f}")
        table.add_row(*cells, *([_ratio(speed)] if len(names) == 2 else []))
    return table


def _sizes(found: Bench) -> Table:
    sources = found.sources
    table = Table(title="size (1 MAC = 2 FLOPs, of one sample)")
    table.add_column("")
    for name in found.sizes:
        table.add_column(f"{name}: {sources[name]}" if sources[name] != name else name, justify="right")
    if len(found.sizes) == 2:
        table.add_column("ratio", justify="right")
    for title, values in found.size_rows():
        both = len(values) == 2 and values[0] and values[1]
        ratio = [f"{values[0] / values[1]:.4g}" if both else ""] if len(values) == 2 else []  # type: ignore[operator]
        table.add_row(title, *("" if value is None else f"{value:,}" for value in values), *ratio)
    return table


def _ratio(part: Speed | Writing) -> str:
    if part.ratio is None or part.interval is None:
        return ""
    return f"{part.ratio:.3g} [{part.interval[0]:.3g}, {part.interval[1]:.3g}]"
