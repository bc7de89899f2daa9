"""Every notebook is kept without what it printed; 01 runs on fresh runs, 04 to 08 train (02, 03: see tests/report)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest

from tests.notebooks import NOTEBOOKS, Kernel, pictures, text_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher's run and a distilled one, two epochs each."""
    from kd.config.compose import checked
    from kd.run.train import train

    folder = tmp_path_factory.mktemp("runs")
    common = ["recipe.epochs=2", "hardware=cpu"]
    distilled = [f"teacher.checkpoint={folder / '1_teacher'}", "loss=[ce,kd]", "name=distilled", "seed=3", *common]
    arms = {"1_teacher": ["model@student=mlp_teacher", "name=big", *common], "2_distilled": distilled}
    for name, overrides in arms.items():
        (folder / name).mkdir()
        train(checked(overrides), folder / name, overrides)
    return folder


def test_there_are_notebooks() -> None:
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{n:02}_" for n in range(1, len(NOTEBOOKS) + 1)]
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
        assert cell.metadata == {}


def executed(kernel: Kernel, path: Path, folder: Path, **environment: str) -> list[nbformat.NotebookNode]:
    """The code cells of a notebook after it ran in a folder; two epochs each."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = re.sub(r"(epochs)=\d+", r"\1=2", cell.source)  # time is all that they cost
    return kernel.execute(notebook, folder, **environment)


def test_runs_are_read(kernel: Kernel, runs: Path, tmp_path: Path) -> None:
    code = executed(kernel, NOTEBOOKS[0], tmp_path, KD_RUNS=str(runs))
    assert "2 of 2 runs" in "\n".join(map(text_of, code))
    tables = [text_of(cell) for cell in code if "retention" in cell.source]
    assert any("1_teacher" in t and "2_distilled" in t and "ce+kd" in t for t in tables)


def test_a_method_is_added(kernel: Kernel, tmp_path: Path) -> None:
    code = executed(kernel, NOTEBOOKS[3], tmp_path)
    said = "\n".join(map(text_of, code))
    assert "as NumPy says: 0.952952" in said
    assert "9/9" in said
    rows = re.findall(r"^(loss=\S+) +(0\.\d+) +(0\.\d+) +3 *$", text_of(code[-1]), re.MULTILINE)
    assert [name for name, *_ in rows[:3]] == ["loss=[ce,correlation]", "loss=[ce,kd]", "loss=[ce]"]
    assert pictures(code) == 1
    (run,) = tmp_path.glob("my_method_*/sweep/loss-ce+correlation_seed-2")
    record = json.loads((run / "result.json").read_text())
    assert {"ce", "correlation"} < set(record["student"]["last"]["train"])


def test_the_loop_is_owned_from_outside(kernel: Kernel, tmp_path: Path) -> None:
    code = executed(kernel, NOTEBOOKS[4], tmp_path)
    (folder,) = tmp_path.glob("own_loop_*")
    records = {run.parent.name: json.loads(run.read_text()) for run in folder.glob("*/result.json")}
    assert set(records) == {"teacher", "simkd", "crd", "crd_on", "mutual", "from_the_peer"}
    assert records["simkd"]["student"]["parameters"] > records["crd"]["student"]["parameters"]  # the teacher's head
    assert records["simkd"]["protocol"]["monitor"] == "val/acc1"
    assert {"ce", "kd", "my_crd"} < set(records["crd_on"]["student"]["last"]["train"])
    assert {"peer/ce", "peer/kd"} < set(records["mutual"]["student"]["last"]["train"])
    assert records["from_the_peer"]["teacher"]["parameters"] == 64 * 64 + 64 + 64 * 10 + 10
    assert len(list(folder.glob("sweep/*/result.json"))) == 2
    assert "'my_crd.student_bank': (" in "\n".join(map(text_of, code))
    methods = [cell.source for cell in code if cell.source.startswith("%%writefile") and ".py" in cell.source[:30]]
    assert len(methods) == 3
    assert not re.findall(r"(?:self|setup|batch|step|student|teacher)\._[a-z]", "".join(methods))


def test_the_python_api_is_shown(kernel: Kernel, tmp_path: Path) -> None:
    code = executed(kernel, NOTEBOOKS[5], tmp_path)
    (folder,) = tmp_path.glob("from_python_*")
    assert {path.name for path in folder.iterdir()} >= {"run", "teacher", "distilled", "mydata.py"}
    assert "val/agreement" in "\n".join(map(text_of, code))
    assert "'train': 900" in text_of(code[-1])


def test_sentences_and_a_language_model_are_distilled(kernel: Kernel, tmp_path: Path) -> None:
    code = executed(kernel, NOTEBOOKS[6], tmp_path)
    (folder,) = tmp_path.glob("text_*")
    records = {run.parent.name: json.loads(run.read_text())["student"] for run in folder.glob("*/result.json")}
    assert set(records) == {"classifier", "small_classifier", "writer", "small_writer"}
    assert records["small_classifier"]["parameters"] < records["classifier"]["parameters"]
    assert records["small_writer"]["parameters"] < records["writer"]["parameters"]
    assert 0 < records["small_writer"]["last"]["train"]["own_text"] < 1
    said = "\n".join(map(text_of, code))
    assert said.count(" -> ") == 2  # classified by plain transformers
    assert "Bank:" in text_of(code[-2])


def test_a_decision_is_made(kernel: Kernel, tmp_path: Path) -> None:
    code = executed(kernel, NOTEBOOKS[7], tmp_path)
    (folder,) = tmp_path.glob("decision_*")
    said = "\n".join(map(text_of, code))
    assert "3,420" in said  # saved a year by the assistant's student
    assert "label these" in said  # of two columns without labels
    decision = json.loads((folder / "decision.json").read_text())
    assert "on 719 examples" in decision["sentence"]
    page = (folder / "decision.html").read_text()
    assert "97" in page
    assert json.loads((folder / "student" / "bench.json").read_text())
