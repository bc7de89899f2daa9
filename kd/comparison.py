"""A table of arms over seeds: mean ± std, the paired difference with its interval, the published number, a figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Row:
    """One arm: column name → one number a seed, in the same order of seeds in every row."""

    label: str
    values: dict[str, np.ndarray]


@dataclass(frozen=True)
class Table:
    """Rows, and one comparison: row ``compare[0]`` minus row ``compare[1]`` in the column ``measure``."""

    key: str
    title: str
    rows: list[Row]
    compare: tuple[int, int]
    measure: str
    published: str

    def difference(self) -> tuple[float, float, float]:
        """The mean paired difference over seeds and its 95 % interval (Student's t)."""
        better, worse = (self.rows[i].values[self.measure] for i in self.compare)
        return paired_interval(better, worse)

    def show(self, out: Path) -> None:
        """Print the table, the difference, the published number, and where the figure was saved."""
        from rich.console import Console
        from rich.table import Table as RichTable

        columns = list(self.rows[0].values)
        seeds = len(self.rows[0].values[columns[0]])
        table = RichTable()
        table.add_column("")
        for name in columns:
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(row.label, *(f"{v.mean():.1f} ± {v.std(ddof=1):.1f}" for v in row.values.values()))
        console = Console(width=100, highlight=False)
        console.print(f"\n{self.title} (mean ± std, {seeds} seeds)", style="bold")
        console.print(table)
        mean, low, high = self.difference()
        better, worse = (self.rows[i].label for i in self.compare)
        console.print(
            f"{better} − {worse}: {mean:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}", soft_wrap=True
        )
        console.print(f"published: {self.published}", soft_wrap=True)
        console.print(f"figure:    {self.figure(out / f'{self.key}.png')}", soft_wrap=True)

    def figure(self, path: Path) -> Path:
        """Bars of the measured column with a dot for every seed."""
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt

        height = 1.4 + 0.5 * len(self.rows)
        figure, axes = plt.subplots(figsize=(7.5, height), layout="constrained")
        for position, row in enumerate(reversed(self.rows)):
            values = row.values[self.measure]
            marked = len(self.rows) - 1 - position == self.compare[0]
            colour = "#2a6f97" if marked else "#a9bcc9"
            axes.barh(position, values.mean(), color=colour, height=0.6, zorder=1)
            spread = np.linspace(-0.16, 0.16, len(values))
            axes.scatter(values, position + spread, s=14, color="#1b1b1b", zorder=2)
            axes.text(1.5, position, f"{values.mean():.1f}", va="center", color="white" if marked else "#1b1b1b")
        axes.set_yticks(range(len(self.rows)), [row.label for row in reversed(self.rows)])
        axes.set_xlim(0, 102)
        axes.set_xlabel(f"{self.measure}   (bar: mean, dots: seeds)")
        axes.set_title(self.title.strip(), loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)
        plt.close(figure)
        return path.resolve()


def paired_interval(a: np.ndarray, b: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of ``a − b`` over pairs and its interval by Student's t. Needs two pairs or more."""
    from scipy import stats

    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if len(differences) < 2:
        raise ValueError("an interval needs two pairs or more")
    mean = float(differences.mean())
    half = float(stats.t.ppf(0.5 + level / 2, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5)
    return mean, mean - half, mean + half
