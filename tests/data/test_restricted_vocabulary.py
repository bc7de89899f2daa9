"""Tokenizers and networks restricted to the entries that the training texts use: the same pieces, the same logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kd.cli.main import main
from kd.data.text.lm import Documents
from kd.data.text.sentences import Sentences
from kd.data.text.tokenizer import trained, wrapped
from kd.data.text.vocabulary import needed, restrict, restricted
from kd.distill.cache_forms import Form
from kd.distill.cache_key import difference, facts_of_run
from kd.distill.distiller import Distiller
from kd.errors import KdError
from kd.records.weight_files import SELECTED
from kd.tasks.tokens import CausalLM

SEA = (
    "the ship sailed over the wide water",
    "sailors sang while sailing",
    "waves washed the wooden ship",
    "a wave rose",
)
LAND = ("gardeners planted roses", "the garden of the gardener grew", "planting and growing takes months", "roses grow")
OTHER = "Gardening überall: 3 × 漢字 \U0001f600\n\tship"  # letters, bytes and words that no training text has
KINDS = ("bpe", "wordpiece", "unigram")


def whole_tokenizer(kind: str) -> Any:
    """One that knows words of the sea and of the land."""
    texts = [*SEA, *LAND, "0123456789"]
    if kind != "unigram":
        return wrapped(trained(texts * 3, 400 if kind == "bpe" else 150, kind, False))
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    entries = sorted({piece for text in texts for word in text.split() for piece in (f"▁{word}", word[:3], *word)})
    model = models.Unigram([("<unk>", -9.0), ("</s>", 0.0), ("▁", -4.0), *((e, -3.0) for e in entries)], unk_id=0)
    made = Tokenizer(model)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


def ids_of(tokenizer: Any, texts: Any) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_used_texts_become_the_same_pieces_and_others_stay_known(kind: str, tmp_path: Path) -> None:
    whole = whole_tokenizer(kind)
    small, restriction = restrict(whole, "0", SEA, None)
    kept = restriction.kept
    assert restriction.whole == len(whole)
    assert len(small) == len(kept) < len(whole)
    assert (np.diff(kept) > 0).all()
    assert [kept[row].tolist() for row in ids_of(small, SEA)] == ids_of(whole, SEA)
    assert [small.decode(row) for row in ids_of(small, SEA)] == [whole.decode(row) for row in ids_of(whole, SEA)]
    names = set(small.get_vocab())
    assert any(piece not in names for row in ids_of(whole, LAND) for piece in whole.convert_ids_to_tokens(row))
    for text in (*LAND, OTHER):  # in smaller pieces
        assert small.decode(ids_of(small, [text])[0]) == whole.decode(ids_of(whole, [text])[0])
        assert ids_of(small, [text])[0].count(small.unk_token_id) == ids_of(whole, [text])[0].count(whole.unk_token_id)
    small.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*SEA, *LAND, OTHER]
    assert loaded(texts)["input_ids"] == small(texts)["input_ids"]
    assert loaded.special_tokens_map == small.special_tokens_map == whole.special_tokens_map
    around = [kept[row].tolist() for row in small(list(SEA))["input_ids"]]
    assert around == whole(list(SEA))["input_ids"]  # special tokens around a text as well


def test_of_bytes_all_are_kept_and_of_merges_those_that_happen() -> None:
    whole = whole_tokenizer("bpe")
    small = restricted(whole, needed(whole, [i for row in ids_of(whole, SEA) for i in row]))
    assert small.decode(ids_of(small, [OTHER])[0]) == OTHER
    before, after = (json.loads(t.backend_tokenizer.to_str())["model"]["merges"] for t in (whole, small))
    assert [merge for merge in before if merge in after] == after
    assert 0 < len(after) < len(before)
    parts = {piece for merge in after for piece in (*merge, "".join(merge))}
    assert parts <= set(small.get_vocab())


def test_settings_and_chat_template_stay() -> None:
    whole = whole_tokenizer("bpe")
    whole.model_max_length, whole.padding_side = 77, "left"
    whole.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    small, _ = restrict(whole, "0", SEA, None)
    assert (small.model_max_length, small.padding_side) == (77, "left")
    assert small.apply_chat_template([{"role": "user", "content": "ship"}], tokenize=False) == "ship"


def test_what_is_kept_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = whole_tokenizer("bpe")
    first, one = restrict(whole, "0", SEA, tmp_path)
    monkeypatch.setattr("kd.data.text.vocabulary.needed", lambda *_: pytest.fail("it is in the cache"))
    second, other = restrict(whole, "0", SEA, tmp_path)
    assert (one.kept == other.kept).all()
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    with pytest.raises(pytest.fail.Exception):
        restrict(whole, "0", LAND, tmp_path)


# ---------------------------------------------------------------------- data modules


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A tokenizer and a Llama that know land and sea, and texts of the sea to train on."""
    tokenizer = whole_tokenizer("bpe")
    tokenizer.save_pretrained(tmp_path / "llama")
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, **ids,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    random = np.random.default_rng(0)
    for name, lines in (("train", 40), ("val", 8), ("test", 8)):
        rows = [" ".join(random.choice(SEA, 2)) + f" {name} {i}" for i in range(lines)]
        (tmp_path / f"{name}.txt").write_text("\n".join(rows))
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{t} {i},{i % 2}\n" for i, t in enumerate(SEA * 6)))
    return tmp_path


def documents(files: Path, **options: Any) -> Documents:
    given = {"train": "train.txt", "val": "val.txt", "test": "test.txt", "length": 16}
    data = Documents(root=str(files), tokenizer="llama", **{**given, **options})
    data.setup()
    return data


def test_documents_have_the_kept_ids_and_other_cached_answers(files: Path) -> None:
    whole, small = documents(files), documents(files, vocabulary="corpus")
    assert small.num_classes == small.vocab_size == len(small.restriction.kept) < whole.num_classes
    for one, other in zip(whole.train_dataloader(), small.train_dataloader(), strict=True):
        assert torch.equal(torch.from_numpy(small.restriction.kept)[other.inputs["input_ids"]], one.inputs["input_ids"])
    facts = [facts_of_run(data, CausalLM(), Form("topk", 4)) for data in (whole, small)]
    assert difference(*facts).startswith("is of another tokenizer")
    assert facts[0]["data"] != facts[1]["data"]


def test_sentences_and_dialogues_are_restricted_as_well(files: Path) -> None:
    data = Sentences(root=str(files), train="rows.csv", test_fraction=0.2, tokenizer="llama", vocabulary="corpus")
    data.setup()
    assert data.num_classes == 2
    ids = torch.cat([batch.inputs["input_ids"].flatten() for batch in data.train_dataloader()])
    assert int(ids.max()) < data.vocab_size < len(AutoTokenizer.from_pretrained(files / "llama"))
    rows = [json.dumps({"prompt": f"{text} {i}: ", "completion": SEA[0]}) for i, text in enumerate(SEA)]
    (files / "pairs.jsonl").write_text("\n".join(rows))
    pairs = documents(files, train="pairs.jsonl", val="pairs.jsonl", test="pairs.jsonl", overlap="keep", length=32)
    small = documents(
        files,
        train="pairs.jsonl",
        val="pairs.jsonl",
        test="pairs.jsonl",
        overlap="keep",
        length=32,
        vocabulary="corpus",
    )
    ours, theirs = (next(iter(data.val_dataloader())) for data in (small, pairs))
    assert small.vocab_size < pairs.vocab_size
    assert torch.equal(ours.targets >= 0, theirs.targets >= 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocabulary": "train"}, "data.vocabulary = train is not allowed: it must be corpus, tokenizer or null"),
        ({"tokenizer": {"kind": "bpe"}}, "data.vocabulary = corpus needs a tokenizer that is given"),
    ],
)
def test_what_cannot_be_restricted_is_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(KdError, match=words):
        Documents(**{"vocabulary": "corpus", "train": "t.txt", "tokenizer": "t", **options})


def test_byte_pairs_with_marks_of_the_place_in_a_word_are_refused() -> None:
    from tokenizers import Tokenizer, models

    entries = {"<unk>": 0, "a</w>": 1}
    made = Tokenizer(models.BPE(entries, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    with pytest.raises(KdError, match=r"data\.vocabulary = corpus needs a tokenizer of byte pairs, word pieces"):
        restrict(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"), "0", SEA, None)


# ---------------------------------------------------------------------- runs


def arguments(files: Path, run: str, *more: str) -> list[str]:
    return [
        *("train", "data=lm", f"data.root={files}", f"data.cache={files / 'cache'}", "data.train=train.txt"),
        *("data.val=val.txt", "data.test=test.txt", f"data.tokenizer={files / 'llama'}", "data.length=16"),
        *("data.vocabulary=corpus", "task=causal_lm", "hardware=cpu", "hardware.threads=1", "recipe.batch_size=16"),
        *("recipe.epochs=2", f"hydra.run.dir={files / run}", *more),
    ]


FROM_TEACHER = ("model@student=none", "student.surgery.layers=2", "loss=[ce,kd]", "model@teacher=transformers")


@pytest.mark.slow
def test_a_restricted_student_is_trained_resumed_and_loads_plainly(
    files: Path, kd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (*FROM_TEACHER, f"teacher.model.name={files / 'llama'}")
    said = kd(*arguments(files, "run", *more))
    assert said.code == 0, said.err
    record = json.loads((files / "run" / "result.json").read_text())
    kept = record["data"]["num_classes"]
    whole = len(AutoTokenizer.from_pretrained(files / "llama"))
    assert record["data"]["vocabulary"] == {"kept": kept, "of": whole}
    assert f"{kept} of {whole} entries" in said.out + said.err
    given = AutoModelForCausalLM.from_pretrained(files / "llama")
    assert record["teacher"]["parameters"] == given.num_parameters() - 32 * (whole - kept)

    loaded = AutoModelForCausalLM.from_pretrained(files / "run" / "selected")
    tokenizer = AutoTokenizer.from_pretrained(files / "run" / "selected")
    assert loaded.config.vocab_size == len(tokenizer) == kept
    assert loaded.config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer(f"{SEA[0]} {OTHER}", return_tensors="pt", return_token_type_ids=False)
    written = loaded.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(written[0], skip_special_tokens=True).startswith(f"{SEA[0]} {OTHER}")

    begin = Distiller.on_train_epoch_start

    def stop(self: Distiller) -> None:
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        begin(self)

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "on_train_epoch_start", stop)
        assert main(arguments(files, "cut", *more)) != 0
    shutil.rmtree(files / "cut" / "selected")
    said = kd("train", f"resume={files / 'cut'}")
    assert said.code == 0, said.err
    ended = json.loads((files / "cut" / "result.json").read_text())["student"]
    assert ended["last"]["digest"] == record["student"]["last"]["digest"]

    said = kd("eval", f"run={files / 'run'}", f"out={files / 'found.json'}")
    assert said.code == 0, said.err
    found = json.loads((files / "found.json").read_text())["metrics"]["nll"]
    assert found == pytest.approx(record["student"]["selected"]["test"]["nll"], rel=1e-5)


@pytest.mark.slow
def test_weights_of_the_whole_vocabulary_are_cut_and_restricted_ones_are_not(
    files: Path, kd: Callable[..., Any]
) -> None:
    """A run on the whole vocabulary teaches one on a part, and starts it; its logits are its own at the kept ids."""
    alone = ("model@student=transformers", f"student.model.name={files / 'llama'}", "loss=[ce]")
    assert kd(*arguments(files, "whole", *alone, "data.vocabulary=null")).code == 0
    for run, teacher in (("small", "whole"), ("next", "small")):
        said = kd(*arguments(files, run, *FROM_TEACHER[:3], f"teacher.checkpoint={files / teacher}"))
        assert said.code == 0, said.err
    records = {run: json.loads((files / run / "result.json").read_text()) for run in ("whole", "small", "next")}
    assert records["small"]["teacher"]["parameters"] < records["whole"]["student"]["parameters"]
    assert records["next"]["teacher"]["parameters"] == records["small"]["student"]["parameters"]
    mean = records["small"]["teacher"]["test"]["nll"]  # over fewer tokens: less than over all
    assert mean < records["whole"]["student"]["selected"]["test"]["nll"]
    said = kd(*arguments(files, "on", *alone, f"student.checkpoint={files / 'whole'}", "recipe.epochs=1"))
    assert said.code == 0, said.err
    assert AutoModelForCausalLM.from_pretrained(files / "on" / "selected").config.vocab_size < 400
    more = (
        f"teacher.checkpoint={files / 'small'}",
        f"data.tokenizer={files / 'small' / 'last'}",
        "data.vocabulary=null",
    )
    said = kd(*arguments(files, "after", *FROM_TEACHER[:3], *more))  # its tokenizer is whole now
    assert said.code == 0, said.err
    said = kd(*arguments(files, "back", *alone, f"student.checkpoint={files / 'small'}", "data.vocabulary=null"))
    assert said.code == 1
    assert "another tokenizer" in said.err
    assert (files / "small" / SELECTED).is_file()


def test_networks_padded_to_other_sizes_lose_the_rows_behind_the_tokenizer(files: Path, kd: Callable[..., Any]) -> None:
    """A student with 7 and a teacher with 16 rows too many: refused with the way out, which resume and eval know."""
    entries = len(AutoTokenizer.from_pretrained(files / "llama"))
    for name, more in (("teacher", 16), ("student", 7)):
        network = AutoModelForCausalLM.from_pretrained(files / "llama")
        network.resize_token_embeddings(entries + more, mean_resizing=False)
        network.save_pretrained(files / name)
    pair = ("model@student=transformers", f"student.model.name={files / 'student'}", "loss=[ce,kd]")
    pair += ("model@teacher=transformers", f"teacher.model.name={files / 'teacher'}")
    said = kd(*arguments(files, "run", *pair, "data.vocabulary=null"))
    assert said.code == 1
    assert "data.vocabulary=tokenizer cuts both" in said.err

    said = kd(*arguments(files, "run", *pair, "data.vocabulary=tokenizer"))
    assert said.code == 0, said.err
    for rows in (entries + 7, entries + 16):
        assert f"has {rows} rows of vocabulary, data.tokenizer {entries} tokens" in said.out + said.err
    record = json.loads((files / "run" / "result.json").read_text())
    assert record["data"]["vocabulary"] == {"kept": entries, "of": entries}
    loaded = AutoModelForCausalLM.from_pretrained(files / "run" / "selected")
    assert loaded.config.vocab_size == len(AutoTokenizer.from_pretrained(files / "run" / "selected")) == entries
    said = kd("eval", f"run={files / 'run'}", f"out={files / 'found.json'}")
    assert said.code == 0, said.err
    found = json.loads((files / "found.json").read_text())["metrics"]
    expected = record["student"]["selected"]["test"]
    assert {key: found[key] for key in ("nll", "kl")} == pytest.approx(
        {k: expected[k] for k in ("nll", "kl")}, rel=1e-5
    )


@pytest.mark.slow
def test_padded_weights_of_a_run_are_cut_and_cut_ones_are_not(files: Path, kd: Callable[..., Any]) -> None:
    """A teacher that was trained with its padding, then one without; the tokenizer is the same."""
    network = AutoModelForCausalLM.from_pretrained(files / "llama")
    network.resize_token_embeddings(len(AutoTokenizer.from_pretrained(files / "llama")) + 9, mean_resizing=False)
    network.save_pretrained(files / "padded")
    alone = ("model@student=transformers", f"student.model.name={files / 'padded'}", "loss=[ce]")
    assert kd(*arguments(files, "padding", *alone, "data.vocabulary=null")).code == 0
    for run, teacher in (("cut", "padding"), ("next", "cut")):
        more = ("data.vocabulary=tokenizer", f"teacher.checkpoint={files / teacher}")
        said = kd(*arguments(files, run, *FROM_TEACHER[:3], *more))
        assert said.code == 0, said.err
    records = {run: json.loads((files / run / "result.json").read_text()) for run in ("padding", "cut", "next")}
    assert records["cut"]["teacher"]["parameters"] == records["padding"]["student"]["parameters"] - 9 * 32
    assert records["next"]["teacher"]["parameters"] == records["cut"]["student"]["parameters"]
    assert kd(*arguments(files, "on", *alone, "data.vocabulary=tokenizer", "recipe.epochs=1")).code == 0
    more = ("data.vocabulary=null", "recipe.epochs=1", f"student.checkpoint={files / 'on'}")
    said = kd(*arguments(files, "further", *alone, *more))  # with the padded network that the weights were cut from
    assert said.code == 0, said.err
