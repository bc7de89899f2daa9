"""``kd bench``: counts by hand, ratios of known times, two networks in turns, and what cannot be measured."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kd.cli.main import main
from kd.deploy import backends
from kd.deploy.bench import Plan, bench, interleaved, ratio
from kd.deploy.student import Student, from_raw
from kd.deploy.subjects import Subject, subject
from kd.errors import KdError
from kd.tasks.classification import Classification


def of(network: nn.Module, shape: tuple[int, ...] = (3, 4, 4)) -> Subject:
    """A network of images that no run has trained."""
    facts = {"input_shape": shape, "mean": [0.0] * shape[0], "std": [1.0] * shape[0]}
    given = Student(Path(), Path(), {"data": {}}, None, network.eval(), Classification(), facts)
    return Subject("made", from_raw(given, None), shape)


def linear(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, width), nn.Linear(width, 5))


def test_sizes_are_those_counted_by_hand() -> None:
    plan = Plan(["eager"], [1, 3], 10, memory=False)
    found = bench({"student": of(linear(2)), "teacher": of(linear(20))}, {"student": [], "teacher": []}, plan)
    assert found.sizes["student"].parameters == 48 * 2 + 2 + 2 * 5 + 5
    assert found.sizes["student"].macs == 48 * 2 + 2 * 5
    assert found.sizes["teacher"].macs == 48 * 20 + 20 * 5
    assert found.sizes["teacher"].weight_bytes == 4 * found.sizes["teacher"].parameters
    assert [(s.backend, s.batch_size) for s in found.speeds] == [("eager", 1), ("eager", 3)]
    for speed in found.speeds:
        assert speed.interval[0] <= speed.ratio <= speed.interval[1]
        for name, percentiles in speed.milliseconds.items():
            assert 0 < percentiles["p50"] <= percentiles["p95"] <= percentiles["p99"]
            assert speed.throughput[name] == pytest.approx(1000 * speed.batch_size / percentiles["p50"])
    assert found.machine["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_the_ratio_of_known_times() -> None:
    slow = np.asarray([2.0, 2.2, 1.9, 2.1, 2.0] * 4)
    found, (low, high) = ratio([slow, 4 * slow], seed=0)
    assert (found, low, high) == pytest.approx((0.25, 0.25, 0.25))
    drift = np.linspace(1, 3, 20)  # a machine that becomes slower meets both
    noise = np.random.default_rng(0).lognormal(0, 0.05, 20)
    found, (low, high) = ratio([drift * noise, 2 * drift], seed=0)
    assert low < found < high
    assert (low, high) == pytest.approx((0.5, 0.5), abs=0.03)
    assert ratio([slow], seed=0) == (None, None)


def test_rounds_measure_each_once_in_a_drawn_order() -> None:
    order: list[str] = []

    def of_name(name: str, seconds: float) -> Any:
        return lambda: (order.append(name), time.sleep(seconds))

    found = interleaved({"a": of_name("a", 0.0005), "b": of_name("b", 0.002)}, 12, 1, seed=0)
    assert {name: len(times) for name, times in found.items()} == {"a": 12, "b": 12}
    assert np.median(found["b"]) > 2 * np.median(found["a"])
    changes = "".join(name for place, name in enumerate(order[-72:]) if place % 3 == 2)  # a timer runs it 3 times
    rounds = {changes[place : place + 2] for place in range(0, 24, 2)}
    assert rounds == {"ab", "ba"}


def test_bf16_runs_in_bf16() -> None:
    network = linear(4)
    made = backends.bf16(of(network), torch.device("cpu"), Path(), 1, 1)
    answer = made(of(network).example(2, 1))()
    assert answer.dtype == torch.bfloat16
    assert network[1].weight.dtype == torch.float32
    expected = backends.eager(of(network), torch.device("cpu"), Path(), 1, 1)(of(network).example(2, 1))()
    torch.testing.assert_close(answer.float(), expected, rtol=0.1, atol=0.1)


def test_a_generator_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a second a token, whatever this machine does beside it."""
    from transformers import GPT2Config

    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=30, n_positions=32)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    one = subject(f"hf:{tmp_path}")
    assert one.generates

    def a_second_a_token(passes: dict[str, Any], rounds: int, *more: Any) -> dict[str, Any]:
        """Let the seconds be the new tokens; a pass that writes nothing takes one."""
        written = {name: one() for name, one in passes.items()}
        of = {name: answer.shape[1] - 8 if answer.ndim == 2 else 1 for name, answer in written.items()}
        return {name: np.full(rounds, float(seconds)) for name, seconds in of.items()}

    monkeypatch.setattr("kd.deploy.bench.interleaved", a_second_a_token)
    plan = Plan(["eager"], [1], 10, length=8, new_tokens=4, memory=False)
    found = bench({"network": one}, {"network": []}, plan)
    assert found.writing is not None
    assert found.writing.tokens_per_second["network"] == 1
    assert found.writing.first_token_ms["network"] == 1000
    with pytest.raises(KdError, match=r"length = 30 and new_tokens = 4 is not allowed: .* has 32 positions"):
        bench({"network": one}, {"network": []}, replace(plan, length=30))


@pytest.mark.slow
def test_a_run_beside_its_teacher(teacher_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "bench.json"
    argv = ["train", f"teacher.checkpoint={teacher_run}", "loss=[ce,kd]", "recipe.epochs=1", "hardware=cpu"]
    assert main([*argv, f"hydra.run.dir={run}"]) == 0
    argv = ["bench", str(run), "against=teacher", "backends=eager,onnx,int8", "batch_sizes=1,4", "rounds=10"]
    assert main([*argv, f"out={out}"]) == 0
    kept, ran = json.loads(out.read_text()), json.loads((run / "result.json").read_text())
    for side in ("student", "teacher"):
        for key in ("parameters", "macs"):
            assert kept["sizes"][side][key] == ran[side][key]
        assert kept["sizes"][side]["peak_bytes"] > kept["sizes"][side]["weight_bytes"]
    assert len(kept["speeds"]) == 6
    assert "1 MAC = 2 FLOPs" in capsys.readouterr().out


def test_a_teacher_whose_answers_were_kept(teacher_run: Path, tmp_path: Path) -> None:
    kept = ["teacher.answers._target_=kd.distill.cache.CachedAnswers", f"teacher.answers.folder={tmp_path / 'kept'}"]
    argv = ["train", f"teacher.checkpoint={teacher_run}", "loss=[ce]", "recipe.epochs=1", "hardware=cpu", *kept]
    assert main([*argv, f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    one = subject("teacher", str(tmp_path / "run"))
    assert one.parameters == json.loads((teacher_run / "result.json").read_text())["student"]["parameters"]


def test_a_weights_file_is_its_network(teacher_run: Path) -> None:
    one = subject(str(teacher_run / "student.safetensors"))
    assert one.parameters == json.loads((teacher_run / "result.json").read_text())["student"]["parameters"]
    with pytest.raises(KdError, match="neither a run"):
        subject("timn:resnet18")
    with pytest.raises(KdError, match=r"timm:resnet81.*near"):
        subject("timm:resnet81")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["backend=onnx"], "near: backends"),
        (["backends=onx"], "near: onnx"),
        (["batch_sizes=0"], "batch_sizes = [0]"),
        (["batch_sizes=1.5"], "batch_sizes = 1.5"),
        (["rounds=3"], "rounds = 3"),
        (["device=tpu"], "device = tpu"),
        (["out=nowhere/b.json"], "out = nowhere/b.json"),
        (["checkpoint=b"], "given timm:a and b"),
    ],
)
def test_bad_arguments(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "run=timm:a", *argv]) == 1
    assert words in capsys.readouterr().err
