"""How the jobs of a sweep stand at its end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kd.records.manifest import Job
from kd.records.state import State


@dataclass(frozen=True)
class Outcome:
    """How one job stands at the end."""

    job: Job
    run_dir: Path
    state: State
