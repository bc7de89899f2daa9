"""Decoders that classify answer at the last token, whatever is padded behind it, and by whichever id."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from kd.data.text.tokenizer import trained, wrapped
from kd.data.text.vocabulary import restrict
from kd.models.surgery import Surgery, student_of
from kd.models.transformers_model import description, transformers_model
from kd.run import networks
from kd.run.library_files import open_folders
from tests.tiny_language import BERT, LLAMA

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40}
DECODERS = {"gpt2": {**GPT2, "eos_token_id": 2, "bos_token_id": 1}, "llama": LLAMA}
PAD = 3


class Tokenizer:
    """As much of a tokenizer as a network takes."""

    pad_token_id, bos_token_id, eos_token_id = PAD, 1, 2

    def __len__(self) -> int:
        return 40


def classifier(config: dict[str, Any], name: Any = None, architecture: str = "sequence_classification") -> Any:
    more = {"name": str(name)} if name is not None else {"config": config, "pretrained": False}
    return transformers_model(**more, architecture=architecture, num_classes=3, tokenizer=Tokenizer()).eval()


def batched_and_alone(network: Any, row: list[int], pad: int = PAD) -> tuple[torch.Tensor, torch.Tensor]:
    """The answer to a row beside a longer one, and by itself."""
    padded, longer = [*row, pad, pad], [*row, row[0], row[1]]
    mask = torch.tensor([[1] * len(longer), [1] * len(row) + [0, 0]])
    with torch.no_grad():
        both = network(input_ids=torch.tensor([longer, padded]), attention_mask=mask).logits
        alone = network(input_ids=torch.tensor([row]), attention_mask=mask[:1, : len(row)]).logits
    return both[1], alone[0]


@pytest.mark.parametrize("architecture", ["sequence_classification", "sequence_regression"])
@pytest.mark.parametrize("pad", [0, None])
@pytest.mark.parametrize("name", DECODERS)
def test_the_pad_is_the_tokenizers(name: str, pad: int | None, architecture: str, tmp_path: Path) -> None:
    """Of a configuration with another pad; of weights that know none; of what is written and described of them."""
    torch.manual_seed(0)
    config = {**DECODERS[name], "pad_token_id": pad}
    made = classifier(config, architecture=architecture)
    made.config.pad_token_id = pad
    made.save_pretrained(tmp_path / "given")
    loaded = classifier({}, tmp_path / "given", architecture)
    cut = student_of(loaded, Surgery(layers=1)).eval()
    for network in (classifier(config, architecture=architecture), loaded, cut):
        assert network.config.pad_token_id == PAD
        assert torch.allclose(*batched_and_alone(network, [5, 6, 7]), atol=1e-6)
    node = description(loaded)
    assert node is not None
    assert node["config"]["pad_token_id"] == PAD
    (tmp_path / "run").mkdir()
    open_folders(tmp_path / "run", loaded, None, [])
    written = AutoModelForSequenceClassification.from_config(
        type(loaded.config).from_pretrained(tmp_path / "run" / "selected")
    )
    assert written.config.pad_token_id == PAD


def test_an_encoder_keeps_its_own_pad() -> None:
    """RoBERTa counts its positions by it."""
    config = {**BERT, "model_type": "roberta", "pad_token_id": 1}
    assert classifier(config).config.pad_token_id == 1


def test_a_restricted_decoder_knows_the_restricted_pad(tmp_path: Path) -> None:
    """From its name, and from the weights of a run on the whole vocabulary; the pad is another id than before."""
    texts = ["the ship sailed over the wide water", "roses grow in the garden"]
    whole = wrapped(trained(texts * 9, 300, "bpe", False))
    whole.pad_token = "den" if "den" in whole.get_vocab() else max(whole.get_vocab(), key=whole.get_vocab().get)
    small, restriction = restrict(whole, "0", texts[:1], None)
    assert small.pad_token_id != whole.pad_token_id
    torch.manual_seed(0)
    config = {**LLAMA, "vocab_size": len(whole), "pad_token_id": None}
    given = transformers_model(
        config=config, pretrained=False, architecture="sequence_classification", num_classes=3, tokenizer=whole
    )
    given.config.pad_token_id = None
    given.save_pretrained(tmp_path)
    spec = {"_target_": "kd.models.transformers_model.transformers_model", "name": str(tmp_path)}
    more = {"architecture": "sequence_classification", "tokenizer": small, "restriction": restriction}
    made = networks.network(spec, "student.model", 3, (16,), **more)
    data = SimpleNamespace(
        num_classes=3, input_shape=(16,), tokenizer=small, restriction=restriction, tokenizer_digest="1"
    )
    file = (given.state_dict(), {"data": {"tokenizer": "0", "num_classes": 3}}, "run")
    from_run = networks.trained(spec, "teacher.model", data, more, file)
    row = small(texts[0], add_special_tokens=False)["input_ids"][:3]
    for network in (made.eval(), from_run.eval()):
        assert network.config.pad_token_id == small.pad_token_id
        assert torch.allclose(*batched_and_alone(network, row, small.pad_token_id), atol=1e-6)
