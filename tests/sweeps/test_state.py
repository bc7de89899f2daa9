"""What a run directory holds, and when it is another run's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kd import record
from kd.app import checked
from kd.errors import KdError
from kd.sweeps.state import refuse_another


def test_the_same_experiment_of_another_teacher_seed_is_another_run(tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / f"teacher{seed}").mkdir()
        content = {"schema": 1, "status": "finished", "config_hash": "a" * 12, "seed": seed}
        (tmp_path / f"teacher{seed}" / "result.json").write_text(json.dumps(content))
    configs = [checked(["loss=[ce,kd]", f"teacher.checkpoint={tmp_path}/teacher{seed}"]) for seed in (0, 1)]
    assert record.config_hash(configs[0]) == record.config_hash(configs[1])
    refuse_another(tmp_path / "run", configs[0], configs[0])
    with pytest.raises(KdError, match="holds a run of another configuration"):
        refuse_another(tmp_path / "run", configs[0], configs[1])


def test_a_teacher_that_never_began(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"schema": 1, "status": "failed"}')
    with pytest.raises(KdError, match="that run never began"):
        record.config_hash(checked(["loss=[ce,kd]", f"teacher.checkpoint={tmp_path}"]))
