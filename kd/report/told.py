"""Whether results are those of the study as it is written now: what each run was told, beside ``study.yaml``."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from kd.records import record
from kd.studies import graph
from kd.studies.spec import Row, Study

RUN = re.compile(r"'[^']*/([^/']+/seed\d+)'")  # the directory of a run that another reads
HERE = Path("/")  # runs may be moved: which one was read counts, not where it lay


def by(study: Study, row: Row, seed: int, run_dir: Path) -> dict[str, str | None]:
    """Two columns of a run: ``overrides_hash`` of what it was told, ``added_overrides`` that the study does not have.

    A run that was told what the study says has the hash that its row has now, whatever was added. Of what was added,
    places and loggers are left out: they are of the machine, not of the result.
    """
    told, own = _told(study, row, seed, run_dir)
    more = told[len(own) :] if _same(own, _said(study, row, seed)) else []
    added = [word for word in more if record.changes_results(word)]
    return {"overrides_hash": _hash(study, row, seed, run_dir.parents[1]), "added_overrides": "; ".join(added) or None}


def _said(study: Study, row: Row, seed: int) -> list[str]:
    return [_anywhere(o) for o in graph.resolved(study, row, seed, HERE)]


def _same(told: list[str], said: list[str]) -> bool:
    """Whether these are the same overrides; a record has the value of what is written as ``${recipe.epochs}``."""
    pairs = zip(told, said, strict=False)
    return len(told) == len(said) and all(t == s or ("${" in s and t.startswith(s.split("${")[0])) for t, s in pairs)


def _anywhere(override: str) -> str:
    return RUN.sub(rf"'{HERE}\1'", override)


def _told(study: Study, row: Row, seed: int, run_dir: Path) -> tuple[list[str], list[str]]:
    """The overrides in a run's record without its seed and name, and as many of them as the study has for the row."""
    found = record.read(run_dir).get("overrides") or []
    told = [_anywhere(o) for o in found if o != f"name={row.name}"][1:]
    return told, told[: len(_said(study, row, seed))]


def _hash(study: Study, row: Row, seed: int, runs_dir: Path) -> str:
    """As :func:`kd.studies.graph.overrides_hash`, of what the run and those that it reads were told."""
    run_dir = runs_dir / row.name / f"seed{seed}"
    read = [_hash(study, study.rows[name], number, runs_dir) for name, number in graph.needs(study, row, seed)]
    own = _told(study, row, seed, run_dir)[1] if (run_dir / record.FILE).is_file() else _said(study, row, seed)
    return graph.hashed(row.overrides if _same(own, _said(study, row, seed)) else own, read)


def notes(study: Study, frame: pd.DataFrame) -> list[str]:
    """Sentences on rows whose runs were told something else than the study says now; results of before cannot tell."""
    now = {name: graph.overrides_hash(study, row) for name, row in study.rows.items()}
    known = frame[frame["overrides_hash"].notna()]
    old = list(dict.fromkeys(known["row"][known["overrides_hash"] != known["row"].map(now)]))
    found = []
    if old:
        found.append(
            f"{'row' if len(old) == 1 else 'rows'} {', '.join(old)}: these results were made with other overrides than "
            f"study.yaml has now; once their runs are removed, `kd study {_called(study)}` makes them anew"
        )
    added = {word for text in frame["added_overrides"].dropna() for word in text.split("; ")}
    if words := ", ".join(sorted(added)):
        found.append(f"the runs were also told {words}, which study.yaml does not say")
    return found


def _called(study: Study) -> str:
    """What ``kd study`` understands: the name of one in experiments/, else its folder."""
    return study.name if study.folder.resolve().parent == Path("experiments").resolve() else str(study.folder)
