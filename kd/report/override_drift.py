"""Tell whether results are those of the study as it is written now, by the overrides of each run. No torch."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from kd.records import record
from kd.studies import load, references
from kd.studies.study import Row, Study

RUN = re.compile(r"'[^']*/([^/']+/seed\d+(?:/[^']*)?)'")  # the directory of a run that another reads, or a part of it
HERE = Path("/")  # runs may be moved: which one was read counts, not where it lay


def columns_of(study: Study, row: Row, seed: int, run_dir: Path) -> dict[str, str | None]:
    """Return two columns of a run: the ``overrides_hash`` of its own, and ``added_overrides`` that the study lacks.

    A run with the overrides of the study has the hash that its row has now, whatever was added. Of what was added,
    places and loggers are left out: they are of the machine, not of the result.
    """
    recorded, own = _recorded(study, row, seed, run_dir)
    more = recorded[len(own) :] if _same(own, _expected(study, row, seed)) else []
    added = [word for word in more if record.changes_results(word)]
    return {"overrides_hash": _hash(study, row, seed, run_dir.parents[1]), "added_overrides": "; ".join(added) or None}


def _expected(study: Study, row: Row, seed: int) -> list[str]:
    return [_anywhere(o) for o in references.resolve_overrides(study, row, seed, HERE)]


def _same(recorded: list[str], expected: list[str]) -> bool:
    """Tell whether these are the same overrides; a record has the value of what is written as ``${recipe.epochs}``."""
    pairs = zip(recorded, expected, strict=False)
    equal = (r == e or ("${" in e and r.startswith(e.split("${")[0])) for r, e in pairs)
    return len(recorded) == len(expected) and all(equal)


def _anywhere(override: str) -> str:
    return RUN.sub(rf"'{HERE}\1'", override)


def _recorded(study: Study, row: Row, seed: int, run_dir: Path) -> tuple[list[str], list[str]]:
    """Return the overrides in a run's record without seed and name, and as many of them as the study has."""
    found = record.read(run_dir).get("overrides") or []
    recorded = [_anywhere(o) for o in found if o != f"name={row.name}"][1:]
    return recorded, recorded[: len(_expected(study, row, seed))]


def _hash(study: Study, row: Row, seed: int, runs_dir: Path) -> str:
    """Hash as :func:`kd.studies.references.overrides_hash`, by the records of the run and of those that it reads."""
    run_dir = runs_dir / row.name / f"seed{seed}"
    read = [_hash(study, study.rows[name], number, runs_dir) for name, number in references.runs_read(study, row, seed)]
    own = _recorded(study, row, seed, run_dir)[1] if (run_dir / record.FILE).is_file() else _expected(study, row, seed)
    return references.hash_overrides(row.overrides if _same(own, _expected(study, row, seed)) else own, read)


def notes(study: Study, frame: pd.DataFrame) -> list[str]:
    """Name the rows whose runs have other overrides than the study now; results without a hash cannot show it."""
    now = {name: references.overrides_hash(study, row) for name, row in study.rows.items()}
    known = frame[frame["overrides_hash"].notna()]
    old = list(dict.fromkeys(known["row"][known["overrides_hash"] != known["row"].map(now)]))
    found = []
    if old:
        found.append(
            f"{'row' if len(old) == 1 else 'rows'} {', '.join(old)}: these results were made with other overrides than "
            f"study.yaml has now; once their runs are removed, `kd study {_name_for_kd_study(study)}` makes them anew"
        )
    added = {word for text in frame["added_overrides"].dropna() for word in text.split("; ")}
    if words := ", ".join(sorted(added)):
        found.append(f"the runs also have the overrides {words}, which study.yaml does not have")
    return found


def _name_for_kd_study(study: Study) -> str:
    """Return what ``kd study`` understands: the name of one that it finds, else its folder."""
    is_found = study.folder.resolve().parent in [place.resolve() for place in load.places()]
    return study.name if is_found else str(study.folder)
