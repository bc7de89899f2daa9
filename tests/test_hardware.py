"""Precision, compile, gradient accumulation and what needs GPUs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kd.config.compose import checked
from kd.errors import KdError
from kd.parallel import devices as machine
from kd.run import hardware

GPUS = torch.cuda.device_count()
SMALL = ["data.train_size=100", "recipe.epochs=2", "recipe.batch_size=25", "hardware=cpu", "hardware.threads=1"]


def test_more_than_the_machine_has_is_refused(monkeypatch) -> None:
    def needs(gpus: int, **given: object) -> None:
        machine.refuse_missing({"accelerator": "auto", "devices": 1, "cluster": None, **given}, gpus)

    monkeypatch.setattr(machine, "cores", lambda: 4)
    for legal in ({"devices": 4}, {"accelerator": "cpu", "devices": 4}):
        needs(0, **legal)
    for legal in ({"devices": 2}, {"devices": [1]}, {"accelerator": "cuda", "devices": "auto"}):
        needs(2, **legal)
    needs(0, cluster="slurm", accelerator="gpu", devices=8)  # its tasks may be anywhere
    processes = r"devices = 5 is not allowed on the CPU, where it is the number of processes: it must be 1 to 4"
    for given in ({}, {"accelerator": "cpu"}):
        with pytest.raises(KdError, match=processes):
            needs(0, devices=5, **given)
    with pytest.raises(KdError, match=r"hardware.devices = \[0\] is not allowed here: torch finds no GPU"):
        needs(0, devices=[0])
    for devices in (3, [2]):
        with pytest.raises(KdError, match=r"hardware.devices = .* is not allowed: this machine has 2 GPUs"):
            needs(2, devices=devices)
    monkeypatch.setattr(machine, "cores", lambda: 1)
    needs(0, accelerator="cpu", devices=2)  # to try what two GPUs will do


@pytest.mark.parametrize("swept", [[], ["-m"]])
def test_more_processes_than_cores_leave_no_directory(kd, tmp_path, monkeypatch, swept) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 2)
    said = kd("train", *swept, "hardware=ddp_cpu", "hardware.devices=4")
    assert said.code == 1
    assert "hardware.devices = 4 is not allowed on the CPU" in said.err
    assert not list(tmp_path.iterdir())


def trained(kd, tmp_path: Path, name: str, *overrides: str) -> dict[str, torch.Tensor]:
    said = kd("train", *SMALL, *overrides, f"hydra.run.dir={name}")
    assert said.code == 0, said.err
    return load_file(tmp_path / name / "student_last.safetensors")


@pytest.mark.slow
def test_compiled_networks_train_like_eager_ones_and_keep_their_names(kd, tmp_path, teacher_run) -> None:
    """With taps: the hooks of the terms fire inside of the compiled networks."""
    terms = [f"teacher.checkpoint={teacher_run}", "loss=[ce,hint]", "loss.hint.teacher_taps=[-1]", "recipe=sgd_cosine"]
    terms += ["loss.hint.student_taps=[-1]", "recipe.epochs=2", "recipe.batch_size=25", "data.train_size=100"]
    eager = trained(kd, tmp_path, "eager", *terms)
    compiled = trained(kd, tmp_path, "compiled", *terms, "hardware.compile=default")
    assert list(eager) == list(compiled)
    torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)
    state = torch.load(tmp_path / "compiled" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not any("_orig_mod" in name for name in state)


@pytest.mark.parametrize(("compiled", "wanted"), [("[student]", [True, False]), ("[teacher]", [False, True])])
def test_one_of_the_networks_is_compiled(compiled: str, wanted: list[bool]) -> None:
    from kd.run import build

    teacher = ["model@teacher=mlp", "teacher.allow_random=true", "loss=[kd]"]
    config = checked(["hardware.compile=default", f"hardware.compiled={compiled}", *teacher])
    module = build.distiller(config, build.datamodule(config))
    hardware.compile_networks(config, module)
    networks = [module.student, module.teacher.networks[0]]
    assert [n._compiled_call_impl is not None for n in networks] == wanted


def test_accumulated_batches_make_one_step(kd, tmp_path) -> None:
    """Four batches of 25 with a step after each second one: the weights of two batches of 50."""
    options = ["recipe=sgd_cosine", "recipe.epochs=2", "data.shuffle=false"]
    two = trained(kd, tmp_path, "two", *options, "recipe.batch_size=25", "recipe.accumulate=2")
    one = trained(kd, tmp_path, "one", *options, "recipe.batch_size=50")
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


DTYPES = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}


@pytest.mark.parametrize(("precision", "dtype"), DTYPES.items())
def test_precision_of_the_weights(kd, tmp_path, teacher_run, precision, dtype) -> None:
    teacher = [f"teacher.checkpoint={teacher_run}", "loss=[ce,kd]"]
    weights = trained(kd, tmp_path, "run", f"hardware.precision={precision}", *teacher)
    assert {w.dtype for w in weights.values()} == {dtype}


@pytest.mark.parametrize("units", [True, False])
def test_bfloat16_without_units_is_said(monkeypatch, caplog, units: bool) -> None:
    logging.getLogger("kd").propagate = True
    monkeypatch.setattr(hardware, "has_bfloat16", lambda: units)
    hardware.warn_of_slow_precision(checked(["hardware=cpu", "hardware.precision=bf16-mixed"]))
    assert ("this CPU has no bfloat16 units" in caplog.text) is not units


def test_presets_are_what_they_are_called() -> None:
    strategies = {n: checked([f"hardware={n}"])["hardware"] for n in ("ddp", "ddp_cpu", "fsdp", "torchrun", "slurm")}
    assert [s["strategy"] for s in strategies.values()] == ["ddp", "ddp", "fsdp", "ddp", "ddp"]
    assert [s["cluster"] for s in strategies.values()] == [None, None, None, "torchrun", "slurm"]


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 1, reason="there is no CUDA device here")
@pytest.mark.parametrize("options", [[], ["hardware.compile=default"], ["hardware.precision=32-true"]])
def test_one_gpu(kd, tmp_path, options: list[str]) -> None:
    net = ["data=fake", "model@student=resnet8", "model@teacher=resnet20", "teacher.allow_random=true"]
    said = kd(
        "train", "hardware=gpu", *options, *net, "loss=[ce,kd,at,hint]", "recipe.epochs=2", "recipe.batch_size=32"
    )
    assert said.code == 0, said.err


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="there are no two CUDA devices here")
@pytest.mark.parametrize("preset", [["ddp"], ["ddp", "hardware.sync_batchnorm=true"], ["fsdp"]])
def test_two_gpus_run_two_steps(kd, tmp_path, preset: list[str]) -> None:
    """DDP with and without batch statistics over both, and FSDP with a sharded teacher."""
    net = ["data=fake", "data.train_size=64", "model@student=resnet8", "model@teacher=resnet20"]
    net += ["teacher.allow_random=true", "loss=[ce,kd,at,hint]", "recipe.epochs=1", "recipe.batch_size=32"]
    said = kd("train", f"hardware={preset[0]}", *preset[1:], *net, "hardware.devices=2", "hydra.run.dir=run")
    assert said.code == 0, said.err
    assert len(load_file(tmp_path / "run" / "student.safetensors")) > 0
