"""Sentences as vectors of a frozen encoder: pooling, splits, the cache, what is refused, and a run with an MLP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd.cli.main import main
from kd.data.text.encoder import Encoder
from kd.data.text.features import SentenceFeatures
from kd.data.text.sentences import Sentences
from kd.data.text.tokenizer import trained, wrapped
from kd.errors import KdError
from kd.run.data_facts import facts, same_data
from tests.stranger import with_code

WORDS = ("card", "money", "bank", "pin", "transfer", "late", "lost", "help")
CLASSES = ("arrival", "limits", "top up")
SIZE = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Texts that differ, of 4 to 9 words, with a class each."""
    return [
        {"text": " ".join(WORDS[(i * (k + 1) + k) % 8] for k in range(3 + i % 6)) + f" {i}", "label": CLASSES[i % 3]}
        for i in range(first, first + count)
    ]


def encoder(folder: Path, seed: int = 0, architecture: str = "BertModel") -> Path:
    """Write a tiny BERT with random weights and its tokenizer."""
    import transformers

    tokenizer = wrapped(trained([row["text"] for row in rows(60)], 120, "wordpiece", True))
    tokenizer.model_max_length = 32
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **SIZE)
    getattr(transformers, architecture)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder(tmp_path_factory.mktemp("encoder"))


def features(folder: Path | None, **options: Any) -> SentenceFeatures:
    given = {"train": rows(60), "test": rows(12, 100), "max_length": 32}
    data = SentenceFeatures(**{**given, "encoder": None if folder is None else str(folder), **options})
    data.setup()
    return data


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of texts of each encoding."""
    counts: list[int] = []
    real = Encoder.encode

    def counted(self: Encoder, texts: Any, *rest: Any) -> Any:
        counts.append(len(texts))
        return real(self, texts, *rest)

    monkeypatch.setattr(Encoder, "encode", counted)
    return counts


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalise", [False, True])
def test_a_vector_is_what_the_encoder_alone_makes_of_the_text(folder, pooling, normalise) -> None:
    from transformers import AutoModel, AutoTokenizer

    data = features(folder, pooling=pooling, normalise=normalise, max_length=8)
    assert data.input_shape == (16,)
    assert data.num_classes == 3
    network, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    seen = 0
    for batch in data.test_dataloader():
        for vector, target, index in zip(batch.inputs, batch.targets, batch.index.tolist(), strict=True):
            source = data.given["test"][index]
            inputs = tokenizer(source["text"], truncation=True, max_length=8, return_tensors="pt")
            with torch.no_grad():
                hidden = network(**inputs).last_hidden_state[0]
            wanted = hidden.mean(0) if pooling == "mean" else hidden[0]
            torch.testing.assert_close(vector, wanted / wanted.norm() if normalise else wanted, atol=1e-5, rtol=1e-4)
            assert data.class_names[target] == source["label"]
            seen += 1
    assert seen == 12


def test_pairs_are_encoded_together(folder) -> None:
    from transformers import AutoModel, AutoTokenizer

    pairs = [{**row, "other": f"late {i}"} for i, row in enumerate(rows(20))]
    data = features(folder, train=pairs, test=pairs[:4], overlap="keep", text_pair="other")
    network, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    batch = next(iter(data.test_dataloader()))
    for vector, row in zip(batch.inputs, pairs, strict=False):
        with torch.no_grad():
            wanted = network(**tokenizer(row["text"], row["other"], return_tensors="pt")).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"split_seed": 3}, {"train_size": 20, "seed": 5}, {"label_fraction": 0.5}])
def test_splits_and_labels_are_those_of_the_texts(folder, options) -> None:
    data = features(folder, title="set", **options)
    texts = Sentences(train=rows(60), test=rows(12, 100), tokenizer={"vocabulary": 120}, title="set", **options)
    texts.setup()
    assert data.sizes == texts.sizes
    assert data.split_facts == texts.split_facts
    assert torch.equal(data.train_index, texts.train_index)
    assert torch.equal(data.train_targets, texts.train_targets)
    assert data.seen == texts.seen


def test_an_epoch_shuffles_all_rows_and_repeats_itself(folder) -> None:
    data = features(folder, batch_size=16)
    loader = data.train_dataloader()
    first, again = (torch.cat([b.index for b in loader]) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, data.train_index)
    assert torch.equal(first.sort().values, data.train_index)
    by_index = dict(zip(data.train_index.tolist(), data.parts["train"].inputs, strict=True))
    for batch in loader:
        assert torch.equal(batch.inputs, torch.stack([by_index[i] for i in batch.index.tolist()]))


def test_what_is_in_the_cache_is_not_encoded_again(folder, tmp_path, forwards) -> None:
    first = features(folder, cache=str(tmp_path))
    again = features(folder, cache=str(tmp_path), split_seed=7, normalise=True)
    assert forwards == [72]  # another split, and vectors of length 1, are made of the same ones
    assert torch.equal(features(folder, cache=str(tmp_path)).parts["test"].inputs, first.parts["test"].inputs)
    torch.testing.assert_close(again.parts["test"].inputs.norm(dim=1), torch.ones(12))
    assert forwards == [72]


def test_what_decides_the_vectors_decides_the_key(folder, tmp_path, forwards) -> None:
    cache = str(tmp_path / "cache")
    one = features(folder, cache=cache)
    other = features(encoder(tmp_path / "other", seed=1), cache=cache)
    assert not torch.allclose(one.parts["test"].inputs, other.parts["test"].inputs)
    features(folder, cache=cache, pooling="cls")
    features(folder, cache=cache, max_length=6)
    features(folder, cache=cache, test=rows(13, 100))
    copied = shutil.copytree(folder, tmp_path / "copy")
    features(copied, cache=cache)  # the same files under another name
    (copied / "tokenizer_config.json").write_text((copied / "tokenizer_config.json").read_text() + "\n")
    features(copied, cache=cache)
    assert forwards == [72, 72, 72, 72, 73, 72]


@pytest.mark.parametrize("damage", ["truncated", "bytes", "key"])
def test_a_damaged_cache_is_made_anew(folder, tmp_path, forwards, caplog, damage) -> None:
    wanted = features(folder, cache=str(tmp_path)).parts["test"].inputs
    (place,) = tmp_path.glob("features-*")
    file = place / ("about.json" if damage == "key" else "values.npy")
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        del content[-100:]
    elif damage == "bytes":
        content[-2] ^= 0x40
    else:
        content = bytearray(content.replace(b'"key": "', b'"key": "0'))
    file.unlink()  # a mapped file is not changed under who reads it
    file.write_bytes(content)
    with caplog.at_level("WARNING"):
        found = features(folder, cache=str(tmp_path)).parts["test"].inputs
    assert f"{place} is not whole: the texts are encoded anew" in caplog.text
    assert forwards == [72, 72]
    assert torch.equal(found, wanted)
    features(folder, cache=str(tmp_path))
    assert forwards == [72, 72]


def test_nothing_half_written_is_left_behind(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(np, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    features(folder, cache=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"encoder": None}, "data.encoder = null is not allowed"),
        ({"encoder": "./nowhere"}, "data.encoder = ./nowhere: there is no such folder"),
        ({"pooling": "max"}, "data.pooling = max is not allowed: it must be mean or cls"),
        ({"normalise": 1}, "data.normalise = 1 is not allowed"),
        ({"tokenizer": "bert"}, "data.tokenizer = bert is not allowed"),
        ({"masking": 0.1}, "data.masking = 0.1 is not allowed"),
        ({"max_length": 64}, "data.max_length = 64 is not allowed: data.encoder takes 32 tokens at most"),
    ],
)
def test_bad_options_name_themselves(folder, options, words) -> None:
    with pytest.raises(KdError) as error:
        features(folder, **options)
    assert words in str(error.value)


def test_weights_that_are_not_there_are_refused(folder, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    copied = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(copied / "model.safetensors")
    lost = next(name for name in weights if "layer.1.output.dense.weight" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(KdError, match=r"has no weights for .*it would be random"):
        features(copied)
    (copied / "model.safetensors").write_bytes((copied / "model.safetensors").read_bytes()[:-50])
    with pytest.raises(KdError, match=r"data\.encoder = .* cannot be loaded"):
        features(copied)
    (copied / "model.safetensors").unlink()
    with pytest.raises(KdError, match="has no weights in the format safetensors"):
        features(copied)


def test_code_of_an_encoder_is_not_run(folder, tmp_path, monkeypatch) -> None:
    copied = with_code(with_code(shutil.copytree(folder, tmp_path / "copy")), config=True)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(KdError, match=r"data\.encoder = .* cannot be loaded: it comes with code of its own"):
        features(copied)


def test_a_teacher_on_features_of_another_encoder_is_refused(folder, tmp_path) -> None:
    data, other = features(folder), features(encoder(tmp_path / "other", seed=1))
    same_data(facts(data), data, "teacher")
    for recorded in (facts(other), facts(features(folder, pooling="cls"))):
        with pytest.raises(KdError, match=r"another encoder than data\.encoder"):
            same_data(recorded, data, "teacher")


@pytest.mark.slow
def test_an_mlp_learns_from_an_mlp_on_the_same_features(folder, tmp_path, capsys) -> None:
    source = [
        "train",
        "data=features",
        f"data.encoder={folder}",
        f"data.cache={tmp_path}",
        "data.max_length=32",
        "hardware=cpu",
    ]
    for split, found in (("train", rows(60)), ("test", rows(12, 100))):
        lines = ["text,label", *(f"{row['text']},{row['label']}" for row in found)]
        (tmp_path / f"{split}.csv").write_text("\n".join(lines))
        source.append(f"data.{split}={tmp_path / f'{split}.csv'}")
    short = ["recipe.epochs=2", "student.model.hidden=[8]", "hardware.threads=1"]
    assert main([*source, *short, f"hydra.run.dir={tmp_path / 'teacher'}"]) == 0
    soft = [f"teacher.checkpoint={tmp_path / 'teacher'}", "loss=[kd]", f"hydra.run.dir={tmp_path / 'student'}"]
    assert main([*source, *short, *soft]) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "student" / "result.json").read_text())
    assert record["status"] == "finished"
    assert record["student"]["parameters"] == 16 * 8 + 8 + 8 * 3 + 3
