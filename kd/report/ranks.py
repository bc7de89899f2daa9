"""Compute mean ranks: of rows over their seeds, and of methods over several pairs of teacher and student. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from kd.report import stats
from kd.report.claims import aligned, label_of
from kd.report.frame import finished, values
from kd.report.measures import Measure
from kd.studies.study import Study

Combination = tuple[tuple[str, Any], ...]
"""The grid variables in a row's name with their values: ``(("net", "vgg8"), ("teacher", "vgg13"))``."""


def over_seeds(study: Study, frame: pd.DataFrame, measure: Measure) -> tuple[dict[str, float], float | None]:
    """Rank the rows that train one and the same student over seeds; none for fewer than three rows."""
    teachers = {row.teacher for row in study.rows.values()}
    rows = [name for name in study.rows if name not in teachers and len(values(frame, name, measure.column)) > 1]
    if len(rows) < 3 or "student/parameters" not in frame:
        return {}, None
    students = finished(frame)[finished(frame)["row"].isin(rows)]["student/parameters"]
    matrix = np.stack(aligned(study, frame, [(name, measure.column) for name in rows]))
    if students.nunique() != 1 or matrix.shape[1] < 2:
        return {}, None
    mean_rank, p = stats.ranks(matrix, measure.lower_is_better)
    return dict(zip(rows, mean_rank.tolist(), strict=True)), p


@dataclass(frozen=True)
class OverPairs:
    """Mean ranks of rows' templates (label → mean rank, best first), each ranking among the runs of one block.

    A block is one combination of ``variables`` and one seed, of which every template has a run; ``p``: Friedman's.
    """

    variables: tuple[str, ...]
    mean_ranks: Mapping[str, float]
    combinations: int
    blocks: int
    p: float | None


def over_pairs(study: Study, frame: pd.DataFrame, measure: Measure) -> list[OverPairs]:
    """Rank each three or more templates that have the same two or more combinations of values."""
    groups: dict[frozenset[Combination], dict[str, dict[Combination, str]]] = {}
    for template, rows in _templates(study).items():
        groups.setdefault(frozenset(rows), {})[template] = rows
    found = [_ranked(study, frame, measure, group) for key, group in groups.items() if len(key) > 1 and len(group) > 2]
    return [ranked for ranked in found if ranked is not None]


def _templates(study: Study) -> dict[str, dict[Combination, str]]:
    """Map template → combination → row, without the templates of teachers."""
    teachers = {row.teacher for row in study.rows.values()}
    found: dict[str, dict[Combination, str]] = {}
    for name, row in study.rows.items():
        if row.template:
            variables = sorted(set(re.findall(r"\{(\w+)\}", row.template)))
            combination = tuple((v, row.values[v]) for v in variables if v in row.values)
            found.setdefault(row.template, {})[combination] = name
    return {template: rows for template, rows in found.items() if not teachers & set(rows.values())}


def _ranked(
    study: Study, frame: pd.DataFrame, measure: Measure, group: Mapping[str, Mapping[Combination, str]]
) -> OverPairs | None:
    combinations = list(next(iter(group.values())))
    parts = []
    for combination in combinations:
        wanted = [(rows[combination], measure.column) for rows in group.values()]
        parts.append(np.stack(aligned(study, frame, wanted)))
    parts = [part for part in parts if part.shape[1]]
    if len(parts) < 2:
        return None
    matrix = np.concatenate(parts, axis=1)
    mean_ranks, p = stats.ranks(matrix, measure.lower_is_better)
    labels = [_label(study, template, list(rows.values())) for template, rows in group.items()]
    labels = labels if len(set(labels)) == len(labels) else list(group)
    order = np.argsort(mean_ranks, kind="stable")
    ranked = {labels[i]: float(mean_ranks[i]) for i in order}
    return OverPairs(tuple(name for name, _ in combinations[0]), ranked, len(parts), matrix.shape[1], p)


def _label(study: Study, template: str, rows: list[str]) -> str:
    """Label a template by what its rows' labels share, ``…`` for the words that differ: ``… soft targets of …``."""
    words = [label_of(study, row).split() for row in rows]
    if len({len(w) for w in words}) > 1:
        return template
    shared = [column[0] if len(set(column)) == 1 else "…" for column in zip(*words, strict=True)]
    return template if set(shared) == {"…"} else " ".join(shared)
