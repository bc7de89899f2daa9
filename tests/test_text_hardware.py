"""Language models in bfloat16, and student and teacher sharded over two processes (gloo)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.test_text_runs import arguments, run

DTYPES = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), DTYPES.items())
def test_text_trains_in_bfloat16(precision, dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = tmp_path / "run"
    run(capsys, *arguments("causal_lm", where, f"hardware.precision={precision}"))
    weights = load_file(where / "student_last.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    last = json.loads((where / "result.json").read_text())["student"]["last"]
    assert 0 < last["train"]["kd"] < 10
    assert 0 < last["val"]["nll"] < 10


@pytest.mark.slow
def test_student_and_teacher_are_sharded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With gradient checkpointing; the losses are those of one process, and transformers loads what comes of it."""
    (tmp_path / "book.txt").write_text("".join(f"line {n} is {n % 7} words and {n % 5} more\n" for n in range(200)))
    text = [f"data.train={tmp_path / 'book.txt'}", "data.length=16", "data.tokenizer.vocabulary=300", "data.cache=null"]
    text += [
        "data.test_fraction=0.2",
        "recipe.epochs=1",
        "recipe.optimizer.lr=1e-3",
        "hardware.gradient_checkpointing=true",
    ]
    found = {}
    for name, more in {"one": [], "two": ["hardware.strategy=fsdp", "hardware.devices=2"]}.items():
        given = [a.replace("vocab_size: 40", "vocab_size: 300") for a in arguments("causal_lm", tmp_path / name)]
        made = [a for a in given if not a.startswith(("~data", "+data", "recipe.epochs"))]
        run(capsys, *made, "data=lm", "recipe=finetune", "recipe.batch_size=8", *text, *more)
        found[name] = json.loads((tmp_path / name / "result.json").read_text())
        assert (tmp_path / name / "train.log").read_text().count("the allocator keeps") <= 1
    assert found["two"]["processes"] == 2
    for split, metric in (("train", "kd"), ("train", "ce"), ("val", "nll")):
        one, two = (found[name]["student"]["last"][split][metric] for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-3)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "selected")
