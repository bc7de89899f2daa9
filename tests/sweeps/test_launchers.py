"""The launchers of other packages: jobs through submitit, here and on a Slurm that is made of scripts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException

from kd.config.explain import explain
from tests.sweeps.slurm import FakeSlurm, wait_for

pytestmark = pytest.mark.slow

TINY = ["data=fake", "data.train_images=64", "protocol.val_every=1", "hardware=cpu", "hydra.sweep.dir=runs/sweep"]


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kd.cli.main", "train", "-m", *TINY, *arguments]
    env = {**os.environ, "WANDB_MODE": "offline", **environment}
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def result(folder: Path, job: str) -> dict:
    return json.loads((folder / "runs" / "sweep" / job / "result.json").read_text())


def test_jobs_through_submitit(tmp_path: Path) -> None:
    sweep = start(tmp_path, "hydra/launcher=submitit_local", "recipe.epochs=1", "recipe.optimizer.lr=0.01,1e30")
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 1, err
    assert "2 jobs, best first" in out
    assert "lr=1e+30: failed: the answer of the student" in err
    assert result(tmp_path, "lr-0.01")["status"] == "finished"


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[FakeSlurm]:
    made = FakeSlurm(tmp_path)
    yield made
    made.stop()


def test_a_preempted_job_is_queued_again_and_goes_on(tmp_path: Path, slurm: FakeSlurm) -> None:
    sweep = start(
        tmp_path,
        *("hydra/launcher=slurm", "hydra.launcher.partition=small", "hydra.launcher.gpus_per_node=null"),
        *("recipe.epochs=400", "seed=0,1"),
        **slurm.environment,
    )
    runs = tmp_path / "runs" / "sweep"
    wait_for(lambda: (runs / "seed-0" / "checkpoints" / "last.ckpt").exists() or sweep.poll() is not None)
    assert sweep.poll() is None, sweep.communicate()
    slurm.preempt("1000_0")
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, err
    assert slurm.requeued() == ["1000_0"]
    assert "2 jobs, best first" in out

    script = (slurm.state / "1000.sh").read_text()
    for wanted in ("--array=0-1%2", "--partition=small", "--time=720", "--signal=USR2@120", "--cpus-per-task=8"):
        assert f"#SBATCH {wanted}" in script
    first = result(tmp_path, "seed-0")
    assert first["status"] == "finished"
    epochs = [line.split(",")[0] for line in (runs / "seed-0" / "metrics.csv").read_text().splitlines()[1:]]
    assert len(set(epochs)) == 401  # none is missing; the last line is of the test
    log = (runs / "seed-0" / "train.log").read_text()
    assert log.count("epoch 1/400") == 1, "it went on, it did not begin again"


def test_a_lost_job_does_not_end_the_sweep_before_the_others(tmp_path: Path, slurm: FakeSlurm) -> None:
    sweep = start(
        tmp_path,
        *("hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null", "recipe.epochs=200", "seed=0,1,2"),
        **slurm.environment,
    )
    runs = tmp_path / "runs" / "sweep"
    for number in (0, 2):
        began = runs / f"seed-{number}" / "checkpoints" / "last.ckpt"
        wait_for(lambda began=began: began.exists() or sweep.poll() is not None)
        assert sweep.poll() is None, sweep.communicate()
        slurm.signal(f"1000_{number}", signal.SIGSTOP)
    slurm.lose("1000_0")
    with pytest.raises(subprocess.TimeoutExpired):
        sweep.wait(25)  # submitit asks for the state after seconds, and waits 15 for a result that may come late
    slurm.signal("1000_2", signal.SIGCONT)
    out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 1
    assert "3 jobs, best first" in out
    assert [result(tmp_path, f"seed-{n}")["status"] for n in range(3)] == ["interrupted", "finished", "finished"]
    assert "1 of 3 jobs have no result" in err
    assert "seed=0: interrupted: the launcher says: Slurm job 1000_0 was lost: COMPLETED, without a result" in err


@pytest.mark.parametrize(("launcher", "extra"), [("submitit_slurm", "slurm"), ("ray", "ray")])
def test_a_launcher_that_is_not_installed_says_how(launcher: str, extra: str) -> None:
    missing = MissingConfigException(f"In 'train': Could not find 'hydra/launcher/{launcher}'", launcher)
    assert explain(missing).endswith(f"pip install 'kd[{extra}]'")


def test_jobs_through_ray(tmp_path: Path) -> None:
    sweep = start(tmp_path, "hydra/launcher=ray", "recipe.epochs=1", "recipe.optimizer.lr=0.01,1e30")
    _, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 1
    assert "lr=1e+30: failed: the answer of the student" in err
    assert result(tmp_path, "lr-0.01")["status"] == "finished"
