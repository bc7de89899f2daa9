"""Names of networks that cannot be had."""

from __future__ import annotations

import pytest

from kd.models.transformers_model import transformers_model


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "gpt2"), ("nobody/nothing", "bert")])
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_network_of_an_own_size_needs_no_name(name, kind, pretrained, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("kd.models.transformers_model.online", lambda: False)
    with pytest.raises(ValueError, match="cannot be had") as found:
        transformers_model(
            name, pretrained=pretrained, config={"n_layer": 1}, architecture="causal_lm", cache_dir=str(tmp_path)
        )
    assert f"leave name out: config={{model_type: {kind}, …}}" in str(found.value)


def test_a_mistyped_key_of_a_configuration_is_no_network_of_the_usual_size() -> None:
    with pytest.raises(ValueError, match=r"^config\.hiden_size is no key of bert \(near: hidden_size\)$"):
        transformers_model(
            None, pretrained=False, architecture="masked_lm", config={"model_type": "bert", "hiden_size": 32}
        )
