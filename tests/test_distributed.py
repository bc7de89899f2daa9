"""One run in two processes (gloo): equal to the same run in one, whoever starts them, and nothing left when it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kd import errors
from kd.config.compose import checked
from kd.config.hardware import settings
from kd.errors import KdError, MachineFailure
from kd.parallel import cluster, group, launch
from tests import ranks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SGD = ["recipe=sgd_cosine", "recipe.optimizer.lr=0.05"]
# 101 images in batches of 32: the last one has 5, on two processes 3 and 2; 719 test images
MLP = ["data.train_size=101", "recipe.batch_size=32", "recipe.epochs=2", "data.eval_batch_size=64", *SGD]
MAPS = ["data=fake", "data.shape=[1,8,8]", "data.num_classes=3", "data.train_images=85", "data.test_images=33"]
MAPS += ["recipe.epochs=2", "recipe.batch_size=32", "data.eval_batch_size=4", *SGD]
PLAIN = ["model@student=none", "student.model={_target_:tests.ranks.Plain}"]
MAPS += ["model@teacher=resnet8", "teacher.allow_random=true"]
TAPS = ["loss.at.student_taps=[stage1]", "loss.at.teacher_taps=[layer1]", "loss.hint.adapter=conv"]
TAPS += ["loss.hint.student_taps=[stage2]", "loss.hint.teacher_taps=[layer2]", "loss.at.weight=10"]


def cases(teacher_run: Path) -> dict[str, list[str]]:
    """Name → overrides; the same for one process and for two."""
    teacher = f"teacher.checkpoint={teacher_run}"
    few = [*MLP, teacher, "loss=[ce,kd]", "data.label_fraction=0.3", "protocol.keep_predictions=true"]
    maps = [*MAPS, *PLAIN, *TAPS, "loss=[ce,at,hint]", "loss.hint.weight=1", "recipe.gradient_clip=1"]
    return {
        "mlp": few,
        "maps": maps,
        "off": [*MAPS, *PLAIN, *TAPS, "loss=[at,hint]", "loss.hint.weight=0"],  # and nothing reaches the classifier
        "accumulated": [*MLP, teacher, "loss=[kd]", "recipe.accumulate=2"],
        "gathered": [*MLP, teacher, "loss=[ce,cwtm]", "data.label_fraction=0.3"],  # cwtm is over the whole batch
        "batch_norm": [*MAPS, "model@student=resnet8", "loss=[ce]"],
        "mlp_sharded": [*few, "hardware.strategy=fsdp"],
        "maps_sharded": [*maps, "hardware.strategy=fsdp"],
    }


def variables(rank: int, port: int, **more: str) -> dict[str, str]:
    """The environment of one of two processes."""
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    own = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": path}
    return {**os.environ, **{k: str(v) for k, v in known.items()}, **own, **more}


def free_port() -> int:
    return int(next(iter(launch._environments(1)))["MASTER_PORT"])


def finish(processes: list[subprocess.Popen[str]], timeout: float = 300) -> list[str]:
    """What they printed; they are gone afterwards."""
    try:
        return [p.communicate(timeout=timeout)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()


def popen(command: list[str], cwd: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, teacher_run: Path) -> Path:
    """``1/NAME`` and ``2/NAME``: each case in one process (this one) and in two."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["hardware=cpu", "hardware.threads=1"]
    two = {name: [*common, *o, "hardware.devices=2"] for name, o in cases(teacher_run).items()}
    port, command = free_port(), [sys.executable, "-m", "tests.ranks", str(folder / "2"), json.dumps(two)]
    started = [popen(command, folder, variables(r, port, KD_WORKER="-1")) for r in range(2)]
    one = {n: [*common, *o] for n, o in cases(teacher_run).items() if not n.endswith("sharded")}
    from kd.run import build

    original = build.distiller
    try:
        ranks.run(folder / "1", one)
    finally:
        build.distiller = original
        said = finish(started)
    assert [p.returncode for p in started] == [0, 0], "\n".join(said)
    return folder


def outcome(run: Path) -> dict[str, Any]:
    return json.loads((run / "outcome.json").read_text())


def curves(run: Path) -> list[dict[str, float]]:
    header, *rows = (run / "metrics.csv").read_text().splitlines()
    return [{k: float(v) for k, v in zip(header.split(","), r.split(","), strict=True) if v} for r in rows]


@pytest.mark.parametrize("name", ["mlp", "maps", "off", "accumulated", "gathered", "mlp_sharded", "maps_sharded"])
def test_two_processes_train_like_one(runs: Path, name: str) -> None:
    """Curves of training (windows and epochs) and validation, test metrics, weights; also when FSDP shards them."""
    one, two = runs / "1" / name.removesuffix("_sharded"), runs / "2" / name
    rows = curves(one), curves(two)
    assert len(rows[0]) == len(rows[1]) >= 4
    for a, b in zip(*rows, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    assert outcome(one)["student"]["last"]["test"] == pytest.approx(outcome(two)["student"]["last"]["test"], abs=1e-5)
    if "teacher" in outcome(one):
        for split in ("val", "test"):
            assert outcome(one)["teacher"][split] == pytest.approx(outcome(two)["teacher"][split], abs=1e-5)
    weights = load_file(one / "student_last.safetensors"), load_file(two / "student_last.safetensors")
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    assert (outcome(one)["processes"], outcome(two)["processes"]) == (1, 2)


def test_every_example_is_measured_once_and_in_order(runs: Path) -> None:
    """719 test images on two processes, 360 and 359: none is padded, none is lost."""
    for split, count in (("test", 719), ("val", 270)):
        one, two = (np.load(runs / n / "mlp" / f"predictions_{split}.npz") for n in "12")
        assert np.array_equal(one["index"], two["index"])
        assert len(np.unique(two["index"])) == count
        assert np.array_equal(one["target"], two["target"])
        np.testing.assert_allclose(one["logits"], two["logits"], atol=1e-4)
        measured = outcome(runs / "2" / "mlp")["student"]["selected"][split]["acc1"]
        assert measured == pytest.approx((two["logits"].argmax(1) == two["target"]).mean(), abs=1e-6)


def test_the_teacher_is_left_alone(runs: Path) -> None:
    """Its batch statistics are those of one process, on both; DDP does not send them round; it stays in eval."""
    one = torch.load(runs / "1" / "maps" / "seen0.pt")
    names = {f"teacher.{name}" for name in one["teacher"]}
    assert any("running_mean" in name for name in names)
    for rank in (0, 1):
        two = torch.load(runs / "2" / "maps" / f"seen{rank}.pt")
        assert all(torch.equal(value, two["teacher"][name]) for name, value in one["teacher"].items())
        assert names <= set(two["ignored"])
        assert not two["training"]


def test_ddp_does_not_overwrite_the_buffers_of_terms() -> None:
    """Process 0 would send its banks and running statistics round; a teacher is ignored only while it is frozen."""
    module = nn.Module()
    for name in ("student", "teacher", "objective"):
        module.add_module(name, nn.Sequential(nn.BatchNorm1d(2)))
    buffers = {n for n, _ in module.named_buffers() if n.startswith("objective.")}
    assert len(buffers) == 3
    group.ignore_in_ddp(module, None, "objective.")
    assert set(module._ddp_params_and_buffers_to_ignore) == buffers
    group.ignore_in_ddp(module, "teacher.", "objective.")
    teachers = {n for n in module.state_dict() if n.startswith("teacher.")}
    assert set(module._ddp_params_and_buffers_to_ignore) == buffers | teachers


def test_a_parameter_that_no_term_reaches_does_not_stop_ddp(runs: Path) -> None:
    assert torch.load(runs / "2" / "maps" / "seen1.pt")["unreached"] == []
    assert torch.load(runs / "2" / "off" / "seen1.pt")["unreached"] == ["student.fc.weight", "student.fc.bias"]
    one, two = (load_file(runs / n / "off" / "student_last.safetensors")["fc.weight"] for n in "12")
    assert torch.equal(one, two)


def test_what_is_measured_is_what_is_saved_under_batch_norm(runs: Path) -> None:
    """Each process has seen other batches: both measure with the statistics of process 0."""
    from kd.run.evaluate import evaluate

    run = runs / "2" / "batch_norm"
    config = checked(["hardware=cpu", *cases(run)["batch_norm"]])
    recorded = outcome(run)["student"]["last"]
    for split in ("val", "test"):
        measured = evaluate(config, "student", split, run / "student_last.safetensors")["metrics"]
        wanted = {k: recorded[split][k] for k in ("acc1", "acc5", "nll", "ece")}
        assert {k: measured[k] for k in wanted} == pytest.approx(wanted, abs=1e-6)


def test_fsdp_shards_student_and_teacher(runs: Path) -> None:
    """And what it saves is whole: the weights load alone, the checkpoint holds no teacher."""
    for name in ("mlp_sharded", "maps_sharded"):
        kinds = json.loads((runs / "2" / name / "parameters.json").read_text())
        assert set(kinds) == {"DTensor"}
    student = ranks.Plain(3)
    student.load_state_dict(load_file(runs / "2" / "maps_sharded" / "student_last.safetensors"))
    state = torch.load(runs / "2" / "maps_sharded" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not any(name.startswith("teacher.") for name in state)
    assert any(name.startswith("objective.terms.hint") for name in state)


# ---------------------------------------------------------------------- started by kd


TRAIN = [sys.executable, "-m", "kd.cli.main", "train"]
LONG = ["hardware=ddp_cpu", "hardware.threads=1", *MLP, "recipe.epochs=40", "hydra.run.dir=run"]


def workers(parent: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def gone(numbers: list[int], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while any(_alive(n) for n in numbers) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(_alive(n) for n in numbers)


def _alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are listed in /proc")
def test_an_interrupted_run_leaves_no_process_and_resumes(tmp_path: Path, kd) -> None:
    """SIGTERM to kd alone; resumed in two processes to what one process gives without an interruption."""
    process = popen([*TRAIN, *LONG], tmp_path, variables(0, 0))
    assert process.stdout is not None
    started: list[int] = []
    for line in process.stdout:
        if line.startswith("epoch 3/"):
            started = workers(process.pid)
            process.send_signal(signal.SIGTERM)
            break
    (rest,) = finish([process])
    assert process.returncode == 130, rest
    assert len(started) == 2
    assert gone(started)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "interrupted"
    (said,) = finish([popen([*TRAIN, "resume=run"], tmp_path, variables(0, 0))])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "finished", said
    assert "epoch 1/" not in said
    assert (result["processes"], result["peak_memory_mb"]["process"] > 0) == (2, True)
    one = [o.replace("ddp_cpu", "cpu").replace("dir=run", "dir=one") for o in LONG]
    assert kd("train", *one).code == 0
    weights = [load_file(tmp_path / n / "student_last.safetensors") for n in ("one", "run")]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)
    for a, b in zip(curves(tmp_path / "one"), curves(tmp_path / "run"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def pretend(monkeypatch: pytest.MonkeyPatch, zero: str, one: str) -> None:
    """Processes 0 and 1 that run these lines instead of a training; ``pipe`` is where they answer."""
    begin = "import os, sys, time; from kd.parallel.launch import Connection; sys.stdin.readline();"
    begin += f"pipe = Connection(int(os.environ['{launch.WORKER}']), readable=False);"
    code = f"{begin} exec({zero!r} if os.environ['RANK'] == '0' else {one!r})"
    monkeypatch.setattr(launch, "COMMAND", [sys.executable, "-c", code])
    monkeypatch.setattr(launch, "GRACE", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


def work(folder: Path) -> cluster.Work:
    """For two processes, which are pretended."""
    hardware = settings(checked(["hardware=ddp_cpu", "hardware.timeout_s=1"]))
    return cluster.Work("nothing:here", (), hardware, str(folder))


FAILS = "pipe.send({'error': 'the loss is not finite', 'kind': '%s', 'traceback': 'where it was'%s}); os._exit(1)"
HANGS = "time.sleep(100)"


@pytest.mark.parametrize(
    ("zero", "one", "kind", "sentence"),
    [
        (HANGS, FAILS % ("run", ""), KdError, "^the loss is not finite$"),
        (HANGS, FAILS % ("unexpected", ""), RuntimeError, "^the loss is not finite$"),
        (HANGS, "os.kill(os.getpid(), 9)", KdError, "^process 1 of the run was killed by SIGKILL$"),
        (
            "time.sleep(0.5);" + FAILS % ("unexpected", ""),
            "os.kill(os.getpid(), 9)",
            KdError,
            "process 1 .* by SIGKILL",
        ),
        ("os._exit(3)", HANGS, KdError, "process 0 of the run ended without a result .exit code 3."),
        (
            FAILS % ("machine", ", 'timed_out': True"),
            HANGS,
            MachineFailure,
            "^process 1 of the run did not answer within",
        ),
        ("os.abort()", HANGS, MachineFailure, "^process 1 of the run did not answer within 1 s .hardware.timeout_s."),
        (HANGS, "pipe.send({'outcome': {}})", MachineFailure, "^process 0 of the run did not answer within 1 s"),
    ],
)
def test_one_failed_process_ends_them_all(monkeypatch, tmp_path, zero, one, kind, sentence) -> None:
    pretend(monkeypatch, zero, one)
    before = set(workers(os.getpid()))
    start = time.monotonic()
    with pytest.raises(kind, match=sentence) as failure:
        launch.run(work(tmp_path), lambda processes: None)
    assert (errors.kind(failure.value) == "machine") == ("finite" not in sentence)
    assert time.monotonic() - start < 30
    assert set(workers(os.getpid())) <= before
    if "finite" in sentence:
        assert "where it was" in str(failure.value.__cause__)


def test_a_process_that_hangs_after_the_result_loses_nothing(monkeypatch, tmp_path) -> None:
    pretend(monkeypatch, "pipe.send({'outcome': {'done': 1}})", HANGS)
    assert launch.run(work(tmp_path), lambda processes: None) == {"done": 1}


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are listed in /proc")
def test_a_stopped_process_ends_the_run_with_a_sentence(tmp_path: Path, kd, monkeypatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    before = set(workers(os.getpid()))
    said = kd("train", *LONG, "hardware.timeout_s=6", "+loss.bad={_target_:tests.ranks.Stops,rank:1}")
    assert said.code == 1
    (line,) = said.err.splitlines()
    assert line.startswith("kd: process 1 of the run did not answer within 6 s (hardware.timeout_s)")
    assert set(workers(os.getpid())) <= before
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["failure"], result["error"]) == ("failed", "machine", line.removeprefix("kd: "))
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt")["epoch"] == 0


def test_a_process_of_a_cluster_that_does_not_answer(tmp_path: Path, monkeypatch) -> None:
    """What torchrun and Slurm started has no parent that could tell: the processes that wait find out by themselves."""
    said: list[tuple[str, str]] = []
    monkeypatch.setattr(group, "rank", lambda: 0)
    monkeypatch.setattr(group, "failed", lambda: said[0] if said else None)
    monkeypatch.setattr(group, "say_failed", lambda sentence, kind: said.append((kind, sentence)))
    monkeypatch.setattr(group, "silent", lambda: [2, 3])
    work = cluster.Work("nothing:here", (), {"timeout_s": 7}, str(tmp_path))
    text = "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 7000ms for recv operation to complete"
    sentence = "process 2, 3 of the run did not answer within 7 s (hardware.timeout_s)"
    with pytest.raises(MachineFailure) as failure, cluster.propagate_failure(work):
        raise RuntimeError(text)
    assert str(failure.value).startswith(sentence)
    assert said[0][0] == "machine"
    assert said[0][1].startswith(f"process 0: {sentence}")
    for kind in ("run", "unexpected"):
        said[:] = [(kind, "process 1: this term breaks")]
        with pytest.raises(KdError) as other, cluster.propagate_failure(work):
            raise RuntimeError("Connection closed by peer")
        assert (str(other.value), errors.kind(other.value)) == ("process 1: this term breaks", kind)


def test_a_store_that_hangs_is_not_waited_for(monkeypatch) -> None:
    """It is kept by process 0, which may be the one that is stopped."""
    monkeypatch.setattr(group, "PATIENCE", -4.9)
    monkeypatch.setattr(group, "joined", lambda: True)
    released = threading.Event()

    def hang() -> None:
        released.wait(20)
        raise RuntimeError("gone")

    monkeypatch.setattr(group.dist.distributed_c10d, "_get_default_store", hang)
    start = time.monotonic()
    assert (group.failed(), group.silent()) == (None, [])
    assert time.monotonic() - start < 10
    released.set()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are listed in /proc")
def test_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    child = "import sys, threading, time; from kd.parallel import launch; sys.stdin.readline();"
    child += (
        "threading.Thread(target=launch._end_with_parent, daemon=True).start(); print('up', flush=True); time.sleep(99)"
    )
    code = "import sys; from kd.parallel import cluster, launch;"
    code += f"launch.COMMAND = [sys.executable, '-c', {child!r}];"
    code += "hardware = dict(devices=2, accelerator='cpu', cluster=None, timeout_s=9);"
    code += "launch.run(cluster.Work('nothing:here', (), hardware, '.'), lambda processes: None)"
    process = popen([sys.executable, "-c", code], tmp_path, variables(0, 0))
    assert process.stdout is not None
    assert [process.stdout.readline(), process.stdout.readline()] == ["up\n", "up\n"]
    started = workers(process.pid)
    assert len(started) == 2
    process.kill()
    process.wait()
    assert gone(started)
    process.stdout.close()


# ---------------------------------------------------------------------- started by torchrun and Slurm


def test_torchrun_on_two_nodes(tmp_path: Path, runs: Path) -> None:
    """Two nodes of one process each: one run directory, which process 0 chose, and one record."""
    port, started = free_port(), []
    arguments = [*MLP, "hardware.threads=1", "hardware.accelerator=cpu"]
    for node in range(2):
        own = ["--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
        command = [sys.executable, "-m", "torch.distributed.run", *own, f"--master_port={port}"]
        clean = {k: v for k, v in variables(0, 0).items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        started.append(
            popen([*command, "-m", "kd.cli.main", "train", "hardware=torchrun", *arguments], tmp_path, clean)
        )
    said = finish(started)
    assert [p.returncode for p in started] == [0, 0], "\n".join(said)
    (file,) = tmp_path.rglob("result.json")
    result = json.loads(file.read_text())
    assert (result["status"], result["processes"]) == ("finished", 2)
    assert len(list((tmp_path / "runs" / "train").iterdir())) == 1
    assert "epoch 2/2" in said[0]
    assert "epoch" not in said[1]


def test_slurm_and_a_failure_of_the_second_task(tmp_path: Path) -> None:
    """Both end, with exit code 1, and the record says what the other process had to say."""
    port, started = free_port(), []
    arguments = [
        *MLP,
        "hardware.threads=1",
        "hardware.accelerator=cpu",
        "+loss.bad={_target_:tests.ranks.Breaks,rank:1}",
    ]
    for task in range(2):
        slurm = {"SLURM_PROCID": task, "SLURM_LOCALID": 0, "SLURM_NODEID": task, "SLURM_NTASKS": 2, "SLURM_NNODES": 2}
        slurm |= {
            "SLURM_NTASKS_PER_NODE": 1,
            "SLURM_JOB_ID": 4711,
            "SLURM_JOB_NAME": "kd",
            "SLURM_NODELIST": "127.0.0.1",
        }
        clean = {k: v for k, v in variables(0, port).items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        own = clean | {k: str(v) for k, v in slurm.items()}
        started.append(popen([*TRAIN, "hardware=slurm", "hydra.run.dir=run", *arguments], tmp_path, own))
    said = finish(started)
    assert [p.returncode for p in started] == [1, 1], "\n".join(said)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert result["error"].startswith("process 1: in loss.bad: ValueError: this term breaks (ranks.py:")
    assert "kd: process 1: in loss.bad: ValueError: this term breaks" in said[0]
    assert "ValueError: this term breaks" in said[1]


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["hardware=torchrun"],
            "torchrun has not started this process: torchrun --nproc_per_node=N -m kd.cli.main train",
        ),
        (["hardware=slurm"], "Slurm has not started this process: srun kd train"),
        (["hardware=ddp_cpu", "hardware.devices=3"], "recipe.batch_size = 64 is not allowed on 3 devices"),
        (["hardware=cpu", "hardware.strategy=fsdp"], "hardware.strategy = fsdp shards over two devices or more"),
        (["hardware=cpu", "hardware.num_nodes=2"], "hardware.num_nodes = 2 needs hardware=torchrun or hardware=slurm"),
        (["hardware=cpu", "hardware.devices=0"], "hardware.devices = 0 is not allowed: a whole number, 1 or more"),
        (["hardware=cpu", "hardware.devices=[0,1]"], "say how many processes"),
        (["hardware.devices=[0,0]"], "a list holds the numbers of GPUs, each once"),
        (["hardware=mps", "hardware.devices=2"], "hardware.devices = 2 is not allowed with hardware.accelerator = mps"),
        (
            ["hardware.precision=bf16"],
            "hardware.precision = bf16 is not allowed: it must be 32-true, bf16-mixed",
        ),
        (["hardware=cpu", "hardware.precision=16-mixed"], "hardware.precision = 16-mixed is not allowed on the CPU"),
        (["hardware.compile=fast"], "hardware.compile = fast is not allowed: it must be null, default"),
        (["hardware.compiled=[pupil]"], "hardware.compiled = ['pupil'] is not allowed"),
        (["hardware=fsdp", "hardware.compile=default"], "hardware.compile = default is not allowed with"),
        (["hardware=cpu", "hardware.sync_batchnorm=true"], "hardware.sync_batchnorm = true is not allowed here"),
        (["hardware.timeout_s=0"], "hardware.timeout_s = 0 is not allowed: it must be a whole number, 1 or more"),
        (["hardware.strategy=dp"], "hardware.strategy = dp is not allowed: it must be auto, ddp or fsdp"),
    ],
)
def test_bad_hardware(kd, overrides: list[str], sentence: str) -> None:
    said = kd("train", "recipe.epochs=1", *overrides)
    assert said.code == 1
    assert sentence in said.err
    assert "Traceback" not in said.err


def test_a_sweep_that_torchrun_started_twice_is_refused(kd, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = kd("train", "-m", "seed=0,1", "hardware=cpu")
    assert said.code == 1
    assert "a sweep (-m) was started 2 times at once" in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("size", "sentence"),
    [(50, "leaves a last batch of 1 sample.s. .101 in all., fewer than the 2 processes"), (33, None)],
)
def test_a_last_batch_must_reach_every_process(monkeypatch, size: int, sentence: str | None) -> None:
    from kd.run import build

    config = checked(["data.train_size=101", f"recipe.batch_size={size}", "hardware=cpu"])
    data = build.datamodule(config)
    monkeypatch.setattr(group, "world_size", lambda: 2)
    if sentence is None:
        build.distiller(config, data)
    else:
        with pytest.raises(KdError, match=sentence):
            build.distiller(config, data)


def test_variables_of_a_slurm_job_do_not_disturb_a_run_of_one_process(kd, monkeypatch) -> None:
    for key, value in {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "1", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(key, value)
    said = kd("train", "recipe.epochs=1", "hardware=cpu")
    assert said.code == 0, said.err
