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
