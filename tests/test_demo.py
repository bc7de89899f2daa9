"""``kd demo`` end to end with tiny runs: the study engine's runs, and three tables."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from kd.cli import demo
from kd.studies import load

RUNS = 2 * 8  # two seeds of a teacher and seven students


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``short(teacher=[…])``: the demo is its study with two epochs a run, and these overrides in a row."""
    monkeypatch.setenv("KD_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "shipped" / "demo"
    shutil.copytree(demo.STUDY, folder)
    node = yaml.safe_load((folder / load.STUDY).read_text())
    monkeypatch.setattr(demo, "STUDY", folder)

    def write(**added: list[str]) -> None:
        for name, row in node["rows"].items():
            row["overrides"] = [*row["overrides"], "recipe.epochs=2", *added.get(name, ())]
        (folder / load.STUDY).write_text(yaml.safe_dump(node, sort_keys=False))

    return write


@pytest.mark.slow
def test_prints_a_table_and_a_figure_for_each_claim_and_again_without_running(kd, tmp_path, short) -> None:
    short()
    said = kd("demo", "seeds=2", "jobs=2", "out=demo")
    assert said.code == 0, said.err
    assert f"study demo: {RUNS} runs in {tmp_path / 'demo'}: 0 finished, {RUNS} to run" in said.out
    tables = said.out[said.out.index("\n1  ") :]
    assert tables.count("95\u00a0% interval") == tables.count("published: ") == tables.count("figure: ") == 3
    for figure in re.findall(r"figure:\s+(\S+)", tables):
        assert Path(figure).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(list((tmp_path / "demo").rglob("result.json"))) == RUNS
    for word in ("Soft targets with 3 % of the labels", "A class never seen", "Invariance transferred"):
        assert word in tables
    assert tables.count("bias set on val") == 2

    again = kd("demo", "seeds=2", "out=demo")
    assert again.code == 0, again.err
    assert f"{RUNS} finished, 0 to run" in again.out
    assert again.out[again.out.index("\n1  ") :].splitlines()[:-1] == tables.splitlines()[:-1], "but for the time"
    assert not (demo.STUDY / "results.csv").exists()


@pytest.mark.slow
def test_a_run_that_fails_is_said_with_its_reason(kd, tmp_path, short) -> None:
    short(teacher=["recipe.optimizer.lr=1e30"])
    said = kd("demo", "seeds=2")
    assert said.code == 1
    # of the students only those on hard labels have no teacher
    assert f"kd: {RUNS - 6} of {RUNS} jobs have no result (the same command again runs what is missing):" in said.err
    assert "kd: teacher seed=0: failed: the loss" in said.err
    assert "kd: full_soft seed=1: missing: not started: teacher seed=1 did not finish" in said.err
    assert "Traceback" not in said.err
    assert (tmp_path / "runs" / "study_demo" / "few_hard" / "seed1" / "result.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["seeds=1"], "seeds = 1 is not allowed: it must be a whole number, 2 or more"),
        (["jobs=x"], "jobs = x is not allowed"),
        (["jobs=0"], "jobs = 0 is not allowed: it must be a whole number, 1 to "),
        (["sed=3"], "sed=3 is not understood: kd demo takes out=…, seeds=…, jobs=…"),
        (["out=full"], "out = full is not empty and holds no demo: give a new directory"),
        (["out=full/file/x"], "out = full/file/x cannot be written"),
    ],
)
def test_bad_input(kd, tmp_path, arguments, sentence) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    said = kd("demo", *arguments)
    assert said.code == 1
    assert sentence in said.err


def test_the_rows_of_the_tables_are_those_of_the_study() -> None:
    study = load.load_study(demo.STUDY)
    assert {row for claim in demo.CLAIMS for row, _ in claim.lines} == study.rows.keys()
    for claim in demo.CLAIMS:
        compared = study.comparisons[claim.comparison]
        assert {(compared.row, compared.measure), (compared.than, compared.measure)} <= {
            (row, measures[0]) for row, measures in claim.lines
        }
