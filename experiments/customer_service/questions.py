"""The questions of the study: those that have labels, and those of a log that has none.

    python experiments/customer_service/questions.py

Banking77's 10,003 training questions (``banking77/train.csv`` in ``KD_DATA``), without repetitions, are shuffled once;
3,000 of them stand for the log of a month. Written to ``runs/customer_service`` (below ``KD_RUNS``, where that is set):
``labelled.csv``, ``log.csv`` (a column ``prompt``, no labels), and ``log_gold.csv``, the same with the labels of the
set, with which ``flagship.py`` compares the API's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pandas as pd

LOG = 3000
FOLDER = Path(os.environ.get("KD_RUNS", "runs")) / "customer_service"


def main() -> int:
    """Write the three files. Returns the exit code."""
    source = Path(os.environ.get("KD_DATA", "data")) / "banking77" / "train.csv"
    if not source.is_file():
        print(f"{source} is not there: kd train data=banking77 says where it comes from", file=sys.stderr)
        return 1
    table = pd.read_csv(source, dtype=str).drop_duplicates("text").sample(frac=1, random_state=0)
    log, labelled = table.iloc[:LOG], table.iloc[LOG:]
    FOLDER.mkdir(parents=True, exist_ok=True)
    labelled.to_csv(FOLDER / "labelled.csv", index=False)
    log.to_csv(FOLDER / "log_gold.csv", index=False)
    log[["text"]].rename(columns={"text": "prompt"}).to_csv(FOLDER / "log.csv", index=False)
    print(f"{FOLDER}: {len(labelled):,} questions with labels, {len(log):,} without")
    return 0


if __name__ == "__main__":
    sys.exit(main())
