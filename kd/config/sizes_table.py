"""The table of networks and their sizes that ``kd models`` lists: read without torch."""

from __future__ import annotations

import csv
from pathlib import Path

TABLE = Path(__file__).parents[1] / "models" / "network_sizes.csv"
COLUMNS = ("library", "name", "parameters", "macs", "input", "classes", "weights")
MOST = 100_000_000  # parameters of the networks whose MACs are counted: a pass of the largest takes seconds


def read() -> list[dict[str, str]]:
    """Return the rows of the table, by parameters; see :mod:`kd.models.network_sizes`."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
