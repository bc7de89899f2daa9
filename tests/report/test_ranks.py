"""Mean ranks of methods over pairs of teacher and student, read from a study's file and a made-up frame."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from kd.report import frame, ranks, tables
from kd.report.measures import Measure
from kd.report.report import build
from kd.studies import load

ACC = Measure("last/test/acc1")
STUDY = """
seeds: [0, 1]
rows:
  teacher_{teacher}: {grid: {teacher: [big, huge]}}
  kd_{teacher}_{net}:
    grid: &pairs [{teacher: big, net: [small, tiny], lr: 0.1}, {teacher: huge, net: small, lr: 0.2}]
    label: "{net}, soft targets of {teacher}"
    teacher: teacher_{teacher}
    overrides: [loss=kd]
  hint_{teacher}_{net}: {grid: *pairs, label: "{net}, hint of {teacher}", overrides: [loss=hint]}
  at_{teacher}_{net}: {grid: *pairs, overrides: [loss=at]}
  alone_{net}: {grid: {net: [small, tiny]}}
"""
PAIRS = (("big", "small"), ("big", "tiny"), ("huge", "small"))
LEVELS = {"kd": [5, 6, 5, 7, 9, 3], "hint": [4, 5, 7, 6, 8, 2], "at": [3, 4, 5, 5, 7, 1]}  # of six blocks


@pytest.fixture
def study(tmp_path: Path) -> load.Study:
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / load.STUDY).write_text(STUDY)
    return load.load_study(folder)


def runs_of(levels: dict[str, list[int]]) -> list[dict[str, object]]:
    blocks = [(pair, seed) for pair in PAIRS for seed in (0, 1)]
    return [
        {"row": f"{method}_{teacher}_{net}", "seed": seed, "status": "finished", "last/test/acc1": value / 10}
        for method, found in levels.items()
        for ((teacher, net), seed), value in zip(blocks, found, strict=True)
    ]


def test_a_row_of_a_grid_knows_its_template(study) -> None:
    assert study.rows["kd_big_tiny"].template == "kd_{teacher}_{net}"
    assert {row.template for row in study.rows.values() if row.name.startswith("alone")} == {"alone_{net}"}


def test_the_mean_rank_over_pairs(study) -> None:
    (found,) = ranks.over_pairs(study, frame.table(runs_of(LEVELS)), ACC)
    assert found.variables == ("net", "teacher")
    assert (found.combinations, found.blocks) == (3, 6)
    # kd is first but for the third block, which hint wins: there kd and at share the second place
    want = {
        "… soft targets of …": (5 * 1 + 2.5) / 6,
        "… hint of …": (5 * 2 + 1) / 6,
        "at_{teacher}_{net}": (5 * 3 + 2.5) / 6,
    }
    assert found.mean_ranks == pytest.approx(want)
    assert list(found.mean_ranks) == list(want)
    assert found.p == pytest.approx(scipy_stats.friedmanchisquare(*LEVELS.values()).pvalue)
    assert tables.rank_grid(found).rows[0] == ("… soft targets of …", "1.25", "6")


def test_a_block_without_one_of_its_runs_is_left_out(study) -> None:
    runs = runs_of(LEVELS)
    runs[2]["status"] = "failed"  # kd, big and tiny, seed 0: the third block
    (found,) = ranks.over_pairs(study, frame.table(runs), ACC)
    assert (found.combinations, found.blocks) == (3, 5)
    assert list(found.mean_ranks.values()) == [1, 2, 3]
    one_pair = [run for run in runs if str(run["row"]).endswith("big_small")]
    missing = [{"row": r["row"], "seed": r["seed"], "status": "missing"} for r in runs if r not in one_pair]
    assert ranks.over_pairs(study, frame.table(one_pair + missing), ACC) == []


def test_two_templates_are_not_ranked(study) -> None:
    two = {name: row for name, row in study.rows.items() if not name.startswith("at_")}
    assert ranks.over_pairs(replace(study, rows=two), frame.table(runs_of(LEVELS)), ACC) == []


def test_the_page_says_it(study, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("kd.report.report.draw", lambda *_: {})
    about = {"config_hash": "a", "epochs": 1, "monitor": "max val/acc1", "wall_clock_s": 1.0, "run": "x", "commit": "c"}
    text = build(study, frame.table([{**run, **about} for run in runs_of(LEVELS)]), None, tmp_path).paths["md"]
    page = text.read_text(encoding="utf-8")
    assert "| over all of net and teacher | mean rank | blocks |" in page
    p = scipy_stats.friedmanchisquare(*LEVELS.values()).pvalue
    assert np.isclose(p, float(page.partition("one of 3 combinations")[2].partition("p = ")[2][:5]), atol=5e-4)
