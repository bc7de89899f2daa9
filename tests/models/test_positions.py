"""How many positions a network of transformers takes, whatever is around it."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from kd.losses.networks import unwrapped
from kd.models.positions import positions_of
from kd.models.transformers_model import transformers_model

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}


@pytest.mark.parametrize(
    ("config", "most"),
    [
        ({"model_type": "bert", "max_position_embeddings": 32, "pad_token_id": 0}, 32),
        ({"model_type": "roberta", "max_position_embeddings": 34, "pad_token_id": 1}, 32),
        ({"model_type": "gpt2", "n_positions": 32, "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 20}, 32),
        ({"model_type": "llama", "max_position_embeddings": 32, "num_key_value_heads": 2}, 32),
        ({"model_type": "deberta-v2", "max_position_embeddings": 32}, 32),
        ({"model_type": "deberta-v2", "max_position_embeddings": 32, "position_biased_input": False}, None),
        ({"model_type": "xlnet", "d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8, "vocab_size": 20}, None),
    ],
)
def test_positions_of_a_network(config: dict[str, Any], most: int | None) -> None:
    sizes = SMALL if config["model_type"] not in ("gpt2", "xlnet") else {}
    assert positions_of(transformers_model(config={**sizes, **config}, architecture="embedding")) == most


def test_positions_of_a_network_in_an_adapter_and_of_one_that_knows_none() -> None:
    config = {**SMALL, "model_type": "llama", "max_position_embeddings": 32, "num_key_value_heads": 2}
    wrapped = transformers_model(config=config, architecture="causal_lm", lora={"r": 2, "target_modules": ["q_proj"]})
    assert positions_of(wrapped) == 32
    assert type(unwrapped(wrapped)).__name__ == "LlamaForCausalLM"
    assert positions_of(nn.Linear(2, 2)) is None
