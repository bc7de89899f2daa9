"""The local launcher: room for the jobs, and each one's share of threads and GPUs."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from bare_records import write

from kd.errors import KdError
from kd.records import manifest, record
from kd.records.manifest import Job
from kd.sweeps import local
from kd.tasks.metrics import CLASSIFICATION

pytestmark = pytest.mark.slow


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ``nvidia-smi`` that lists two."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\n[ "$1" = -L ] || exit 1\necho "GPU 0: A (UUID: x)"; echo "GPU 1: A (UUID: y)"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each child writes down what it was given instead of training."""

    def note(*, config, **_) -> None:
        run_dir = local.directory(config)
        write(run_dir, "failed")  # of a finished one the launcher would say the accuracy
        given = {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": config.hardware.threads}
        (run_dir / "given.json").write_text(json.dumps({**given, "pid": os.getpid()}))

    monkeypatch.setattr(local, "run_job", note)


def given(engine, count: int, *overrides: str) -> list[dict]:
    """Run so many jobs; what each one was given."""
    engine.run("sweep", "sweep", [Job(f"j{n}", f"j{n}", (*overrides, f"seed={n}")) for n in range(count)])
    found = [json.loads(f.read_text()) for f in sorted(Path("sweep").glob("*/given.json"))]
    assert len(found) == len({f["pid"] for f in found}) == count  # a process each
    return found


def test_gpus_are_counted_without_touching_them(two_gpus, monkeypatch) -> None:
    assert local.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,-1")
    assert local.gpus() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.gpus() == []


def test_no_driver_no_gpus(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert local.gpus() == []


def test_room(two_gpus, monkeypatch) -> None:
    monkeypatch.setattr(local, "cores", lambda: 6)
    assert local.at_once("auto", 1, there=0) == local.at_once(6, 1, there=0) == 6
    assert local.at_once("auto", 1, there=2) == 2
    assert local.at_once("auto", 3, there=2) == local.at_once(6, 3, there=2) == 6
    with pytest.raises(KdError, match=r"n_jobs = 7 is not allowed: there are 6 cores$"):
        local.at_once(7, 1, there=0)
    with pytest.raises(KdError, match=r"n_jobs = 3 is not allowed: there are 2 GPUs \(several may share one: hydra"):
        local.at_once(3, 1, there=2)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "many", None])
def test_a_wrong_number_of_jobs(wrong) -> None:
    with pytest.raises(KdError, match="must be a whole number, 1 or more, or auto"):
        local.at_once(wrong, 1, there=0)


def test_jobs_share_the_cores(make_engine, noting, monkeypatch) -> None:
    monkeypatch.setattr(local, "cores", lambda: 7)
    found = given(make_engine("hydra.launcher.n_jobs=3"), 4, "hardware=cpu")
    assert [f["threads"] for f in found] == [2] * 4
    assert {f["gpu"] for f in found} == {os.environ.get("CUDA_VISIBLE_DEVICES")}


def test_threads_that_were_asked_for_are_kept(make_engine, noting, monkeypatch) -> None:
    monkeypatch.setattr(local, "cores", lambda: 8)
    found = given(make_engine("hydra.launcher.n_jobs=auto"), 2, "hardware=cpu", "hardware.threads=3")
    assert [f["threads"] for f in found] == [3, 3]


def test_each_job_has_a_gpu(make_engine, noting, two_gpus, monkeypatch) -> None:
    monkeypatch.setattr(local, "cores", lambda: 8)
    found = given(make_engine("hydra.launcher.n_jobs=auto"), 2)
    assert sorted(f["gpu"] for f in found) == ["0", "1"]
    assert [f["threads"] for f in found] == [4, 4]


def test_several_jobs_share_a_gpu(make_engine, noting, two_gpus, monkeypatch) -> None:
    monkeypatch.setattr(local, "cores", lambda: 8)
    found = given(make_engine("hydra.launcher.n_jobs=4", "hydra.launcher.jobs_per_gpu=2"), 4)
    assert sorted(f["gpu"] for f in found) == ["0", "0", "1", "1"]


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a scheduler gave us."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    monkeypatch.setattr(local, "cores", lambda: 8)


def test_each_job_has_its_own_block_of_gpus(make_engine, noting, four_gpus) -> None:
    found = given(make_engine("hydra.launcher.n_jobs=auto"), 4, "hardware.devices=2")
    assert sorted(f["gpu"] for f in found) == ["2,3", "2,3", "5,7", "5,7"]  # two at once, one after the other
    assert [f["threads"] for f in found] == [2] * 4  # of each of the four processes at once


def test_blocks_of_gpus(four_gpus) -> None:
    def blocks(n_jobs, devices, share=1, accelerator="gpu"):
        jobs = [{"accelerator": accelerator, "devices": devices}] * 9
        return [",".join(s.gpus) for s in local.resources(jobs, n_jobs, share)]

    assert blocks("auto", 1) == ["2", "3", "5", "7"]
    assert blocks("auto", 3) == [""]  # one job at once: it chooses by itself
    assert blocks("auto", 2, share=2) == ["2,3", "5,7", "2,3", "5,7"]
    assert blocks("auto", "auto") == blocks("auto", [0, 3]) == [""]
    assert blocks("auto", "auto", share=2) == ["2,3,5,7"] * 2
    assert blocks("auto", 2, accelerator="cpu") == [""] * 4  # 8 cores
    sentence = (
        r"n_jobs = 3 is not allowed: there are 4 GPUs, and a job takes 2 \(hardware.devices\) \(several may share"
    )
    with pytest.raises(KdError, match=sentence):
        blocks(3, 2)
    with pytest.raises(KdError, match=r"n_jobs = 5 is not allowed: there are 8 cores, and a job takes 2 \(hardware"):
        blocks(5, 2, accelerator="cpu")
    with pytest.raises(KdError, match=r"hardware\.devices = 5 is not allowed: this machine has 4 GPUs"):
        blocks("auto", 5)


def test_jobs_on_the_cpu_take_no_gpu_of_a_mixed_sweep(four_gpus) -> None:
    mixed = [{"accelerator": "cpu", "devices": 8}, {"accelerator": "gpu", "devices": 2}]
    assert [s.gpus for s in local.resources(mixed, "auto", 1)] == [["2", "3"], ["5", "7"]]


def test_processes_on_the_cpu_count_as_jobs_do(make_engine, noting, monkeypatch) -> None:
    monkeypatch.setattr(local, "cores", lambda: 9)
    engine = make_engine("hydra.launcher.n_jobs=auto")
    assert engine.launcher.at_once({"accelerator": "cpu", "devices": 2}) == 4
    assert [f["threads"] for f in given(engine, 2, "hardware=ddp_cpu")] == [2, 2]


def test_jobs_of_the_cpu_leave_the_gpus_alone(make_engine, noting, two_gpus) -> None:
    assert {f["gpu"] for f in given(make_engine("hydra.launcher.n_jobs=auto"), 2, "hardware=cpu")} == {None}


def test_a_child_that_dies_has_a_record_and_a_reason(make_engine, monkeypatch) -> None:
    monkeypatch.setattr(local, "run_job", lambda **_: os.abort())
    (outcome,) = make_engine().run("sweep", "sweep", [Job("a", "a", ("seed=1", "hardware=cpu"))])
    assert (outcome.state.status, outcome.state.reason) == ("interrupted", "killed by SIGABRT")
    monkeypatch.setattr(local, "run_job", lambda **_: os._exit(4))
    (outcome,) = make_engine().run("sweep", "sweep", [Job("b", "b", ("seed=1", "hardware=cpu"))])
    assert (outcome.state.status, outcome.state.reason) == ("failed", "the process ended with exit code 4")


def test_a_job_without_room_does_not_stop_the_others(make_engine, noting, monkeypatch, capfd) -> None:
    mkdir = Path.mkdir

    def full(self: Path, *arguments: object, **more: object) -> None:
        if self.name == "a":
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        mkdir(self, *arguments, **more)

    monkeypatch.setattr(Path, "mkdir", full)
    jobs = [Job(name, name, (f"seed={n}", "hardware=cpu")) for n, name in enumerate("ab")]
    a, b = make_engine("hydra.launcher.n_jobs=1").run("sweep", "sweep", jobs)
    assert (a.state.status, a.state.reason) == ("failed", f"{a.run_dir}: No space left on device")
    assert (b.run_dir / "given.json").exists()
    said = capfd.readouterr()
    assert f"1/2  a: failed: {a.run_dir}: No space left on device" in said.out
    assert "Traceback" not in said.err


# ---------------------------------------------------------------------- what is said when a job has ended


def told(run_dir: Path, selected: int, **changed: object) -> str:
    run_dir.mkdir(parents=True, exist_ok=True)
    student = {
        "selected": {"epoch": selected, "val": {"acc1": 0.97}, "test": {"acc1": 0.9612}},
        "last": {"epoch": 5, "val": {"acc1": 0.95}, "test": {"acc1": 0.94}},
    }
    found = {"status": "finished", "protocol": {"monitor": "val/acc1"}, "student": student, "wall_clock_s": 1.25}
    metrics = [metric.describe() for metric in CLASSIFICATION]
    record.write(run_dir, {"schema": 1, "metrics": metrics, **found, **changed})
    return local.job_line(run_dir)


def test_the_line_of_a_job_is_of_the_epoch_of_the_table(tmp_path) -> None:
    manifest.write(tmp_path, manifest.Manifest("sweep", "x", {"lr-0.1": Job("lr-0.1", "lr=0.1 seed=0", ())}))
    run_dir = tmp_path / "lr-0.1"
    start = "lr=0.1 seed=0: val/acc1 0.9700  test top-1 96.12 % (epoch"
    assert told(run_dir, 2) == f"{start} 3, which val selected; last epoch 94.00 %; 1.2 s)"
    assert told(run_dir, 5) == f"{start} 6, which val selected; 1.2 s)"
    assert told(run_dir, 5, protocol={"monitor": None}).startswith("lr=0.1 seed=0: test top-1 96.12 % (epoch 6")
    assert told(run_dir, 2, status="pruned", error="at epoch 3: why") == "lr=0.1 seed=0: pruned at epoch 3: why"
    failed = told(run_dir, 2, status="failed", error="the loss is not finite")
    assert failed == f"lr=0.1 seed=0: failed: the loss is not finite (see {run_dir / 'train.log'})"


def test_jobs_are_counted_over_the_whole_sweep(make_engine, noting, capsys) -> None:
    engine = make_engine("hydra.launcher.n_jobs=1", "hardware=cpu")
    engine.run("sweep", "sweep", [Job(name, name, (f"seed={n}",)) for n, name in enumerate("abc")])
    engine.run("sweep", "sweep", [Job("d", "d", ("seed=3",))], part=(7, 20))
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["1/3", "a:"], ["2/3", "b:"], ["3/3", "c:"], ["8/20", "d:"]
    ]  # fmt: skip
