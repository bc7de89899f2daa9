"""``sweep.json``: what the runs of one directory have in common, and what tells each of them apart. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kd.errors import KdError
from kd.records import record

FILE = "sweep.json"
SCHEMA = 1
SEEDS = re.compile(r"\+*(.+[._])?seed=")  # seed=1, data.split_seed=1


@dataclass(frozen=True)
class Job:
    """One run of many.

    ``name``: its directory below that of the sweep, ``alone/seed0``; ``label``: what differs, for people and W&B;
    ``overrides``: all its overrides; ``after``: names of the jobs whose runs it reads, its teachers above all.
    """

    name: str
    label: str
    overrides: tuple[str, ...]
    after: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        """Return the label without seeds: jobs of one group differ by them only."""
        return " ".join(word for word in self.label.split(" ") if not SEEDS.match(word))


@dataclass(frozen=True)
class Manifest:
    """The jobs of a sweep (``kind``: sweep, optuna or study) and the name that groups them.

    ``folder``: of a study, absolute; ``objectives``: of a search, the one that orders its trials first.
    """

    kind: str
    name: str
    jobs: Mapping[str, Job]
    folder: str = ""
    objectives: tuple[str, ...] = ()


def write(directory: Path, manifest: Manifest) -> None:
    """Write ``sweep.json`` in one step. The directory must exist."""
    jobs = {name: {k: v for k, v in asdict(job).items() if k != "name"} for name, job in manifest.jobs.items()}
    about: dict[str, Any] = {"kind": manifest.kind, "name": manifest.name}
    about |= {"folder": manifest.folder} if manifest.folder else {}
    about |= {"objectives": manifest.objectives} if manifest.objectives else {}
    content = {"schema": SCHEMA, **about, "jobs": jobs}
    record.write_text(directory / FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read(directory: Path) -> Manifest:
    """Return the manifest of a sweep's directory. ``KdError`` when there is none or it cannot be read."""
    file = directory / FILE
    if not file.is_file():
        raise KdError(f"{directory} is not the directory of a sweep or study: there is no {FILE} in it")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["schema"] > SCHEMA:
            raise KdError(f"{file} was written by a newer version of kd (schema {content['schema']}, known: {SCHEMA})")
        jobs = {name: _job(name, node) for name, node in content["jobs"].items()}
        more = content.get("folder", ""), tuple(content.get("objectives", ()))
        return Manifest(content["kind"], content["name"], jobs, *more)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise KdError(f"{file} cannot be read: it is not what kd writes") from None


def _job(name: str, node: Mapping[str, Any]) -> Job:
    return Job(name, node["label"], tuple(node["overrides"]), tuple(node["after"]))


def find(run_dir: Path) -> tuple[Manifest, Job] | None:
    """Return the sweep or study that a run belongs to, and its job there; None for a run of its own."""
    run_dir = run_dir.resolve()
    for directory in list(run_dir.parents)[:2]:
        if (directory / FILE).is_file():
            manifest = read(directory)
            job = manifest.jobs.get(str(run_dir.relative_to(directory)))
            return (manifest, job) if job is not None else None
    return None
