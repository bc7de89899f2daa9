"""Print what the paper reports, averages over tasks: accuracy, change from the full recipe, and retention.

``python experiments/distilbert_small/average.py [RESULTS.csv]`` reads the ``results.csv`` beside it. Differences and
ratios are paired over seeds, with the 95 % interval of Student's t; the average is that of TREC and Banking77.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from kd.report import stats
from kd.report.frame import read_results, values
from kd.studies.load import load_study

HERE = Path(__file__).resolve().parent
TASKS = ("trec", "banking")
ARMS = ("adapted", "full", "no_soft", "no_cosine", "no_mlm", "random", "copied")
PUBLISHED = {"no_soft": -2.96, "no_cosine": -1.46, "no_mlm": -0.31, "random": -3.69}  # points of the GLUE average
RETENTION = 77.0 / 79.5


def average(frame: pd.DataFrame, arm: str) -> np.ndarray:
    """Mean accuracy of the tasks, a number a seed that has them all, as fractions."""
    tasks = pd.concat([values(frame, f"{task}_{arm}", "last/test/acc1") for task in TASKS], axis=1).dropna()
    return tasks.mean(axis=1).to_numpy()


def shown(interval: stats.Interval) -> str:
    """Write a difference in points, or a ratio in percent, with its interval."""
    low, high = interval.headline or (np.nan, np.nan)
    return f"{100 * interval.estimate:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def main(file: Path) -> None:
    """Print the table, a line a row of stage 1."""
    study = load_study(HERE)
    frame = read_results(file, study)
    found = {arm: average(frame, arm) for arm in ARMS}
    print("| stage 1 | n | average, % | − full, points | published | of the teacher, % |")
    print("| :-- | --: | --: | --: | --: | --: |")
    for arm, own in found.items():
        change = shown(stats.difference(own, found["full"])) if arm not in ("adapted", "full") else "–"
        kept = shown(stats.mean(own / found["adapted"])).replace("+", "") if arm != "adapted" else "–"
        published = f"{PUBLISHED[arm]:+.2f}" if arm in PUBLISHED else "–"
        spread = f"{100 * own.mean():.2f} ± {100 * own.std(ddof=1):.2f}"
        print(f"| {study.rows[arm].label} | {len(own)} | {spread} | {change} | {published} | {kept} |")
    print(f"\npublished retention: {100 * RETENTION:.1f} % of the GLUE average")
    sizes = [int(values(frame, f"trec_{arm}", "student/parameters").iloc[0]) for arm in ("full", "adapted")]
    print(f"parameters of the classifiers: {sizes[0]:,} of {sizes[1]:,}, {100 * (1 - sizes[0] / sizes[1]):.0f} % fewer")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results.csv")
