"""The notebooks that read sweeps and studies run from top to bottom on made-up results."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from kd.records import manifest
from kd.records.manifest import Job, Manifest
from kd.report import frame
from tests.notebooks import NOTEBOOKS, Kernel, pictures, text_of

pytestmark = pytest.mark.slow


def executed(
    kernel: Kernel, which: int, folder: Path, first: str = "", last: str = "", **given: str
) -> tuple[str, int]:
    """What a notebook says, and how many pictures it shows. ``first``, ``last``: code that runs around its own."""
    notebook = nbformat.read(NOTEBOOKS[which], as_version=4)
    cells = [nbformat.v4.new_code_cell(code) for code in (first, last)]
    notebook.cells = [cells[0], *notebook.cells, cells[1]]
    code = kernel.execute(notebook, folder, **given)
    return "\n".join(map(text_of, code)), pictures(code)


def test_an_ablation_is_read(kernel, write, tmp_path) -> None:
    sweep, jobs = tmp_path / "runs" / "sweep", {}
    for t in (1, 2, 4):
        for seed in (0, 1, 2):
            name = f"T={t},seed={seed}"
            jobs[name] = Job(name, "", ("loss=[ce,kd]", f"loss.kd.temperature={t}", f"seed={seed}"))
            write(sweep / name, seed, 0.9 + 0.01 * t + 0.001 * seed * t)
    manifest.write(sweep, Manifest("sweep", "sweep", jobs))
    write(sweep / "T=4,seed=2", 2, 0.9, status="failed")
    said, shown = executed(kernel, 1, tmp_path, KD_RUNS=str(tmp_path / "runs"))
    assert "8 of 9 runs" in said
    assert "minus temperature=1" in said
    differences = said.split("minus temperature=1")[1].splitlines()
    assert [line.split()[:2] for line in differences[1:3]] == [
        ["temperature=4", "3.15"],  # of the two seeds that are finished
        ["temperature=2", "1.10"],
    ]
    assert shown == 2


def test_a_reproduction_is_read(kernel, study, runs, tmp_path) -> None:
    small = replace(study, rows={n: r for n, r in study.rows.items() if not r.values}, figures=())
    small.folder.mkdir(parents=True)
    frame.write_results(small.folder / "results.csv", small, frame.of_study(small, runs))
    (tmp_path / "study.pickle").write_bytes(pickle.dumps(small))
    first = (
        "import pickle\nfrom pathlib import Path\n\nfrom kd.studies import load\n\n"
        "original, load.load_study = load.load_study, lambda name: pickle.loads(Path('study.pickle').read_bytes())"
    )
    said, shown = executed(kernel, 2, tmp_path, first, "load.load_study = original")
    for part in (
        "supported",
        small.claim,
        small.published.source,
        "not comparable",
        "74.0 ± 2.5 (n = 3)",
        "14 of 16 runs",
    ):
        assert part in said
    assert shown == 1
