"""``experiments/wandb_sweep.yaml`` drives ``kd train``, as W&B's own agent reads it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wandb_disk import only

from kd.config.compose import checked
from kd.records.record import read
from kd.tasks.metrics import CLASSIFICATION

pytestmark = pytest.mark.slow

SWEEP = Path(__file__).parents[1] / "experiments" / "wandb_sweep.yaml"
CHOSEN = {"loss.kd.temperature": 8, "loss.kd.weight": 0.5, "seed": 1}


@pytest.fixture
def agent(tmp_path, monkeypatch, teacher_run) -> list[list[str]]:
    """Runs a job the way ``wandb agent`` does; the commands that it started."""
    from wandb.wandb_agent import Agent, AgentProcess

    started: list[list[str]] = []

    def start(self, env=None, command=None, **_) -> None:
        own = [sys.executable, "-m", "kd.cli.main"] if command[1] == "kd" else []
        started.append(command)
        more = ["recipe.epochs=2", "protocol.val_every=1", "hardware=cpu", "hydra.run.dir=run"]
        subprocess.run([*own, *command[2:], *more], env=env, check=True, cwd=tmp_path, timeout=100)

    monkeypatch.setattr(AgentProcess, "__init__", start)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "teacher").symlink_to(teacher_run)
    for name, value in {"WANDB_DIR": str(tmp_path), "WANDB_SWEEP_ID": "thesweep"}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets them: forget them afterwards
        monkeypatch.setenv(name, "")
    content = yaml.safe_load(SWEEP.read_text())
    worker = Agent(api=None, queue=None)
    worker._sweep_command = content["command"]
    arguments = {key: {"value": value} for key, value in CHOSEN.items()}
    worker._command_run({"run_id": "theagentsrun", "program": content["program"], "args": arguments})
    return started


def test_the_agents_run_is_the_run_that_is_kept(agent, tmp_path) -> None:
    assert agent[0][:3] == ["/usr/bin/env", "kd", "train"]
    assert agent[0][-3:] == [f"{key}={value}" for key, value in CHOSEN.items()]
    result = read(tmp_path / "run")
    assert (result["status"], result["seed"]) == ("finished", 1)
    kept = only(tmp_path / "run")
    assert (kept.run.run_id, kept.run.sweep_id) == ("theagentsrun", "thesweep")
    assert kept.run.display_name == "loss.kd.temperature=8, loss.kd.weight=0.5, seed=1"
    assert kept.config["loss"]["kd"]["temperature"] == kept.config["loss.kd.temperature"] == 8
    assert kept.summary["student.selected.test.acc1"] == pytest.approx(result["student"]["selected"]["test"]["acc1"])
    assert os.environ["WANDB_SWEEP_ID"] == "thesweep"


def test_its_parameters_and_metric_are_ones_of_kd_train() -> None:
    content = yaml.safe_load(SWEEP.read_text())
    first = CLASSIFICATION[0]  # what a run is selected by where protocol.monitor is null
    assert checked(["experiment=digits_kd"])["protocol"]["monitor"] is None
    assert content["metric"] == {"name": f"val/{first.name}", "goal": f"{first.better}imize"}
    for key, node in content["parameters"].items():
        for value in node["values"]:
            checked(["experiment=digits_kd", f"{key}={value}"])
