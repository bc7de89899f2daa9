"""Students made from their teachers: layers, widths, embeddings."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from kd.models.surgery import Surgery, chosen_layers, student_of
from kd.models.transformers_model import transformers_model
from kd.models.vocabulary import restrict
from tests.tiny_language import BERT, LLAMA, VOCABULARY, sequences

WIDE = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 32}
GPT2 |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEACHERS: dict[str, tuple[dict[str, Any], str]] = {
    "bert": ({**BERT, **WIDE}, "masked_lm"),
    "roberta": ({**BERT, **WIDE, "model_type": "roberta", "bos_token_id": 1, "eos_token_id": 2}, "masked_lm"),
    "gpt2": (GPT2, "causal_lm"),
    "llama": ({**LLAMA, **WIDE, "num_key_value_heads": 2, "head_dim": 16}, "causal_lm"),
    "qwen3": ({**LLAMA, **WIDE, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16}, "causal_lm"),
    "gemma2": ({**LLAMA, **WIDE, "model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 16}, "causal_lm"),
    "distilbert": (
        {
            "model_type": "distilbert",
            "dim": 64,
            "n_layers": 4,
            "n_heads": 4,
            "hidden_dim": 48,
            "vocab_size": VOCABULARY,
        },
        "sequence_classification",
    ),
}
TEACHERS["roberta with classes"] = (TEACHERS["roberta"][0], "sequence_classification")  # its head has an out_proj, too
OF_WIDTHS = [name for name in TEACHERS if name != "gpt2"]  # whose query, key and value are matrices of their own


@dataclass
class Kept:
    """Which of how many tokens are kept."""

    kept: Tensor
    whole: int


def teacher(name: str) -> nn.Module:
    config, architecture = TEACHERS[name]
    return transformers_model(config=config, architecture=architecture, num_classes=3).eval()


@pytest.mark.parametrize(
    ("layers", "total", "keep", "expected"),
    [
        (6, 12, "uniform", [0, 2, 4, 7, 9, 11]),  # DistilBERT's
        (3, 12, "uniform", [0, 6, 11]),  # DistilBART's 12-3
        (1, 6, "uniform", [5]),
        (None, 6, "every_other", [0, 2, 4]),
        (3, 6, "first", [0, 1, 2]),
        (2, 6, "last", [4, 5]),
        (3, 6, "ends", [0, 1, 5]),
        ([1, 4], 6, "uniform", [1, 4]),
        (None, 3, "uniform", [0, 1, 2]),
    ],
)
def test_which_layers_are_kept(layers: Any, total: int, keep: str, expected: list[int]) -> None:
    assert chosen_layers(layers, total, keep) == expected


@pytest.mark.parametrize("layers", [0, 7, [4, 1], [1, 1], [6], [], "3", True])
def test_layers_that_are_not_there(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"layers = .* is not allowed"):
        chosen_layers(layers, 6)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_with_everything_answers_as_its_teacher(name: str) -> None:
    given, inputs = teacher(name), sequences(3)
    made = student_of(given, Surgery()).eval()
    assert torch.equal(made(**inputs).logits, given(**inputs).logits)
    assert not {id(p) for p in made.parameters()} & {id(p) for p in given.parameters()}


@pytest.mark.parametrize("name", TEACHERS)
def test_layers_are_the_teachers(name: str) -> None:
    """With two of four layers the student answers as a teacher without the other two."""
    given, inputs = teacher(name), sequences(3)
    made = student_of(given, Surgery(layers=[0, 3])).eval()
    assert made.config.num_hidden_layers == 2
    stack = next(m for m in given.modules() if isinstance(m, nn.ModuleList) and len(m) == 4)
    del stack[1:3]
    if hasattr(given.config, "layer_types"):  # Gemma, Qwen: which of them have a window
        given.config.layer_types = [given.config.layer_types[i] for i in (0, 3)]
    given.config.num_hidden_layers = 2
    without = {"use_cache": False} if TEACHERS[name][1] == "causal_lm" else {}
    torch.testing.assert_close(made(**inputs).logits, given(**inputs, **without).logits)


@pytest.mark.parametrize("name", OF_WIDTHS)
def test_a_width_is_cut_to_what_has_the_largest_weights(name: str) -> None:
    given, inputs = teacher(name), sequences(3)
    kept = torch.arange(0, 64, 2)
    table = given.get_input_embeddings()
    with torch.no_grad():
        table.weight[:, kept] *= 50
    made = student_of(given, Surgery(hidden=32, intermediate=24)).eval()
    assert made.config.hidden_size == 32
    assert torch.equal(made.get_input_embeddings().weight, table.weight[:, kept])
    assert made(**inputs).logits.isfinite().all()
    assert sum(p.numel() for p in made.parameters()) < 0.45 * sum(p.numel() for p in given.parameters())


def test_heads_that_add_nothing_are_dropped_without_a_change() -> None:
    """Units, heads and neurons of the teacher that are zero are the ones that go: the answers stay."""
    given, inputs = teacher("llama"), sequences(3)
    with torch.no_grad():
        for layer in given.model.layers:
            layer.self_attn.o_proj.weight[:, 32:] = 0  # the second group of two heads
            layer.mlp.down_proj.weight[:, 24:] = 0
            layer.mlp.gate_proj.weight[24:] = 0
            layer.mlp.up_proj.weight[24:] = 0
    made = student_of(given, Surgery(intermediate=24)).eval()
    torch.testing.assert_close(made(**inputs).logits, given(**inputs).logits)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_heads_of_attention_are_dropped_at_the_same_width(name: str, tmp_path: Path) -> None:
    """Heads that write nothing are the ones that go: the answers stay, and the folder loads."""
    given, inputs = teacher(name), sequences(3)
    with torch.no_grad():
        for layer in given.model.layers:
            layer.self_attn.o_proj.weight[:, :32] = 0  # the first group of two heads
    made = student_of(given, Surgery(heads=2)).eval()
    assert (made.config.num_attention_heads, made.config.num_key_value_heads, made.config.hidden_size) == (2, 1, 64)
    torch.testing.assert_close(made(**inputs).logits, given(**inputs).logits)
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, made(**inputs).logits)
    for heads in (0, 1, 6):
        with pytest.raises(ValueError, match=f"heads = {heads} is not allowed: a multiple of 2 up to 4"):
            student_of(given, Surgery(heads=heads))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_student_may_tie_what_its_teacher_does_not(name: str, tmp_path: Path) -> None:
    config, architecture = TEACHERS[name]
    given = transformers_model(config={**config, "tie_word_embeddings": False}, architecture=architecture).eval()
    made, inputs = student_of(given, Surgery(embeddings="tied")).eval(), sequences(3)
    table = made.get_input_embeddings().weight
    assert made.get_output_embeddings().weight is table
    assert torch.equal(table, given.get_input_embeddings().weight)
    with torch.no_grad():  # the teacher's answers, were its own two matrices one
        given.get_output_embeddings().weight.copy_(table)
    torch.testing.assert_close(made(**inputs).logits, given(**inputs).logits)
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM if name == "llama" else AutoModelForMaskedLM
    assert torch.equal(loaded.from_pretrained(tmp_path)(**inputs).logits, made(**inputs).logits)


def test_nothing_is_tied_in_a_classifier() -> None:
    with pytest.raises(ValueError, match="embeddings = tied is not allowed: a DistilBertForSequenceClassification has"):
        student_of(teacher("distilbert"), Surgery(embeddings="tied"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", TEACHERS)
def test_a_restricted_network_answers_as_the_whole_one(name: str, tied: bool, tmp_path: Path) -> None:
    """Its logits are the whole one's at the kept ids; it trains, is cut further, and loads from its folder."""
    config, architecture = TEACHERS[name]
    whole = transformers_model(
        config={**config, "tie_word_embeddings": tied}, architecture=architecture, num_classes=3
    ).eval()
    with torch.no_grad():
        for key, bias in whole.named_parameters():
            if key.endswith("bias"):
                bias.normal_()
    kept = torch.tensor([0, 2, 3, 5, 8, 13, 21, 34, 39])
    made = copy.deepcopy(whole)
    restrict(made, Kept(kept, VOCABULARY))
    ids = torch.randint(1, len(kept), (2, 6), generator=torch.Generator().manual_seed(0))
    wanted, found = whole(input_ids=kept[ids]).logits, made(input_ids=ids).logits
    torch.testing.assert_close(found, wanted if wanted.shape[-1] == 3 else wanted[..., kept], rtol=0, atol=1e-6)
    assert made.config.vocab_size == made.get_input_embeddings().num_embeddings == len(kept)
    if made.get_output_embeddings() is not None:
        assert (made.get_output_embeddings().weight is made.get_input_embeddings().weight) == tied
    ends = getattr(made.config, "eos_token_id", None)
    assert ends == (None if whole.config.eos_token_id is None else kept.tolist().index(whole.config.eos_token_id))
    student = student_of(made, Surgery(layers=2))
    student(input_ids=ids).logits.square().mean().backward()
    assert student.get_input_embeddings().weight.grad.shape[0] == len(kept)
    student.eval().save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=ids).logits, student(input_ids=ids).logits)
    restrict(made, Kept(kept, VOCABULARY))  # it has the kept tokens alone: nothing is left to cut
    assert torch.equal(made(input_ids=ids).logits, found)


def test_a_network_of_another_vocabulary_is_not_restricted() -> None:
    with pytest.raises(ValueError, match=r"40 tokens, data\.tokenizer 50, of which .* keeps 3"):
        restrict(teacher("bert"), Kept(torch.arange(3), 50))


def test_embeddings_and_all_weights_may_begin_at_random() -> None:
    given = teacher("bert")
    table = given.get_input_embeddings().weight
    layer = "bert.encoder.layer.0.output.dense.weight"
    fresh = student_of(given, Surgery(layers=2, embeddings="random"))
    assert not torch.equal(fresh.get_input_embeddings().weight, table)
    assert torch.equal(fresh.state_dict()[layer], given.state_dict()[layer])
    assert not torch.equal(
        student_of(given, Surgery(layers=2, initialise=False)).state_dict()[layer], given.state_dict()[layer]
    )


@pytest.mark.parametrize(
    ("surgery", "sentence"),
    [
        ({"hidden": 40}, "hidden = 40 is not allowed: a multiple of 16"),
        ({"hidden": 128}, "hidden = 128 is not allowed"),
        ({"intermediate": 100}, "intermediate = 100 is not allowed: it must be from 1 to 48"),
        ({"keep": "some"}, "keep = some is not allowed: it must be uniform, every_other, first, last or ends"),
        ({"embeddings": "shared"}, "embeddings = shared is not allowed: it must be copied, tied or random"),
        ({"heads": 2}, "heads = 2 is not allowed: those of a bert are cut by hidden"),
    ],
)
def test_what_cannot_be_kept_is_one_sentence(surgery: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        student_of(teacher("bert"), Surgery(**surgery))


@pytest.mark.parametrize(
    ("inner", "surgery", "sentence"),
    [
        (None, {"hidden": 32}, "c_attn cannot be cut from 192 to 96: .* cut layers alone"),
        (None, {"intermediate": 24}, "intermediate = 24 .* a gpt2 does not say how wide .* cut layers alone"),
        (48, {"intermediate": 24}, r"mlp\.c_fc cannot be cut from 48 to 24: .* cut layers alone"),
    ],
)
def test_widths_of_gpt2_are_refused(inner: int | None, surgery: dict[str, Any], sentence: str) -> None:
    """Its query, key and value are one matrix, and none of its matrices is an ``nn.Linear``."""
    given = transformers_model(config={**GPT2, "n_inner": inner}, architecture="causal_lm")
    with pytest.raises(ValueError, match=sentence):
        student_of(given, Surgery(**surgery))


def test_other_networks_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="Linear cannot be cut: it is no network of transformers"):
        student_of(nn.Linear(2, 2), Surgery(layers=1))
