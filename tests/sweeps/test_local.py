"""The local launcher: how many at once, and what each job gets of the cores and GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kd.errors import KdError
from kd.sweeps import local
from kd.sweeps.state import FAILED, INTERRUPTED

TWO_GPUS = """#!/bin/sh
echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-6d0f)"
echo "  MIG 1g.10gb Device 0: (UUID: MIG-c6d4)"
echo "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-77aa)"
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ``nvidia-smi`` that lists two GPUs."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(TWO_GPUS)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tool


def test_gpus_are_found_without_touching_them(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local.gpus() == ["0", "1"]
    for visible, found in (("1", ["1"]), ("3,5", ["3", "5"]), ("", []), ("-1", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert local.gpus() == found
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(smi.parent.parent))
    assert local.gpus() == []  # no driver, no GPU


def test_how_many_run_at_once(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "cores", lambda: 6)
    assert local.at_once("auto", 1, on_gpu=False) == 6
    assert local.at_once(4, 1, on_gpu=False) == 4
    assert local.at_once("auto", 3, on_gpu=True) == 6
    assert local.at_once(2, 1, on_gpu=True) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.at_once("auto", 1, on_gpu=True) == 1


@pytest.mark.parametrize(
    ("n_jobs", "on_gpu", "sentence"),
    [
        (7, False, "hydra.launcher.n_jobs = 7 is not allowed: there are 6 cores$"),
        (3, True, r"n_jobs = 3 is not allowed: there are 2 GPUs \(several may share one: hydra.launcher.jobs_per_gpu"),
        (0, False, "n_jobs = 0 is not allowed: it must be a whole number, 1 or more, or auto"),
        (True, False, "n_jobs = True is not allowed"),
        ("all", False, "n_jobs = all is not allowed"),
    ],
)
def test_more_than_there_is_room_for(smi: Path, monkeypatch: Any, n_jobs: Any, on_gpu: bool, sentence: str) -> None:
    monkeypatch.setattr(local, "cores", lambda: 6)
    with pytest.raises(KdError, match=sentence):
        local.at_once(n_jobs, 1, on_gpu)


@pytest.mark.parametrize(
    ("code", "death"),
    [
        (-9, (INTERRUPTED, "killed by SIGKILL (out of memory?)")),
        (-11, (INTERRUPTED, "killed by SIGSEGV")),
        (130, (INTERRUPTED, "interrupted")),
        (3, (FAILED, "the process ended with exit code 3")),
    ],
)
def test_a_death_without_a_word_has_a_reason(code: int, death: tuple[str, str]) -> None:
    assert local._death(code) == death


LAUNCH = """
import json, os, sys
from pathlib import Path
from types import SimpleNamespace
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import HydraContext, RunMode
from kd import record
from kd.config import CONF
from kd.sweeps import local

def task(cfg):
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    got = {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": cfg.hardware.threads, "pid": os.getpid()}
    print("said on stdout"); print("and on stderr", file=sys.stderr)
    if cfg.seed == 3: os._exit(5)
    record.write(run_dir, {"schema": 1, "status": "failed", "error": "only asked", "got": got})

local.warm_up = lambda: None
local.cores = lambda: 8
n_jobs, per_gpu, hardware = json.loads(sys.argv[1])
with initialize_config_dir(str(CONF), version_base="1.3"):
    hydra = GlobalHydra.instance().hydra
    place = ["hydra.sweep.dir=sweep", f"hardware={hardware}"]
    master = hydra.compose_config("train", place, RunMode.MULTIRUN, with_log_configuration=False)
    HydraConfig.instance().set_config(master)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
    jobs = [[f"seed={n}", f"hydra.sweep.subdir={n}", *place] for n in range(4)]
    jobs[1].append("hardware.threads=5")
    local.launch(context, task, master, jobs, 0, n_jobs, per_gpu)
"""


def launched(folder: Path, *settings: Any) -> list[dict[str, Any]]:
    """The records that four jobs left; the last one dies."""
    command = [sys.executable, "-c", LAUNCH, json.dumps(settings)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["1/4", "2/4", "3/4", "4/4"]
    for number in range(4):
        log = (folder / "sweep" / str(number) / "train.log").read_text()
        assert log.splitlines() == ["said on stdout", "and on stderr"]
    return [json.loads((folder / "sweep" / str(n) / "result.json").read_text()) for n in range(4)]


def test_jobs_share_the_gpus_and_the_cores(smi: Path, tmp_path: Path) -> None:
    records = launched(tmp_path, "auto", 2, "gpu")
    assert [r["got"]["gpus"] for r in records[:3]] == ["0", "1", "0"]  # two a GPU, dealt in turn
    assert [r["got"]["threads"] for r in records[:3]] == [2, 5, 2]  # 8 cores for 4 at once; what was set stays
    assert len({r["got"]["pid"] for r in records[:3]}) == 3
    assert (records[3]["status"], records[3]["error"]) == (FAILED, "the process ended with exit code 5")
    assert records[3]["overrides"] == ["seed=3", "hardware=gpu"]


def test_jobs_on_the_cpu_leave_the_gpus_alone(smi: Path, tmp_path: Path) -> None:
    records = launched(tmp_path, 1, 1, "cpu")
    assert [(r["got"]["gpus"], r["got"]["threads"]) for r in records[:3]] == [(None, 8), (None, 5), (None, 8)]
