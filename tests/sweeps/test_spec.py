"""What the rows of a study may say: grids, several of them, seeds of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd.errors import KdError
from kd.sweeps import spec
from kd.sweeps.study import plan


def study(folder: Path, rows: str) -> spec.Study:
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(f"seeds: [0, 3]\noverrides: [data=fake]\nrows:\n{rows}")
    return spec.load(folder)


PAIRS = """
  teacher_{net}: {grid: {net: [resnet56, vgg13]}, overrides: ["model@student={net}"]}
  alone: {}
  kd_{teacher}_{net}:
    grid:
      - {teacher: resnet56, net: [resnet20, resnet8], lr: 0.05}
      - {teacher: vgg13, net: mobilenetv2, lr: 0.01}
    values: {family: one, lr: 0}
    overrides: ["model@student={net}", "recipe.optimizer.lr={lr}", "teacher.checkpoint={teacher_{teacher}}"]
"""


def test_a_list_of_grids_is_one_after_another(tmp_path: Path) -> None:
    found = study(tmp_path / "pairs", PAIRS)
    assert list(found.rows)[3:] == ["kd_resnet56_resnet20", "kd_resnet56_resnet8", "kd_vgg13_mobilenetv2"]
    row = found.rows["kd_vgg13_mobilenetv2"]
    assert row.overrides[1:] == ("model@student=mobilenetv2", "recipe.optimizer.lr=0.01",
                                 "teacher.checkpoint={teacher_vgg13}")  # fmt: skip
    assert row.values == {"family": "one", "teacher": "vgg13", "net": "mobilenetv2", "lr": 0.01}, "the grid's lr wins"
    assert found.rows["alone"].overrides == ("data=fake",)


@pytest.mark.parametrize("grid", ["[]", "{}", "{width: []}", "3", "[{width: 3}, 4]"])
def test_a_grid_without_values_is_refused(tmp_path: Path, grid: str) -> None:
    with pytest.raises(KdError, match=r"the grid of w must give each variable a value or a list of values"):
        study(tmp_path / "pairs", f"  w: {{grid: {grid}, overrides: []}}")


def test_a_seed_of_its_own_comes_after_that_of_the_study(tmp_path: Path) -> None:
    rows = '  first: {}\n  again: {overrides: ["seed=100{seed}", "teacher.checkpoint={first}"]}'
    jobs = {job.name: job for job in plan(study(tmp_path / "ban", rows), tmp_path, (), None, ())}
    seeds = [o for o in jobs["again/seed3"].overrides if o.startswith("seed=")]
    assert seeds == ["seed=3", "seed=1003"], "the last one wins in Hydra"
    assert f"teacher.checkpoint='{tmp_path}/first/seed3'" in jobs["again/seed3"].overrides, "paired by the study's seed"


def test_the_line_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(KdError, match=r"study\.yaml cannot be read: it is not valid YAML \(line 4\)"):
        study(tmp_path / "broken", "  again: {overrides: [seed=100{seed}]}")
