"""Rank the methods over pairs of families and seeds: mean ranks, Friedman's test, Nemenyi's critical difference.

``python experiments/methods_fashion/ranks.py`` reads ``results.csv`` and prints the table of the README. Nemenyi (1963)
after Demšar, "Statistical Comparisons of Classifiers over Multiple Data Sets" (JMLR 2006), section 3.2.2.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import studentized_range

from kd.report.stats import ranks

MEASURE = "last/test/acc1"
LABELS = ("alone", "faster", "smoothing", "longer")  # rows without a teacher, the same in both pairs
PAIRS = ("within", "across")


def critical_difference(methods: int, blocks: int, level: float = 0.05) -> float:
    """Return the difference of two mean ranks that is significant at ``level``, for all pairs together."""
    q = studentized_range.ppf(1 - level, methods, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(methods * (methods + 1) / (6 * blocks)))


def matrix(frame: pd.DataFrame, pairs: tuple[str, ...]) -> pd.DataFrame:
    """Return accuracies, methods × (pair, seed)."""
    table = frame.pivot(index="row", columns="seed", values=MEASURE)
    methods = [row.removeprefix("within_") for row in table.index if row.startswith("within_")]
    parts = []
    for pair in pairs:
        part = table.loc[[*LABELS, *(f"{pair}_{method}" for method in methods)]]
        parts.append(part.set_axis([*LABELS, *methods]).add_prefix(f"{pair} "))
    return pd.concat(parts, axis=1)


def main() -> None:
    """Print mean ranks over both pairs, and over each."""
    frame = pd.read_csv(Path(__file__).with_name("results.csv"))
    found = {}
    for name, pairs in {"both": PAIRS, "within": PAIRS[:1], "across": PAIRS[1:]}.items():
        accuracies = matrix(frame, pairs)
        mean_ranks, p = ranks(accuracies.to_numpy(), lower_is_better=False)
        found[name] = pd.Series(mean_ranks, accuracies.index)
        blocks = accuracies.shape[1]
        difference = critical_difference(len(accuracies), blocks)
        print(f"{name}: {blocks} blocks, Friedman p = {p:.1g}, critical difference {difference:.2f} ranks (5 %)")
    print("\n| | mean rank | within | across |\n| :-- | --: | --: | --: |")
    for method, row in pd.DataFrame(found).sort_values("both").iterrows():
        print(f"| {method} | {row['both']:.2f} | {row['within']:.2f} | {row['across']:.2f} |")


if __name__ == "__main__":
    main()
