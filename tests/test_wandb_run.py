"""W&B away, slow, hanging or refusing: the run goes on, its result is whole, and what was not taken is on disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wandb_disk import only
from wandb_server import WandbServer, serving

from kd.config.compose import checked
from kd.records.record import read
from kd.run.train import train
from kd.tracking import wandb_run

pytestmark = pytest.mark.slow

QUICK = ["recipe.epochs=2", "hardware=cpu", "logger=wandb", "logger.wandb.timeout=2"]


@pytest.fixture
def server(monkeypatch):
    with serving() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_MODE", "online")
        yield running


def trained(run_dir: Path) -> float:
    """Train a little; the seconds it took. The record must be whole."""
    start = time.perf_counter()
    train(checked(QUICK), run_dir)
    assert read(run_dir)["status"] == "finished"
    assert read(run_dir)["student"]["selected"]["test"]["acc1"] > 0.3
    return time.perf_counter() - start


def log_of(run_dir: Path) -> str:
    return (run_dir / "train.log").read_text()


def test_a_server_that_answers_has_it_all(server: WandbServer, tmp_path) -> None:
    trained(tmp_path)
    ((name, run),) = server.runs.items()
    assert run["complete"]
    assert run["summary"]["student.selected.test.acc1"] == read(tmp_path)["student"]["selected"]["test"]["acc1"]
    assert run["opened"]["groupName"] == "train"
    assert f"/runs/{name}" in log_of(tmp_path)
    (file,) = wandb_run.run_files(tmp_path)
    assert file.with_suffix(".wandb.synced").exists()


@pytest.mark.parametrize("mode", ["refuses", "hang", 401, 500])
def test_a_server_that_cannot_be_used_costs_its_timeout_and_no_row(server: WandbServer, tmp_path, mode) -> None:
    if mode == "refuses":
        server.server_close()
    else:
        server.mode = mode
    assert trained(tmp_path) < 10
    kept = only(tmp_path)
    assert kept.summary["status"] == "finished"
    assert any("val/acc1" in row for row in kept.history)
    said = log_of(tmp_path)
    assert said.count("this run is kept offline") == 1
    assert f"kd wandb sync {tmp_path}" in said


@pytest.mark.parametrize("mode", ["hang", 401, 500])
def test_a_server_that_fails_on_the_way_costs_its_timeout_and_no_row(
    server: WandbServer, tmp_path, mode, monkeypatch
) -> None:
    from kd.run.callbacks import EpochLine

    before = EpochLine.on_train_epoch_end

    def fail(self, trainer, module) -> None:
        server.mode = mode
        before(self, trainer, module)

    monkeypatch.setattr(EpochLine, "on_train_epoch_end", fail)
    assert trained(tmp_path) < 10
    kept = only(tmp_path)
    assert kept.summary["status"] == "finished"
    said = log_of(tmp_path)
    assert said.count("W&B did not take everything") == 1
    assert f"kd wandb sync {tmp_path}" in said
    assert not list(tmp_path.rglob("*.synced"))


def test_wandb_dying_on_the_way_is_said_once(tmp_path, monkeypatch) -> None:
    from kd.run.callbacks import EpochLine

    before = EpochLine.on_train_epoch_end

    def kill(self, trainer, module) -> None:
        children = subprocess.run(
            ["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True, text=True
        )
        for line in children.stdout.splitlines():
            pid, name = line.split(maxsplit=1)
            if name.startswith("wandb-core"):
                os.kill(int(pid), signal.SIGKILL)
        before(self, trainer, module)

    monkeypatch.setattr(EpochLine, "on_train_epoch_end", kill)
    assert trained(tmp_path) < 10
    assert log_of(tmp_path).count("WARNING W&B") in (1, 2)  # while logging, and at the end


def test_a_complaint_while_logging_is_the_last(tmp_path, monkeypatch) -> None:
    calls = []

    def refuse(self, *arguments, **more) -> None:
        calls.append(arguments)
        raise ValueError("no such step")

    import wandb

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", refuse)
    trained(tmp_path)
    assert len(calls) == 1
    assert log_of(tmp_path).count("W&B failed (no such step): the run goes on without it") == 1


WARM_PARENT = """
import multiprocessing, os, sys
from pathlib import Path
import lightning, wandb, kd.run.trainer, kd.tracking.wandb_logger
from kd.config.compose import checked
from kd.run.train import train

def job(run_dir):
    run_dir.mkdir()
    train(checked(sys.argv[1:]), run_dir)
    os._exit(0)  # as a sweep's child may: nothing is left to wandb's own clean-up

context = multiprocessing.get_context("fork")
children = [context.Process(target=job, args=(Path(name),)) for name in ("a", "b")]
for child in children:
    child.start()
for child in children:
    child.join(60)
    child.kill()
sys.exit(sum(abs(child.exitcode or 0) for child in children))
"""


def test_children_of_one_warm_parent_have_their_own_runs(tmp_path) -> None:
    command = [sys.executable, "-c", WARM_PARENT, *QUICK, "hardware.threads=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (only(tmp_path / name) for name in ("a", "b"))
    assert one.run.run_id != two.run.run_id
    assert one.exit_code == two.exit_code == 0
    assert one.summary["status"] == two.summary["status"] == "finished"


def test_online_needs_a_key_and_leave(monkeypatch, tmp_path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_run.mode(None) == "offline"
    assert wandb_run.mode(False) == "online"
    (tmp_path / "netrc").write_text("machine my.server login user password 0\n")
    assert wandb_run.mode(None) == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://my.server:8080")
    assert wandb_run.mode(None) == "online"
    assert wandb_run.mode(True) == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_run.mode(False) == "disabled"


def test_disabled_writes_nothing(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    trained(tmp_path)
    assert not wandb_run.run_files(tmp_path)
    assert "W&B" not in log_of(tmp_path)
