"""What the page says beside the decision: size and speed of both networks, and where all of it comes from. No torch."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd.errors import KdError
from kd.records import record
from kd.records import sizes as run_sizes
from kd.records.bench_file import KEPT, Bench
from kd.records.sizes import PARAMETERS, Pair


@dataclass(frozen=True)
class Facts:
    """What is known of the two networks.

    ``source``: the run or the table of their answers; ``command``: what made the page; ``bench_command``: what measures
    their speed, which the page then reads by ``bench_key``; ``sizes``: title → numbers of
    student and teacher; ``pictures``: index of a sample → address of its image; ``points``: where it comes from.
    """

    source: str
    command: str
    bench_command: str
    sizes: Mapping[str, Pair] = field(default_factory=dict)
    bench: Bench | None = None
    bench_key: str = ""
    pictures: Mapping[int, str] = field(default_factory=dict)
    points: Sequence[str] = ()

    @property
    def smaller(self) -> float | None:
        """Return the share of the teacher's parameters that the student saves; None where one is not known."""
        student, teacher = self.sizes.get(PARAMETERS, (None, None))
        return 1 - student / teacher if student and teacher else None

    @property
    def faster(self) -> tuple[float, float, float] | None:
        """Return by which share of the teacher's speed the student is faster, teacher's time ÷ student's − 1.

        With its 95 % interval; None without a bench.
        """
        speed = None if self.bench is None else self.bench.headline
        if speed is None or speed.ratio is None or speed.interval is None:
            return None
        return 1 / speed.ratio - 1, 1 / speed.interval[1] - 1, 1 / speed.interval[0] - 1


def of_run(run: str, command: str, bench: Bench | None, pictures: Mapping[int, str]) -> Facts:
    """Find out what the record of a run says. ``KdError`` for a bench of other networks."""
    found = record.read(run)
    sizes = run_sizes.of_run(run)
    if bench is not None:
        if None not in sizes[PARAMETERS]:  # a run that did not end does not say
            _refuse_other(run, sizes[PARAMETERS], bench)
        sizes = _of_bench(bench)
    again = shlex.join(["kd", "bench", run, "against=teacher", f"out={Path(run) / KEPT}"])
    points = [*_of_record(run, found), *_of_machine(bench)]
    return Facts(f"run {run}", command, again, sizes, bench, pictures=pictures, points=points)


def of_table(path: str, rows: int, command: str, bench: Bench | None, pictures: Mapping[int, str]) -> Facts:
    """Describe a table of predictions: of the networks only a bench knows anything."""
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    points = [f"Answers of both: {path}, {rows:,} rows that were decided on, sha256 {digest}.", *_of_machine(bench)]
    again = "kd bench STUDENT against=TEACHER out=bench.json"
    sizes = {} if bench is None else _of_bench(bench)
    return Facts(path, command, again, sizes, bench, " bench=bench.json", pictures=pictures, points=points)


def _of_bench(bench: Bench) -> dict[str, Pair]:
    """Return the sizes of the student and of the other network."""
    places = sorted(range(2), key=lambda place: [*bench.sizes][place] != "student")
    return {title: (values[places[0]], values[places[1]]) for title, values in bench.size_rows()}


def _refuse_other(run: str, parameters: Pair, bench: Bench) -> None:
    measured = _of_bench(bench)[PARAMETERS]
    if measured != parameters:
        names = " and ".join(bench.sources.values())
        shown = [" and ".join("?" if n is None else f"{n:,}" for n in pair) for pair in (measured, parameters)]
        raise KdError(
            f"bench is of {names} with {shown[0]} parameters, and the networks of {run} have {shown[1]}: it must be of "
            f"this run: kd bench {run} against=teacher out=FILE.json"
        )


def _of_record(run: str, found: Mapping[str, Any]) -> list[str]:
    teacher = found.get("teacher") or {}
    data, versions = found.get("data") or {}, found.get("versions") or {}
    sizes = "/".join(f"{data.get('sizes', {}).get(split, '?')}" for split in ("train", "val", "test"))
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    commit = str(found.get("commit") or "unknown")[:10]
    return [
        f"Run: {run} ({found.get('name')}, seed {found.get('seed')}, configuration {found.get('config_hash')}), begun "
        f"{found.get('started')}, commit {commit}; {made}.",
        f"Data: {(data.get('split') or {}).get('set', 'of its own')}, {sizes} train/val/test. Decided on test; "
        "temperature and threshold are chosen on val.",
        f"Student: the weights that validation selected. Teacher: {teacher.get('checkpoint') or 'as in its config'}.",
    ]


def _of_machine(bench: Bench | None) -> list[str]:
    if bench is None:
        return []
    where = bench.machine
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    names = " against ".join(bench.sources.values())
    return [
        f"Speed: {names} on {where['device']}, {where['threads']} of {where['cores']} cores, {bench.plan.rounds} "
        f"interleaved rounds; {versions}."
    ]
