"""Tell what the design of a study can show, before its runs: spread, seeds, the smallest detectable effect. No torch.

The test behind it is the two-sided paired t-test at 5 % with a power of 80 % (:func:`kd.report.stats.detectable`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from kd.errors import KdError
from kd.report import stats
from kd.report.claims import compare_one, is_with_itself, show_change, unit_of
from kd.report.console import print_table
from kd.report.measures import Measure
from kd.report.tables import NOTHING
from kd.studies.study import STUDY, Comparison, Study

POWER = f"two-sided paired t-test at 5 %, power {100 * stats.POWER:.0f} %"


@dataclass(frozen=True)
class Design:
    """What one comparison can show with ``n`` pairs.

    ``observed``: the spread of the paired differences in ``results.csv``, None without results; it wins over the
    comparison's own ``pilot``.
    """

    comparison: Comparison
    n: int
    observed: float | None = None

    @property
    def spread(self) -> float | None:
        """Return the observed spread, else that of the pilot; None where neither is known."""
        return self.comparison.pilot if self.observed is None else self.observed

    @property
    def detectable(self) -> float | None:
        """Return the smallest difference that is detectable; None where no spread is known, infinity for one pair."""
        if self.n < 2:
            return np.inf
        return None if self.spread is None else self.spread * stats.detectable(self.n)

    @property
    def is_enough(self) -> bool:
        """Tell whether the smallest effect of interest is known to be detectable."""
        sesoi, detectable = self.comparison.sesoi, self.detectable
        return sesoi is not None and detectable is not None and detectable <= sesoi

    @property
    def lack(self) -> str:
        """Say why it is not."""
        if self.n < 2:
            return "with one seed a row nothing is detectable"
        if self.comparison.sesoi is None:
            return "it has no sesoi"
        if self.spread is None:
            return f"no pilot gives the spread, of which {self.n} seeds detect {stats.detectable(self.n):.2f} times"
        return (
            f"sesoi {self.size(self.comparison.sesoi)}, detectable {self.size(self.detectable)} with {self.n} seeds"
            f" of spread {self.size(self.spread)}"
        )

    def size(self, value: float | None) -> str:
        """Write the size of a difference with its unit; ``–`` for None."""
        if value is None or np.isinf(value):
            return NOTHING
        measure = Measure(self.comparison.measure)
        return show_change(self.comparison, measure, value).lstrip("+") + unit_of(self.comparison, measure)


def designs(study: Study, frame: pd.DataFrame | None = None) -> dict[str, Design]:
    """Describe the design of every comparison; ``frame``: results of the study, where there are any."""
    return {
        name: Design(comparison, _pairs(study, comparison), _observed(study, comparison, frame))
        for name, comparison in study.comparisons.items()
    }


def _pairs(study: Study, comparison: Comparison) -> int:
    """Count the seeds that all rows of a comparison have; a row of one seed stands beside every one."""
    names = dict.fromkeys(name for name in (comparison.row, comparison.than, comparison.share_of) if name)
    seeds = [set(study.rows[name].seeds or study.seeds) for name in names]
    several = [found for found in seeds if len(found) > 1]
    return len(set.intersection(*several)) if several else 1


def _observed(study: Study, comparison: Comparison, frame: pd.DataFrame | None) -> float | None:
    if frame is None or is_with_itself(comparison):
        return None
    try:
        return compare_one(study, frame, comparison, None).interval.spread
    except KdError:  # a measure that the study has got since these results
        return None


def refuse_blind(study: Study, found: dict[str, Design]) -> None:
    """Raise ``KdError`` where a condition's smallest effect of interest is not known to be detectable.

    A study that says ``exploratory: true`` is let through, and its report says so.
    """
    if study.exploratory:
        return
    wanted = dict.fromkeys(condition.comparison for condition in study.supported)
    lacking = [f"{name}: {found[name].lack}" for name in wanted if not found[name].is_enough]
    if lacking:
        raise KdError(
            f"{study.folder / STUDY}: the design is not known to show the smallest effect of interest ({POWER}): "
            f"{'; '.join(lacking)}. Give sesoi and pilot, plan more seeds, or say exploratory: true"
        )


def show(study: Study, found: dict[str, Design]) -> None:
    """Print a line for each comparison: smallest effect of interest, spreads, seeds, detectable effect."""
    if not found:
        return
    conditions = {condition.comparison for condition in study.supported}
    rows = [_line(name, design, name in conditions) for name, design in found.items()]
    head = ["", "sesoi", "pilot spread", "observed spread", "n", "detectable", "enough"]
    kind = " (exploratory)" if study.exploratory else ""
    print_table(f"{study.name}: what the design can show{kind}", head, rows)
    print(f"detectable: {POWER}, from the observed spread, else that of the pilot; ×: times the spread")


def _line(name: str, design: Design, is_condition: bool) -> list[str]:
    comparison = design.comparison
    detectable = design.size(design.detectable)
    if design.detectable is None:
        detectable = f"{stats.detectable(design.n):.2f} ×"
    enough = NOTHING if comparison.sesoi is None and not is_condition else "yes" if design.is_enough else "no"
    spreads = [design.size(comparison.pilot), design.size(design.observed)]
    return [name, design.size(comparison.sesoi), *spreads, str(design.n), detectable, enough]
