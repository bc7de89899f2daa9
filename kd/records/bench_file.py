"""What ``kd bench`` measured, and the JSON file that keeps it. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kd.errors import KdError
from kd.records import record

KEPT = "bench.json"  # the file in a run's directory, where pages find it


@dataclass(frozen=True)
class Plan:
    """What is measured: ``backends``, ``batch_sizes``, ``rounds`` of each; ``length``: tokens of a text.

    ``new_tokens``: written by generators; ``memory``: whether a fresh process measures the peak; ``device``: cpu, cuda.
    """

    backends: Sequence[str]
    batch_sizes: Sequence[int] = (1, 8, 32)
    rounds: int = 50
    length: int = 128
    new_tokens: int = 32
    threads: int = 1
    device: str = "cpu"
    memory: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Size:
    """Of one network: parameters, those of heads added at inference and of adapters of the training, bytes, MACs."""

    parameters: int
    added: int
    adapters: int
    file_bytes: int | None
    weight_bytes: int
    macs: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Speed:
    """Of networks in one backend at one batch size: milliseconds a pass by percentile, samples a second, the ratio.

    ``ratio``: of the first to the second, the median over rounds; ``interval``: 95 %, by the bootstrap over rounds.
    """

    backend: str
    batch_size: int
    milliseconds: Mapping[str, Mapping[str, float]]
    throughput: Mapping[str, float]
    ratio: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Writing:
    """Of generators: tokens a second and milliseconds to the first token, by network, and the ratio of the time."""

    tokens_per_second: Mapping[str, float]
    first_token_ms: Mapping[str, float]
    ratio: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Bench:
    """All that was measured, on which machine, and which backends could not be had, with the reason.

    ``sources``: name → what the network was given as, the student first.
    """

    sources: Mapping[str, str]
    machine: Mapping[str, Any]
    plan: Plan
    sizes: Mapping[str, Size]
    speeds: list[Speed]
    writing: Writing | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def headline(self) -> Speed:
        """Return the speed that stands for all: PyTorch eager at the smallest batch size, else the first measured."""
        return min(self.speeds, key=lambda s: (s.backend != "eager", s.batch_size))

    def size_rows(self) -> list[tuple[str, list[int | None]]]:
        """Return what each number of size is called, and that of every network; without what none of them has."""
        titles = {
            "parameters": "parameters",
            "added": "of them, heads added for inference",
            "adapters": "adapters, of the training alone",
            "file_bytes": "weights file, bytes",
            "weight_bytes": "weights in memory, bytes",
            "macs": "MACs",
            "peak_bytes": f"peak memory of a batch of {max(self.plan.batch_sizes)}, bytes",
        }
        rows = [(title, [getattr(size, key) for size in self.sizes.values()]) for key, title in titles.items()]
        return [(title, values) for title, values in rows if any(values)]


def write(path: Path, found: Bench) -> None:
    """Write the file in one step."""
    record.write_text(path, json.dumps(asdict(found), indent=2, ensure_ascii=False) + "\n")


def read(path: str | Path) -> Bench:
    """Read a student beside its teacher. ``KdError`` for other files, one network alone, or no speed."""
    if not Path(path).is_file():
        raise KdError(f"bench = {path}: there is no such file: kd bench RUN against=teacher out={path} writes it")
    try:
        node = json.loads(Path(path).read_text(encoding="utf-8"))
        sizes = {str(name): Size(**_numbers(part)) for name, part in node["sizes"].items()}
        speeds = [_speed(part, [*sizes]) for part in node["speeds"]]
        names, where, plan = node["sources"], node["machine"], Plan(**node["plan"])
        known = {"device": str(where["device"]), "threads": int(where["threads"]), "cores": int(where["cores"])}
        versions = {str(name): str(version) for name, version in where["versions"].items()}
        left_out = {str(name): str(reason) for name, reason in node["left_out"].items()}
        sources = {name: str(names[name]) for name in sizes}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise KdError(f"bench = {path} cannot be read: it is not what kd bench writes (out=FILE.json)") from None
    if len(sizes) != 2 or "student" not in sizes:
        raise KdError(f"bench = {path} measures one network alone: kd bench RUN against=teacher out={path}")
    if not speeds:
        raise KdError(f"bench = {path} holds no speed: {'; '.join(left_out.values()) or 'no backend was measured'}")
    return Bench(sources, {**known, "versions": versions}, plan, sizes, speeds, None, left_out)


def _numbers(part: Mapping[str, Any]) -> dict[str, Any]:
    """Check the sizes of a network."""
    found = {one.name: part[one.name] for one in fields(Size)}
    if any(not isinstance(value, int) for name, value in found.items() if name not in ("file_bytes", "peak_bytes")):
        raise ValueError(part)
    return {name: None if value is None else int(value) for name, value in found.items()}


def _speed(part: Mapping[str, Any], names: Sequence[str]) -> Speed:
    """Check one speed of both networks: all numbers are above 0."""
    milliseconds = {name: {str(p): float(v) for p, v in part["milliseconds"][name].items()} for name in names}
    throughput = {name: float(part["throughput"][name]) for name in names}
    ratio, interval = part["ratio"], part["interval"]
    bounds = None if interval is None else (float(interval[0]), float(interval[1]))
    numbers = [*throughput.values(), *(() if ratio is None else (float(ratio),)), *(bounds or ())]
    if not all(math.isfinite(value) and value > 0 for value in numbers):
        raise ValueError(part)
    return Speed(str(part["backend"]), int(part["batch_size"]), milliseconds, throughput, ratio, bounds)
