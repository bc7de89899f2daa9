"""Resolve which run of a study reads which other one: ``{row}`` in an override is a run directory. No torch."""

from __future__ import annotations

import graphlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from kd.errors import KdError
from kd.studies.study import Row, Study

PLACEHOLDER = re.compile(  # row, its seed, a folder or file inside of its run: {teacher@0}/last; ${…} is Hydra's
    r"(?<!\$)\{([A-Za-z0-9_.-]+)(?:@(\d+))?\}((?:/[A-Za-z0-9_.-]+)*)"
)
SEED = "seed"  # {seed} in an override: the seed of the run


def check(study: Study) -> None:
    """Raise ``KdError`` when a row reads a run that the study does not have, or waits for itself."""
    for row in study.rows.values():
        for seed in row.seeds:
            list(runs_read(study, row, seed))
    _no_cycle(study)


def _no_cycle(study: Study) -> None:
    reads = {name: dict.fromkeys(other for other, _ in rows_read(row)) for name, row in study.rows.items()}
    try:
        graphlib.TopologicalSorter(reads).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][:0:-1]  # the last is the first again; from a row to those that it reads
        first = min(range(len(circle)), key=lambda i: list(study.rows).index(circle[i]))
        named = " → ".join([*circle[first:], *circle[: first + 1]])
        raise KdError(f"{study.folder}: the rows wait for one another: {named}") from None


def rows_read(row: Row) -> list[tuple[str, int | None]]:
    """List the rows that a row's overrides name as ``{row}``, each with its seed where that is given."""
    found = [m for override in row.overrides for m in PLACEHOLDER.finditer(override)]
    return [(m[1], int(m[2]) if m[2] else None) for m in found if m[1] != SEED]


def overrides_hash(study: Study, row: Row) -> str:
    """Hash a row's overrides, and those of the rows that it reads, to eight hex digits."""
    read = [overrides_hash(study, study.rows[name]) for name, _ in rows_read(row)]
    return hash_overrides(row.overrides, read)


def hash_overrides(overrides: Sequence[str], read: Sequence[str]) -> str:
    """Hash overrides, and the hashes of the rows that they read, to eight hex digits."""
    return hashlib.sha256("\n".join([*overrides, *read]).encode()).hexdigest()[:8]


def runs_read(study: Study, row: Row, seed: int) -> Iterator[tuple[str, int]]:
    """Yield row and seed of the runs that one run of ``row`` reads. ``KdError`` for one that there is not."""
    for name, given in rows_read(row):
        yield name, run_of(study, row, name, seed if given is None else given, given is not None)


def run_of(study: Study, row: Row, name: str, seed: int, exact: bool) -> int:
    """Return the seed of ``name`` that stands for ``{name}`` in a run of ``row``: the same one, else its only one."""
    seeds = study.rows[name].seeds
    if seed in seeds:
        return seed
    if not exact and len(seeds) == 1:
        return seeds[0]
    raise KdError(f"{study.folder}: row {row.name} reads {name} of seed {seed}, which has the seeds {list(seeds)} only")


def resolve_overrides(study: Study, row: Row, seed: int, directory: Path) -> tuple[str, ...]:
    """Return the overrides of one run, ``{…}`` replaced by quoted run directories below ``directory`` and the seed.

    A path inside of a run is quoted with it: ``student.model.name={teacher}/last``, a folder for ``from_pretrained``.

    The weights that are read are those that are reported: of a study that reports the last epoch, the last ones.
    """

    def value(found: re.Match[str]) -> str:
        if found[1] == SEED:
            return f"{seed}{found[3]}"
        exact = found[2] is not None
        number = run_of(study, row, found[1], int(found[2]) if exact else seed, exact)
        path = f"{directory / found[1] / f'seed{number}'}{found[3]}".replace("'", r"\'")
        return f"'{path}'"

    own = [PLACEHOLDER.sub(value, override) for override in row.overrides]
    return (*own, *_epochs(study, row))


def _epochs(study: Study, row: Row) -> list[str]:
    """Add ``teacher.epoch=last`` to a row that reads runs of a study which reports the last epoch."""
    keys = {override.lstrip("+").partition("=")[0] for override in row.overrides}
    read = {o.lstrip("+").partition("=")[0] for o in row.overrides if PLACEHOLDER.search(o.replace(f"{{{SEED}}}", ""))}
    roles = [role for role in ("student", "teacher") if f"{role}.checkpoint" in read and f"{role}.epoch" not in keys]
    return [f"{role}.epoch=last" for role in roles] if study.epoch == "last" else []
