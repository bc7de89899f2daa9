"""Activations that are computed again: the same gradients, the same cache in generation, or one sentence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from kd.config.compose import checked
from kd.distill.distiller import Distiller
from kd.distill.objective import Objective
from kd.errors import KdError
from kd.losses.base import Batch
from kd.losses.hidden.hidden_mse import HiddenMSE
from kd.losses.logits.ce import CrossEntropy
from kd.losses.logits.kd import KnowledgeDistillation
from kd.models.checkpointing import checkpoint_gradients
from kd.models.timm_model import timm_model
from kd.models.transformers_model import transformers_model
from kd.run import build
from kd.tasks.classification import Classification
from kd.tasks.text_classification import TextClassification
from kd.tasks.tokens import CausalLM
from tests.test_on_policy import on_policy
from tests.test_text_runs import arguments, run
from tests.tiny_language import BERT, LLAMA, Texts

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "num_classes": 3, "input_shape": (3, 8, 8)}


def images(kind: str) -> Batch:
    return Batch(torch.randn(4, 3, 8, 8), torch.arange(4) % 3, torch.arange(4))


def texts(kind: str) -> Batch:
    return Texts(kind).batches("train")[0]


CASES: dict[str, Any] = {
    "causal_lm": (lambda: transformers_model(config=LLAMA, architecture="causal_lm"), CausalLM, texts),
    "text_classification": (
        lambda: transformers_model(config={**BERT, **STILL}, architecture="sequence_classification", num_classes=3),
        *(TextClassification, texts),
    ),
    "images": (lambda: timm_model("vit_tiny_patch16_224", **VIT), Classification, images),
}


def gradients(kind: str, student: nn.Module, teacher: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    """Of one step of CE, KD and hidden states; and how often a layer of the student has run in it."""
    terms = {"ce": CrossEntropy(), "kd": KnowledgeDistillation(2.0)}
    if kind != "images":
        terms["hidden"] = HiddenMSE(student_taps=[1, 2], teacher_taps=[1, 2])
    module, calls = Distiller(student, teacher, Objective(terms), CASES[kind][1]()), []
    torch.manual_seed(1)
    batch = CASES[kind][2](kind)
    module.prepare(batch)
    inner = next(m for n, m in student.named_modules() if n.endswith((".mlp", ".0.intermediate")))
    inner.register_forward_pre_hook(lambda *_: calls.append(1))
    module.losses(module.task.rows(module.compose(batch))).total.backward()
    return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}, len(calls)


@pytest.mark.parametrize("kind", CASES)
def test_gradients_are_the_same_and_layers_run_twice(kind: str) -> None:
    torch.manual_seed(0)
    student, teacher = CASES[kind][0](), CASES[kind][0]()
    again = copy.deepcopy(student)
    checkpoint_gradients(again)
    plain, once = gradients(kind, student, copy.deepcopy(teacher))
    found, twice = gradients(kind, again, teacher)
    assert (once, twice) == (1, 2)
    assert found.keys() == plain.keys()
    torch.testing.assert_close(found, plain)


def test_generation_keeps_its_cache() -> None:
    """After the prompts each step feeds the student one token, in a student that is trained with checkpointing."""
    module = on_policy(share=1.0)
    checkpoint_gradients(module.student)
    module.train()
    fed = []
    layer = module.student.model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: fed.append(args[0].shape[1]))
    module.write([torch.tensor([5, 6, 7]), torch.tensor([9])])
    assert fed[0] == 3
    assert len(fed) > 1
    assert {*fed[1:]} == {1}
    assert module.student.training


@pytest.mark.slow
def test_a_run_with_it_is_the_run_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"on": "true", "off": "false"}.items():
        run(capsys, *arguments("causal_lm", tmp_path / name, f"hardware.gradient_checkpointing={value}"))
    on, off = (load_file(tmp_path / name / "student_last.safetensors") for name in ("on", "off"))
    torch.testing.assert_close(on, off)
    assert "checkpointing" not in (tmp_path / "on" / "selected" / "config.json").read_text()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "on" / "selected")


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (["model@student=mlp"], "student: MLP is neither of transformers nor of timm"),
        (["data=fake", "model@student=resnet8"], "student: its batch norm would see each batch twice"),
        (
            ["data=fake", "model@student=timm", "student.model.name=convit_tiny"],
            "student: ConVit: gradient checkpointing not supported",
        ),
    ],
)
def test_a_network_that_cannot_is_one_sentence(network: list[str], sentence: str) -> None:
    config = checked([*network, "hardware=cpu", "hardware.gradient_checkpointing=true"])
    with pytest.raises(KdError, match=rf"hardware\.gradient_checkpointing = true is not possible for {sentence}"):
        build.distiller(config, build.datamodule(config))


def test_low_rank_matrices_and_sentence_embeddings_have_it_as_well() -> None:
    lora = transformers_model(config=LLAMA, architecture="causal_lm", lora={"r": 2})
    embedding = transformers_model(config=BERT, architecture="embedding")
    for network in (lora, embedding):
        checkpoint_gradients(network)
        inputs = Texts().batches("train")[0].inputs
        answer = network(**inputs)
        (answer if isinstance(answer, torch.Tensor) else answer.logits).square().mean().backward()
        assert any(p.grad is not None and p.grad.any() for p in network.parameters() if p.requires_grad)
        assert any(getattr(m, "gradient_checkpointing", False) for m in network.modules())
