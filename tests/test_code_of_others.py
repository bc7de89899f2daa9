"""Code that comes with a tokenizer or a configuration is never run, whatever is answered to transformers' question."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

import kd.deploy.student as deployed
from kd.data.text import tokenizer
from kd.deploy.subjects import subject
from kd.errors import KdError
from kd.models.transformers_model import description, transformers_model
from kd.run import described
from kd.run.tokenizers import with_tokenizers
from tests.stranger import with_code
from tests.tiny_language import BERT

NOT_RUN = "it comes with code of its own, which is not run"


@pytest.fixture(autouse=True)
def answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever is asked says yes; code would be copied into a folder of this test."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "stranger"
    tokenizer.wrapped(tokenizer.trained(["a b c d"] * 9, 60, "wordpiece", True)).save_pretrained(place)
    return with_code(place)


def test_of_the_datas_tokenizer(folder: Path) -> None:
    with pytest.raises(KdError, match=rf"data\.tokenizer = {re.escape(str(folder))} cannot be loaded.*\({NOT_RUN}\)"):
        tokenizer.tokenizer(str(folder), "bpe", list, None, None)


def test_of_the_teachers_tokenizer(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = {"_target_": "kd.models.transformers_model.transformers_model", "name": str(folder), "pretrained": True}
    with caplog.at_level(logging.INFO):
        assert with_tokenizers({"data": {"teacher_tokenizer": None}}, [(model, None)])["teacher_tokenizer"] is None
    assert f"({folder}: {NOT_RUN})" in caplog.text


def test_of_a_runs_tokenizer(folder: Path) -> None:
    with pytest.raises(KdError, match=rf"the tokenizer in .* cannot be loaded: {NOT_RUN}"):
        deployed._tokenizer(folder)


def test_of_a_network_that_is_measured(tmp_path: Path) -> None:
    with pytest.raises(KdError, match=rf"hf:.*: {NOT_RUN}$"):
        subject(f"hf:{with_code(tmp_path, config=True)}")


def test_of_a_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"name = .* \({NOT_RUN}\)"):
        transformers_model(str(with_code(tmp_path, config=True)), architecture="masked_lm")


def test_a_network_that_transformers_knows_is_described_without_the_code_that_came_with_it() -> None:
    made = transformers_model(config=BERT, architecture="masked_lm")
    made.config.auto_map = {"AutoModelForMaskedLM": "stranger.Network"}
    node = description(made)
    assert node is not None
    assert "auto_map" not in node["config"]
    assert described.network(node, "FILE")["config"] == node["config"]
