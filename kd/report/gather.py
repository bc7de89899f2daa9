"""Gather runs that belong to no study into rows that share all but the seed: a study without a claim. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from kd.errors import KdError
from kd.records import manifest, record, sources
from kd.records.manifest import SEEDS
from kd.report.alone import of_groups
from kd.report.frame import finished, metrics_of, table
from kd.report.run_row import of_run, seed_of
from kd.report.validation import EPOCH, monitored
from kd.studies.study import Comparison, Figure, Row, Study

CODE = "code=sha256:"
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")  # YAML takes 1e-05 for a word
# differ without being the question
PLACES = ("hydra.", "paths.", "name=", "teacher.checkpoint=", "student.checkpoint=")


@dataclass(frozen=True)
class Found:
    """A run that may not exist yet, and its overrides."""

    run_dir: Path
    overrides: tuple[str, ...]
    group: str  # runs of one group differ by the seed only
    name: str = ""  # what a run calls itself


def study_of(name: str, found: Sequence[Found], base: Path) -> tuple[Study, pd.DataFrame]:
    """Make a study with a row for each group, best first, and the frame of its runs; paths relative to ``base``."""
    found = _by_code(_by_teacher(found))
    labels = _labels(found)
    lines = []
    for run in found:
        row = labels[run.group]
        if (run.run_dir / record.FILE).is_file():
            lines.append(of_run(run.run_dir, row, base))
        else:
            lines.append({"row": row, "seed": seed_of(run.overrides), "status": "missing"})
    frame = table(lines)
    doubled = frame[frame.duplicated(["row", "seed"])]
    if len(doubled):
        row, seed = doubled.iloc[0][["row", "seed"]]
        raise KdError(f"{row}: there are two runs of seed {seed}; give one of them")
    _refuse_mixed(name, frame)
    values = {labels[run.group]: _values(labels[run.group]) for run in found}
    alone = {labels[a]: labels[b] for a, b in of_groups([(run.group, run.run_dir) for run in found]).items()}
    order, main = _best_first(frame), f"test/{metrics_of(frame)[0].name}"
    seeds = tuple(sorted(set(frame["seed"])))
    given = {row: tuple(frame[frame["row"] == row]["seed"]) for row in order}
    rows = {row: Row(row, (), row, given[row], alone=alone.get(row), values=values[row]) for row in order}
    study = Study(
        name=name,
        folder=base,
        question="",
        paper="",
        cost="",
        measure=main,
        epoch=EPOCH,
        rows=rows,
        seeds=seeds,
        comparisons={row: Comparison("over alone", row, alone[row], main) for row in order if row in alone},
        claim="",
        supported=(),
        figures=_figures(list(values.values()), main),
    )
    return study, frame


def _refuse_mixed(name: str, frame: pd.DataFrame) -> None:
    """Raise ``KdError`` for runs of tasks that measure other things: they stand in no one table."""
    done = finished(frame)
    mains = {row: metrics_of(part)[0].name for row, part in done.groupby("row", sort=False)}
    different = list(dict.fromkeys(mains.values()))
    if len(different) > 1:
        first, other = (next(row for row, main in mains.items() if main == m) for m in different[:2])
        raise KdError(
            f"{name} holds runs of different tasks: {first} is measured by {mains[first]}, {other} by {mains[other]}; "
            "give the runs of one task"
        )


def _best_first(frame: pd.DataFrame) -> list[str]:
    """Order the rows by validation; those without a finished run last, in the order of their runs."""
    measure, done = monitored(frame), finished(frame)
    rows = list(dict.fromkeys(frame["row"]))
    if measure.column not in done:
        return rows
    means = done.groupby("row", sort=False)[measure.column].mean().dropna()
    ranked = list(means.sort_values(ascending=measure.lower_is_better, kind="stable").index)
    return [*ranked, *(row for row in rows if row not in means.index)]


def read_sweep(directory: Path) -> tuple[Study, pd.DataFrame]:
    """Read a sweep's directory as a study without a claim, and the frame of its runs."""
    return study_of(directory.resolve().name, of_sweep(directory), directory)


def of_sweep(directory: Path) -> list[Found]:
    """List the jobs of a sweep, also those without a result."""
    there = manifest.read(directory)
    if not there.jobs:
        raise KdError(f"{directory} is a {there.kind} without jobs: none has begun yet, so there is nothing to report")
    return [_of_job(directory / job.name, job, there.kind == "optuna") for job in there.jobs.values()]


def _of_job(run_dir: Path, job: manifest.Job, searched: bool) -> Found:
    name = job.group  # as the table of the sweep names it
    # what was searched may have seventeen digits: all but a seed tells its rows apart
    overrides = (o for o in job.overrides if not SEEDS.match(o)) if searched else _distinguishing(job.overrides)
    return Found(run_dir, job.overrides, " ".join([*overrides, name]), name)


def of_run_dir(run_dir: Path) -> Found:
    """Describe a run by itself: it shares its group with runs of the same configuration and name."""
    found = record.read(run_dir)
    try:
        name = found["name"]
        return Found(run_dir, tuple(found["overrides"]), f"{name} {found['config_hash']}", name)
    except (KeyError, TypeError):
        raise record.broken(run_dir) from None


def _records(found: Sequence[Found]) -> list[dict[str, Any]]:
    return [record.read(run.run_dir) if (run.run_dir / record.FILE).is_file() else {} for run in found]


def _by_teacher(found: Sequence[Found]) -> list[Found]:
    """Give runs of one group that had other teachers in the same place a row of their own: they are others."""
    there = list(map(_teacher, _records(found)))
    seen: dict[tuple[str, str], set[str]] = {}
    for run, (place, what) in zip(found, there, strict=True):
        seen.setdefault((run.group, place), set()).add(what)
    return [
        _marked(run, what) if what and len(seen[run.group, place] - {""}) > 1 else run
        for run, (place, what) in zip(found, there, strict=True)
    ]


def _teacher(there: Mapping[str, Any]) -> tuple[str, str]:
    """Return where the teacher of a finished run was, and the fingerprint of its weights; "" for what is not known."""
    known = (there.get("weights_read") or {}).get("teacher.checkpoint") or ()
    path = str((there.get("teacher") or {}).get("checkpoint", ""))
    return path, "teacher=sha256:" + "+".join(map(str, known)) if known and path else ""


def _by_code(found: Sequence[Found]) -> list[Found]:
    """Tell runs of the user's own code apart by it where it was other code in others of them, whatever their values."""
    there = _records(found)
    mixed = sources.mixed(there)
    marks = [sources.fingerprint(one, mixed) for one in there]
    return [_marked(run, f"{CODE}{mark}") if mark else run for run, mark in zip(found, marks, strict=True)]


def _marked(run: Found, what: str) -> Found:
    return replace(run, group=f"{run.group} {what}", overrides=(*run.overrides, what))


def _distinguishing(overrides: Sequence[str]) -> list[str]:
    return [o for o in overrides if not SEEDS.match(o) and not o.lstrip("+").startswith(PLACES)]


def _labels(found: Sequence[Found]) -> dict[str, str]:
    """Label each group: by its name if unique, else by the overrides that not all have; equal labels get a number."""
    words_of = {run.group: [w.lstrip("+") for w in _distinguishing(run.overrides)] for run in found}
    names = {run.group: run.name for run in found}
    if len(words_of) == 1 and not any(names.values()):  # of a sweep over seeds alone nothing differs
        return dict.fromkeys(words_of, _own_name(found))
    common = set.intersection(*(set(words) for words in words_of.values())) if len(words_of) > 1 else set()
    keys = {w.partition("=")[0] for words in words_of.values() for w in words if w not in common}
    labels: dict[str, str] = {}
    for group, words in words_of.items():
        name = names[group]
        if name and list(names.values()).count(name) == 1:
            wanted = " ".join([name, *(w for w in words if w.startswith(CODE))])
        else:
            differing = (_short(w, keys) for w in words if w not in common)
            wanted = " ".join([*([name] if name else []), *differing]) or "default"
        label, number = wanted, 2
        while label in labels.values():
            label, number = f"{wanted} ({number})", number + 1
        labels[group] = label
    return labels


def _own_name(found: Sequence[Found]) -> str:
    """Return what the runs of one group call themselves, where they were given a name."""
    called = {str(there["name"]) for there in _records(found) if "config_hash" in there}
    name = called.pop() if len(called) == 1 else ""
    return "all seeds" if name in ("", "train") else name


def _short(word: str, keys: Collection[str]) -> str:
    """Shorten ``loss.kd.temperature=4`` to ``temperature=4`` where no other key ends like that."""
    key, equals, value = word.partition("=")
    end = key.rsplit(".", 1)[-1]
    return f"{end if [k.rsplit('.', 1)[-1] for k in keys].count(end) == 1 else key}{equals}{value}"


def _values(label: str) -> dict[str, Any]:
    """Read the numbers in a label: ``temperature=4`` → ``{"temperature": 4}``."""
    found: dict[str, Any] = {}
    for part in label.split(" "):
        key, equals, text = part.partition("=")
        if equals and NUMBER.fullmatch(text):
            found[key] = float(text) if set(text) & set(".eE") else int(text)
    return found


def _figures(values: Sequence[Mapping[str, Any]], measure: str) -> tuple[Figure, ...]:
    """Choose the figures: lines over a number that differs; lines and a map over two."""
    keys = [key for key in dict.fromkeys(k for v in values for k in v) if len({v[key] for v in values if key in v}) > 2]
    if not keys or len(keys) > 2:
        return ()
    if len(keys) == 1:
        return (Figure("lines", measure, keys[0]),)
    return Figure("lines", measure, keys[0], group=keys[1]), Figure("map", measure, keys[0], y=keys[1])
