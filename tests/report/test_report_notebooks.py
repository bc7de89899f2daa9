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

pytestmark = pytest.mark.slow

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def executed(name: str, folder: Path, first: str = "") -> tuple[str, int]:
    """What a notebook says, and how many pictures it shows. ``first``: code that runs before its own."""
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join(shown), sum("image/png" in output.get("data", {}) for output in outputs)


def test_an_ablation_is_read(write, tmp_path, monkeypatch) -> None:
    sweep, jobs = tmp_path / "runs" / "sweep", {}
    for t in (1, 2, 4):
        for seed in (0, 1, 2):
            name = f"T={t},seed={seed}"
            jobs[name] = Job(name, "", ("loss=[ce,kd]", f"loss.kd.temperature={t}", f"seed={seed}"))
            write(sweep / name, seed, 0.9 + 0.01 * t + 0.001 * seed * t)
    manifest.write(sweep, Manifest("sweep", "sweep", jobs))
    write(sweep / "T=4,seed=2", 2, 0.9, status="failed")
    monkeypatch.setenv("KD_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    said, pictures = executed("02_ablation.ipynb", tmp_path)
    assert "8 of 9 runs" in said
    assert "minus temperature=1" in said
    differences = said.split("minus temperature=1")[1].splitlines()
    assert [line.split()[:2] for line in differences[1:3]] == [
        ["temperature=4", "3.15"],  # of the two seeds that are finished
        ["temperature=2", "1.10"],
    ]
    assert pictures == 2


def test_a_reproduction_is_read(study, runs, tmp_path, monkeypatch) -> None:
    small = replace(study, rows={n: r for n, r in study.rows.items() if not r.values}, figures=())
    small.folder.mkdir(parents=True)
    frame.write_results(small.folder / "results.csv", small, frame.of_study(small, runs))
    (tmp_path / "study.pickle").write_bytes(pickle.dumps(small))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    first = (
        "import pickle\nfrom pathlib import Path\n\nfrom kd.studies import load\n\n"
        "load.load_study = lambda name: pickle.loads(Path('study.pickle').read_bytes())"
    )
    said, pictures = executed("03_reproduction.ipynb", tmp_path, first)
    for part in (
        "supported",
        small.claim,
        small.published.source,
        "not comparable",
        "74.0 ± 2.5 (n = 3)",
        "14 of 16 runs",
    ):
        assert part in said
    assert pictures == 1
