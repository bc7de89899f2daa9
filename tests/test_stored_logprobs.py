"""Log-probabilities in a file in the place of a teacher: equal to those of the live one, or refused in a sentence."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kd.cli.main import main
from kd.data.base import AdaptedData
from kd.data.text.lm import Documents
from kd.data.text.teacher_tokens import matched_ids
from kd.distill.stored_logprobs import SURE, StoredLogprobs, Vocabulary
from kd.distill.teacher import Teacher
from kd.errors import KdError
from kd.generate.generate import generate
from kd.losses.base import Batch, Output
from kd.losses.logits.kd import KnowledgeDistillation
from kd.losses.tokens.topk_kl import TopKKL
from kd.tasks.base import Want
from kd.tasks.tokens import CausalLM

WORDS = ["the", "er", "in", "an", "wind", "cold", "blows"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama that writes letters and a few words, and its byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"{mark}{word}" for mark in ("Ġ", "") for word in WORDS]
    merges, pieces = [], list[str]()
    for word in words:
        for end in range(2, len(word) + 1):
            if (whole := word[:end]) not in pieces:
                merges.append((word[: end - 1], word[end - 1]))
                pieces.append(whole)
    names = ["<pad>", "<s>", "</s>", *letters, *pieces]
    made = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<pad>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    folder = tmp_path_factory.mktemp("teacher")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = LlamaForCausalLM(LlamaConfig(vocab_size=len(names), **sizes, **ids))
        network.lm_head.weight.data.normal_(std=2.0)
    for number, name in enumerate(names):  # what stands for ASCII, and the end, are far likelier
        if number in (0, 1) or not name.lstrip("Ġ").isascii():
            network.lm_head.weight.data[number] *= 0.01
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the teacher has written to 128 prompts."""
    folder = tmp_path_factory.mktemp("written")
    prompts = [f"the {one} {other} {number}" for number in range(8) for one in WORDS[:4] for other in WORDS[3:]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    generate(folder / "prompts.jsonl", folder / "out.jsonl", str(teacher), max_new_tokens=12, logprobs=8)
    return folder / "out.jsonl"


def data_of(file: Path, tokenizer: Path, **options: Any) -> AdaptedData:
    given = {"test_fraction": 0.2, "val_fraction": 0.2, "length": 64, "batch_size": 8, "eval_batch_size": 16, **options}
    return AdaptedData(Documents(train=str(file), tokenizer=str(tokenizer), **given))


def batches_of(data: AdaptedData) -> Iterator[Batch]:
    for batch in data.own.answering_dataloader():
        yield CausalLM().rows(batch)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def rewritten(file: Path, lines: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_what_is_stored_gives_the_loss_of_the_live_teacher(teacher: Path, written: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    kept = [  # those whose text is divided as it was written: the others have another context from there on
        line
        for line in lines_of(written)
        if ids(line["prompt"] + line["completion"])
        == ids(line["prompt"]) + [i for one in line["logprobs"] if (i := ids(one["token"])[0]) != 2]
    ]
    assert len(kept) > 8
    data = data_of(rewritten(tmp_path / "kept.jsonl", kept), teacher)
    stored = StoredLogprobs(None, data)
    live = Teacher([AutoModelForCausalLM.from_pretrained(teacher)], task=CausalLM())
    for batch in batches_of(data):
        expected, found = live(batch.inputs, batch), stored.answer(batch, Want())
        assert found.topk is not None
        student, k = Output(torch.randn_like(expected.logits)), found.topk.ids.shape[1]
        exact = expected.logits.log_softmax(-1).gather(1, found.topk.ids)
        torch.testing.assert_close(found.topk.log_probs[:, :8], exact[:, :8], rtol=1e-4, atol=1e-4)
        assert torch.equal(found.topk.ids[:, 0], batch.targets)
        assert k in (8, 9)  # where the token that was drawn is none of the 8 likeliest, it is the ninth
        exactly = {"rtol": 1e-5, "atol": 1e-6}
        for term, close in ((TopKKL(8, 1.0), exactly), (KnowledgeDistillation(1.0), {"rtol": 5e-3, "atol": 1e-3})):
            logits = [student.logits.clone().requires_grad_() for _ in range(2)]
            values = [term(Output(z), of, batch) for z, of in zip(logits, (found, expected), strict=True)]
            torch.testing.assert_close(*values, **close)  # all classes: the tail is spread evenly
            torch.testing.assert_close(*torch.autograd.grad(sum(values), logits), **close)


def test_what_a_server_has_left_out_is_said(teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("kd").propagate = True
    lines = [{"prompt": f"in {n}", "completion": WHOLE} for n in range(40)]

    def read(logprobs: Any) -> Any:
        file = rewritten(tmp_path / "o.jsonl", [{**line, "logprobs": logprobs} for line in lines])
        return StoredLogprobs(None, data_of(file, teacher))

    read([{**one, "top": []} for one in TOLD])
    assert "has no candidate of the vocabulary beside the token that was written for 104 of 104 tokens" in caplog.text
    for none in (None, []):
        with pytest.raises(KdError, match=r"o\.jsonl has no log-probabilities of the training rows"):
            read(none)
    with pytest.raises(KdError, match=r"data\.tokenizer trains one on the texts: set data\.tokenizer to the teacher's"):
        StoredLogprobs(
            None, AdaptedData(Documents(train=str(tmp_path / "o.jsonl"), test_fraction=0.2, val_fraction=0.2))
        )
    with pytest.raises(KdError, match=r"teacher\.answers\.file = nowhere\.jsonl: there is no such file"):
        StoredLogprobs(None, data_of(tmp_path / "o.jsonl", teacher), file="nowhere.jsonl")


def test_rows_from_python_are_read_as_those_of_a_file(teacher: Path, written: Path) -> None:
    """Of a file they are decoded row after row."""
    given = [data_of(written, teacher), data_of(written, teacher)]
    given[1].own.given["train"] = lines_of(written)
    found = [StoredLogprobs(None, data).answer(next(batches_of(data)), Want()).topk for data in given]
    assert torch.equal(found[0].ids, found[1].ids)
    assert torch.equal(found[0].log_probs, found[1].log_probs)


def test_a_run(teacher: Path, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = "model_type: llama,hidden_size: 8,intermediate_size: 8,num_hidden_layers: 1,num_attention_heads: 1"
    argv = ["train", "task=causal_lm", "data=lm", f"data.train={written}", "data.test_fraction=0.2", "data.length=64"]
    argv += [f"data.tokenizer={teacher}", "model@student=transformers", "student.model.pretrained=false"]
    argv += [f"student.model.config={{{inside}}}", "loss=[ce,topk_kl]", "recipe.epochs=1", "recipe.batch_size=8"]
    argv += [
        "teacher.answers={_target_: kd.distill.stored_logprobs.StoredLogprobs}",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    assert main([*argv, "hardware=cpu", "hardware.threads=1"]) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["student"]["last"]["test"]["perplexity"] > 1
    capsys.readouterr()
    argv[-1] = f"hydra.run.dir={tmp_path / 'other'}"
    assert main([*argv, "hardware=cpu", "loss.topk_kl.temperature=2"]) != 0
    assert "temperature = 2.0 is not stored" in capsys.readouterr().err


def entry(token: str, *top: list[Any], **more: Any) -> dict[str, Any]:
    return {"token": token, "logprob": -0.5, "top": [[token, -0.5], *top], **more}


LETTER = {"prompt": "in", "completion": " the"}
DIVIDED = {
    "as the student's": [entry(" the", ["x", -1.5], ["wind", -9999.0], ["of another vocabulary", -2.0])],
    "after a line that is not of the text": [entry("\n\n"), entry(" the", ["x", -1.5])],
    "with its end": [entry(" the", ["x", -1.5]), entry("</s>", ["x", -1.5])],
    "otherwise": [entry(" t"), entry("he", ["x", -1.5])],
    "not at all": None,
    "of another text": [entry(" cold", ["x", -1.5])],
}
ALIGNED = ("as the student's", "after a line that is not of the text", "with its end")


@pytest.mark.parametrize("how", DIVIDED)
def test_a_token_counts_where_it_is_the_same_bytes_at_the_same_place(how: str, teacher: Path, tmp_path: Path) -> None:
    good = {"logprobs": [entry(" cold", ["x", -1.5]), entry("</s>", ["x", -1.5])]}
    others = [{"prompt": f"in {n}", "completion": " cold", **good} for n in range(40)]
    data = data_of(rewritten(tmp_path / "o.jsonl", [{**LETTER, "logprobs": DIVIDED[how]}, *others]), teacher)
    data.own.setup()
    tokenizer, stored = data.own.tokenizer, StoredLogprobs(None, data)
    the, end, x = tokenizer.convert_tokens_to_ids(["Ġthe", "</s>", "x"])
    for batch in data.own.answering_dataloader():
        found = stored.answer(CausalLM().rows(batch), Want()).topk
        assert found is not None
        supervised = batch.targets[:, 1:][batch.targets[:, 1:] >= 0]
        for place in (supervised == the).nonzero().flatten().tolist():
            known = dict(zip(found.ids[place].tolist(), found.log_probs[place].tolist(), strict=True))
            after = dict(zip(found.ids[place + 1].tolist(), found.log_probs[place + 1].tolist(), strict=True))
            sure, aligned = pytest.approx(math.log(SURE)), how in ALIGNED
            assert known[the] == (pytest.approx(-0.5) if aligned else sure)
            assert (known.get(x) == pytest.approx(-1.5)) == aligned
            assert after[end] == (pytest.approx(-0.5) if how == "with its end" else sure)
            mass = sum(map(math.exp, known.values())) + math.exp(found.log_rests[1.0][place])
            assert mass == pytest.approx(1, abs=1e-5)


def test_a_character_of_several_tokens_is_found_by_its_bytes(teacher: Path, tmp_path: Path) -> None:
    """``é`` is two tokens of bytes: a server's text of either is a replacement character."""
    parts = [entry("\ufffd", ["\ufffd", -1.5, [0xC4]], bytes=[0xC3]), entry("\ufffd", bytes=[0xA9])]
    lines = [{"prompt": f"in {n}", "completion": "é", "logprobs": parts} for n in range(40)]
    data = data_of(rewritten(tmp_path / "o.jsonl", lines), teacher)
    stored = StoredLogprobs(None, data)
    first, second, other = data.own.tokenizer.convert_tokens_to_ids(["Ã", "©", "Ä"])
    for batch in batches_of(data):
        found = stored.answer(batch, Want()).topk
        assert found is not None
        assert batch.targets[:3].tolist() == [first, second, 2]
        assert dict(zip(found.ids[0].tolist(), found.log_probs[0].tolist(), strict=True))[other] == pytest.approx(-1.5)
        assert found.log_probs[:3, 0].tolist() == pytest.approx([-0.5, -0.5, math.log(SURE)])


WHOLE = " cold wind blows"
TOLD = [entry(" cold"), entry(" wind", ["x", -1.5]), entry(" blows", ["x", -1.5]), entry("</s>")]
ROWS = {
    "a token that begins in the prompt": ("th", f"e{WHOLE}", [entry("e"), *TOLD], ["Ġthe"]),
    "what a model thought before": ("in", WHOLE, [entry(" cold"), entry("in"), entry("</s>"), *TOLD], []),
    "a line behind the text": ("in", WHOLE, [*TOLD[:3], entry("\n"), TOLD[3]], ["</s>"]),
    "nothing that is likelier than none": (
        "in",
        WHOLE,
        [{**entry(" cold"), "logprob": -9999.0, "top": []}, *TOLD[1:]],
        ["Ġcold"],
    ),
}


def by_id(one: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Write a token as vLLM does with return_tokens_as_token_ids."""

    def name(text: str) -> str:
        found = tokenizer.encode(text, add_special_tokens=False)
        return f"token_id:{found[0]}" if len(found) == 1 else text

    return {**one, "token": name(one["token"]), "top": [[name(text), value] for text, value in one["top"]]}


def test_ids_in_the_place_of_texts(teacher: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    told = {"text": TOLD, "id": [by_id(one, tokenizer) for one in TOLD]}
    assert {one["token"][:9] for one in told["id"]} == {"token_id:"}
    found = []
    for name, tokens in told.items():
        lines = [{"prompt": f"in {n}", "completion": WHOLE, "logprobs": tokens} for n in range(40)]
        data = data_of(rewritten(tmp_path / f"{name}.jsonl", lines), teacher)
        found.append(StoredLogprobs(None, data).answer(next(batches_of(data)), Want()).topk)
    assert torch.equal(found[0].ids, found[1].ids)
    assert torch.equal(found[0].log_probs, found[1].log_probs)


@pytest.mark.parametrize("how", ROWS)
def test_only_what_is_not_known_is_a_label(how: str, teacher: Path, tmp_path: Path) -> None:
    prompt, completion, told, unknown = ROWS[how]
    lines = [{"prompt": f"{n} {prompt}", "completion": completion, "logprobs": told} for n in range(40)]
    data = data_of(rewritten(tmp_path / "o.jsonl", lines), teacher)
    stored, names = StoredLogprobs(None, data), data.own.tokenizer.convert_ids_to_tokens
    for batch in batches_of(data):
        found = stored.answer(batch, Want()).topk
        assert found is not None
        assert {*names(batch.targets)} >= {"Ġcold", "Ġwind", "Ġblows", "</s>"}
        for token, log_prob in zip(names(batch.targets), found.log_probs[:, 0].tolist(), strict=True):
            assert log_prob == pytest.approx(math.log(SURE) if token in unknown else -0.5)


def test_the_same_tokens_with_another_prompt_are_another_row(teacher: Path, tmp_path: Path) -> None:
    long = [{"prompt": f"{n} in", "completion": WHOLE, "logprobs": TOLD} for n in range(40)]
    short = [{"prompt": f"{n} in cold", "completion": " wind blows", "logprobs": TOLD[1:]} for n in range(40)]
    data = data_of(rewritten(tmp_path / "o.jsonl", short + long), teacher, overlap="keep")
    stored = StoredLogprobs(None, data)
    for batch in batches_of(data):
        found = stored.answer(batch, Want()).topk
        assert found is not None
        assert set(found.log_probs[:, 0].tolist()) == {-0.5}


def with_byte_fallback(words: list[str]) -> PreTrainedTokenizerFast:
    """As SentencePiece's: each byte is a token in front of the letters, and a word begins with its space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = [
        "<pad>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz.",
        *words,
    ]
    made = Tokenizer(models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=[], byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def test_a_byte_is_a_letter_where_the_vocabulary_has_one(tmp_path: Path) -> None:
    tokenizer = with_byte_fallback([])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    a, dot, byte, other = tokenizer.convert_tokens_to_ids(["a", ".", "<0x2E>", "<0xC3>"])
    assert Vocabulary(tokenizer).ids[b"."] == dot
    assert Vocabulary(tokenizer).ids[b"\xc3"] == other
    pairs = matched_ids(tokenizer, with_byte_fallback(["of"])).T.tolist()
    assert [dot, dot] in pairs
    assert not any(byte in pair for pair in pairs)
    told = [entry("a", [".", -1.5]), entry(".", ["a", -1.5]), entry("</s>")]
    lines = [{"prompt": f"{'ab' * (n + 1)}", "completion": "a.", "logprobs": told} for n in range(40)]
    data = data_of(rewritten(tmp_path / "o.jsonl", lines), tmp_path / "tokenizer", length=128)
    found = StoredLogprobs(None, data).answer(next(batches_of(data)), Want()).topk
    assert found is not None
    assert found.ids[:2, :2].tolist() == [[a, dot], [dot, a]]
    mass = found.log_probs.exp().sum(1) + found.log_rests[1.0].exp()
    torch.testing.assert_close(mass, torch.ones_like(mass))


def changed(written: Path, folder: Path, change: Any) -> Path:
    return rewritten(folder / "changed.jsonl", [change(line) for line in lines_of(written)])


def test_what_does_not_belong_together_is_refused_in_a_sentence(teacher: Path, written: Path, tmp_path: Path) -> None:
    data = data_of(written, teacher)
    plain = changed(written, tmp_path, lambda line: {k: v for k, v in line.items() if k != "logprobs"})
    with pytest.raises(KdError, match=r"changed.jsonl has no column logprobs: kd generate .* logprobs=20"):
        StoredLogprobs(None, data_of(plain, teacher))
    spelled = changed(
        written, tmp_path, lambda line: {**line, "logprobs": [{**one, "token": "?"} for one in line["logprobs"]]}
    )
    with pytest.raises(KdError, match=r"changed.jsonl: of [\d,]+ tokens to be predicted 0 have a log-probability"):
        StoredLogprobs(None, data_of(spelled, teacher))
    for wrong in (
        "x",
        [{"logprob": -1}],
        [{"token": "x", "logprob": 2.0}],
        [{"token": "x", "logprob": -1, "top": [1]}],
        [{"token": "x", "logprob": -0.1, "top": [["er", -0.1]]}],
        [{"token": None, "logprob": -0.1}],
    ):
        odd = changed(written, tmp_path, lambda line, wrong=wrong: {**line, "completion": "x", "logprobs": wrong})
        with pytest.raises(
            KdError, match=r"row \d+ of .*changed.jsonl: logprobs must be null or a list of \{token, log"
        ):
            StoredLogprobs(None, data_of(odd, teacher))
    fewer = rewritten(tmp_path / "fewer.jsonl", lines_of(written)[:3])
    with pytest.raises(KdError, match=r"fewer.jsonl lacks a training row: '"):
        StoredLogprobs(None, data, file=str(fewer))
    (tmp_path / "text.txt").write_text("".join(f"the cold wind {n}\n" for n in range(50)))
    with pytest.raises(KdError, match="holds documents, and no prompts with completions"):
        StoredLogprobs(None, data_of(tmp_path / "text.txt", teacher, document="line", overlap="keep"))
    with pytest.raises(KdError, match=r"needs data=lm with prompts and completions, and no data\.masking"):
        StoredLogprobs(None, data_of(written, teacher, packing=True))
    live = Teacher([AutoModelForCausalLM.from_pretrained(teacher)], task=CausalLM())
    with pytest.raises(KdError, match=r"there is a live one: leave teacher\.checkpoint and teacher\.model out"):
        StoredLogprobs(live, data)
    batch, stored = next(batches_of(data)), StoredLogprobs(None, data)
    batch.extra["own_text"] = torch.ones(1)
    with pytest.raises(KdError, match="knows the texts of its file, and not what the student writes"):
        stored.answer(batch, Want())
