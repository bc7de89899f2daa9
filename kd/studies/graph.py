"""Which run of a study reads which other one: ``{row}`` in an override stands for a run directory. No torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd.errors import KdError

if TYPE_CHECKING:
    from kd.studies.spec import Row, Study

PLACEHOLDER = re.compile(r"(?<!\$)\{([A-Za-z0-9_.-]+)(?:@(\d+))?\}")  # ${…} is Hydra's
SEED = "seed"  # {seed} in an override: the seed of the run


def check(study: Study) -> None:
    """``KdError`` when a row reads a run that the study does not have, or waits for itself."""
    for row in study.rows.values():
        for seed in row.seeds:
            list(needs(study, row, seed))
    _no_cycle(study)


def _no_cycle(study: Study) -> None:
    waiting: list[str] = []
    done: set[str] = set()

    def visit(name: str) -> None:
        if name in waiting:
            circle = [*waiting[waiting.index(name) :], name]
            raise KdError(f"{study.folder}: the rows wait for one another: {' → '.join(circle)}")
        if name not in done:
            waiting.append(name)
            for other, _ in references(study.rows[name]):
                visit(other)
            done.add(waiting.pop())

    for name in study.rows:
        visit(name)


def references(row: Row) -> list[tuple[str, int | None]]:
    """The rows, each with the seed if it is given, whose run directories a row's overrides name."""
    found = [m for override in row.overrides for m in PLACEHOLDER.finditer(override)]
    return [(m[1], int(m[2]) if m[2] else None) for m in found if m[1] != SEED]


def overrides_hash(study: Study, row: Row) -> str:
    """Eight hex digits of what the study says of a row: its overrides, and those of the rows that it reads."""
    read = [overrides_hash(study, study.rows[name]) for name, _ in references(row)]
    return hashed(row.overrides, read)


def hashed(overrides: Sequence[str], read: Sequence[str]) -> str:
    """Eight hex digits of overrides and of the hashes of the rows that they read."""
    return hashlib.sha256("\n".join([*overrides, *read]).encode()).hexdigest()[:8]


def needs(study: Study, row: Row, seed: int) -> Iterator[tuple[str, int]]:
    """Row and seed of the runs that one run of ``row`` reads. ``KdError`` when the study does not have such a run."""
    for name, asked in references(row):
        yield name, run_of(study, row, name, seed if asked is None else asked, asked is not None)


def run_of(study: Study, row: Row, name: str, seed: int, exact: bool) -> int:
    """The seed of ``name`` that stands for ``{name}`` in a run of ``row``: the same one, else its only one."""
    there = study.rows[name].seeds
    if seed in there:
        return seed
    if not exact and len(there) == 1:
        return there[0]
    raise KdError(f"{study.folder}: row {row.name} reads {name} of seed {seed}, which has the seeds {list(there)} only")


def resolved(study: Study, row: Row, seed: int, directory: Path) -> tuple[str, ...]:
    """The overrides of one run, ``{…}`` replaced: by quoted run directories below ``directory``, and by the seed.

    The weights that are read are those that are reported: of a study that reports the last epoch, the last ones.
    """

    def value(found: re.Match[str]) -> str:
        if found[1] == SEED:
            return str(seed)
        exact = found[2] is not None
        number = run_of(study, row, found[1], int(found[2]) if exact else seed, exact)
        path = str(directory / found[1] / f"seed{number}").replace("'", r"\'")
        return f"'{path}'"

    own = [PLACEHOLDER.sub(value, override) for override in row.overrides]
    return (*own, *_epochs(study, row))


def _epochs(study: Study, row: Row) -> list[str]:
    """``teacher.epoch=last`` for a row that reads runs of a study which reports the last epoch."""
    keys = {override.lstrip("+").partition("=")[0] for override in row.overrides}
    read = {o.lstrip("+").partition("=")[0] for o in row.overrides if PLACEHOLDER.search(o.replace(f"{{{SEED}}}", ""))}
    roles = [role for role in ("student", "teacher") if f"{role}.checkpoint" in read and f"{role}.epoch" not in keys]
    return [f"{role}.epoch=last" for role in roles] if study.epoch == "last" else []
