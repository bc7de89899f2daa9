"""Documents for language models: blocks without loss, documents apart, prompts that are not predicted, masks."""

from __future__ import annotations

import json
import logging
import zlib
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from kd.data.text.documents import cut_the_end, divided
from kd.data.text.encode import cut
from kd.data.text.lm import Documents
from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch

WORDS = ("the", "river", "was", "wide", "and", "slow", "she", "walked", "home", "in", "rain")
CHATML = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def prose(lines: int, seed: int) -> str:
    random = np.random.default_rng(seed)
    return "".join(" ".join(random.choice(WORDS, random.integers(4, 14))) + f" {seed}-{i}.\n" for i in range(lines))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, lines in (("train", 60), ("val", 20), ("test", 20)):
        (tmp_path / f"{name}.txt").write_text(prose(lines, zlib.crc32(name.encode()) % 1000))
    return tmp_path


def documents(root: Path, **options: Any) -> Documents:
    given = {"train": "train.txt", "val": "val.txt", "test": "test.txt", "length": 16, "tokenizer": {"vocabulary": 300}}
    data = Documents(root=str(root), **{**given, **options})
    data.setup()
    return data


def batches(data: Documents, split: str = "test") -> list[Batch]:
    return list(getattr(data, f"{split}_dataloader")())


def real_ids(data: Documents, split: str = "test") -> list[list[int]]:
    found = [(b.inputs["input_ids"], b.mask) for b in batches(data, split)]
    return [row[mask].tolist() for ids, masks in found for row, mask in zip(ids, masks, strict=True)]


# ---------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_decoder_generates_from_what_the_trained_tokenizer_returns(files, kind) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = documents(files, tokenizer={"vocabulary": 300, "kind": kind}).tokenizer
    given = tokenizer("the river", return_tensors="pt")
    assert set(given) == {"input_ids", "attention_mask"}
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, pad_token_id=tokenizer.pad_token_id)
    written = GPT2LMHeadModel(config).generate(**given, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert written.shape == (1, given["input_ids"].shape[1] + 2)


# ---------------------------------------------------------------------- blocks


def test_each_token_but_the_first_is_predicted_once_and_none_is_lost(files) -> None:
    data = documents(files)
    rows = real_ids(data)
    stream = rows[0] + [token for row in rows[1:] for token in row[1:]]
    text = (files / "test.txt").read_text()
    assert stream == [*data.tokenizer(text, add_special_tokens=False)["input_ids"], data.tokenizer.eos_token_id]
    assert all(one[-1] == other[0] for one, other in pairwise(rows))
    assert all(len(row) == 16 for row in rows[:-1])
    predicted = sum(int((b.targets[:, 1:] != UNLABELLED).sum()) for b in batches(data))
    assert predicted == len(stream) - 1
    assert data.num_classes == data.vocab_size == len(data.tokenizer)
    assert data.input_shape == (16,)


def test_targets_are_the_ids_and_pads_are_not_predicted_though_ends_are(files) -> None:
    data = documents(files, document="line", packing=False, length=64)
    data.tokenizer.pad_token = data.tokenizer.eos_token
    data = documents(files, document="line", packing=False, length=64, tokenizer=data.tokenizer)
    assert data.pad_token_id == data.tokenizer.eos_token_id
    for batch in batches(data):
        ids = batch.inputs["input_ids"]
        assert torch.equal(batch.targets, torch.where(batch.mask, ids, UNLABELLED))
        ends = (batch.targets == data.pad_token_id).sum(1)
        assert ends.eq(1).all()


@pytest.mark.parametrize(("document", "count"), [("line", 20), ("paragraph", 1), ("file", 1)])
def test_documents_end_with_the_end_token(files, document, count) -> None:
    data = documents(files, document=document)
    rows = real_ids(data)
    stream = rows[0] + [token for row in rows[1:] for token in row[1:]]
    assert stream.count(data.tokenizer.eos_token_id) == count


def test_a_dataset_gives_what_rows_give(files) -> None:
    """Documents in blocks, and prompts whose completions alone are predicted."""
    import datasets

    answers = [{"prompt": f"the river {n}:", "completion": f" was wide {n}"} for n in range(40)]
    for rows in ([{"text": line} for line in prose(40, 5).splitlines()], answers):
        one, other = (
            documents(files, train=source, val=None, test=None, test_fraction=0.2)
            for source in (rows, datasets.Dataset.from_list(rows))
        )
        assert one.sizes == other.sizes
        for split in ("train", "val", "test"):
            for mine, same in zip(batches(one, split), batches(other, split), strict=True):
                assert torch.equal(mine.inputs["input_ids"], same.inputs["input_ids"])
                assert torch.equal(mine.targets, same.targets)


def test_separate_documents_restart_and_do_not_see_one_another(files) -> None:
    data = documents(files, document="line", separate_documents=True)
    plain = documents(files, document="line")
    least = torch.finfo(torch.float32).min
    for batch, same in zip(batches(data), batches(plain), strict=True):
        ids, positions, mask = (batch.inputs[k] for k in ("input_ids", "position_ids", "attention_mask"))
        assert torch.equal(ids, same.inputs["input_ids"])
        assert mask.shape == (len(ids), 1, 16, 16)
        for row in range(len(ids)):
            tokens = ids[row].tolist()
            of = [tokens[:place].count(data.tokenizer.eos_token_id) for place in range(16)]
            restarted = [place - of.index(number) for place, number in enumerate(of)]
            assert positions[row][batch.mask[row]].tolist() == restarted[: int(batch.mask[row].sum())]
            seen = torch.tensor([[a == b and j <= i for j, b in enumerate(of)] for i, a in enumerate(of)])
            real = batch.mask[row]
            found = mask[row, 0] == 0
            assert torch.equal(found[real][:, real], seen[real][:, real])
            assert not found[real][:, ~real].any()
            assert found.any(1).all()
            assert mask[row, 0][~found].eq(least).all()
            firsts = torch.tensor([i > 0 and a != of[i - 1] for i, a in enumerate(of)])
            assert batch.targets[row][firsts].eq(UNLABELLED).all()


def test_a_decoder_answers_a_packed_document_as_it_answers_it_alone(files) -> None:
    """The second implementation: each document of a block through the network by itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    data = documents(files, document="line", separate_documents=True, length=40)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=data.vocab_size, **size)
    batch = batches(data)[0].few(2)
    for attention in ("sdpa", "eager"):
        config._attn_implementation = attention
        network = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            packed = network(**batch.inputs).logits
            for row, positions in enumerate(batch.inputs["position_ids"]):
                starts = (positions == 0).nonzero().flatten().tolist()
                for start, end in zip(starts, [*starts[1:], 40], strict=True):
                    alone = network(batch.inputs["input_ids"][row : row + 1, start:end]).logits[0]
                    assert torch.allclose(packed[row, start:end], alone, atol=1e-5)


def test_a_row_each_is_truncated_and_counted(files, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        data = documents(files, document="line", packing=False, length=8)
    assert data.sizes["test"] == 20
    assert "rows of test are longer than data.length = 8 tokens and truncated" in caplog.text
    assert max(map(len, real_ids(data))) == 8


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_bytes_of_the_tokens_are_those_of_the_text(files, kind) -> None:
    """For bits a byte: nothing is lost, whatever the tokenizer does to spaces and letters of several bytes."""
    text = "Caf\xe9  \u4f60\u597d\n\n na\xefve \U0001f600 end \n" + (files / "test.txt").read_text()
    (files / "test.txt").write_text(text)
    data = documents(files, tokenizer={"vocabulary": 300, "kind": kind}, length=1000)
    (batch,) = batches(data)
    found = batch.extra["bytes"]
    assert found.shape == batch.targets.shape
    assert int(found.sum()) == len(text.encode())
    assert found[~batch.mask].eq(0).all()
    assert all("bytes" not in b.extra for b in batches(data, "train"))


# ---------------------------------------------------------------------- splits


def test_test_is_the_last_half_of_the_file_that_validates(files) -> None:
    whole = (files / "val.txt").read_text()
    data = documents(files, test=None, test_fraction=0.5)
    rows = {split: real_ids(data, split) for split in ("val", "test")}
    streams = {split: [*chain(found[0], *(row[1:] for row in found[1:]))] for split, found in rows.items()}
    text = {split: data.tokenizer.decode(ids[:-1]) for split, ids in streams.items()}
    assert text["val"] + text["test"] == whole
    assert text["val"].endswith("\n")
    assert abs(len(text["val"]) - len(whole) / 2) < 100


def test_lines_are_cut_at_random_and_never_twice(files) -> None:
    (files / "train.txt").write_text(prose(40, 1) + prose(40, 1))
    data = documents(
        files, val=None, test=None, document="line", val_fraction=0.2, test_fraction=0.2, packing=False, length=64
    )
    held = {split: {tuple(row) for row in real_ids(data, split)} for split in ("train", "val", "test")}
    assert data.sizes["train"] == 2 * len(held["train"]) == 52  # 40 - 8, a fifth of them val
    assert not held["train"] & held["val"]
    assert not (held["train"] | held["val"]) & held["test"]


def test_lines_of_test_that_are_in_train_are_said(files, caplog) -> None:
    (files / "train.txt").write_text(prose(60, 1) + (files / "test.txt").read_text())
    with caplog.at_level(logging.WARNING):
        data = documents(files)
    assert "lines of train are in val or test as well" in caplog.text
    assert data.copies_in_test() > 0
    with pytest.raises(KdError, match="lines of train are in val or test"):
        documents(files, overlap="refuse")


def test_train_size_is_of_rows_and_the_index_says_which(files) -> None:
    whole, few = documents(files), documents(files, train_size=5)
    assert few.sizes["train"] == len(set(few.train_index.tolist())) == 5
    rows = real_ids_by_index(whole)
    assert all(rows[i] == row for i, row in real_ids_by_index(few).items())


def real_ids_by_index(data: Documents) -> dict[int, list[int]]:
    return {
        i: row[mask].tolist()
        for b in batches(data, "train")
        for i, row, mask in zip(b.index.tolist(), b.inputs["input_ids"], b.mask, strict=True)
    }


def test_paragraphs_and_lines() -> None:
    assert divided("a\nb\n\n \nc\n", "paragraph") == ["a\nb", "c"]
    assert divided("a\n\nb\n", "line") == ["a", "b"]
    assert cut_the_end(["aa\n", "bbbb\ncccc\n"], 0.3, "val") == (["cccc\n"], ["aa\n", "bbbb\n"])
    assert cut_the_end(["aa\n", "bbbbbbbb"], 0.5, "val") == (["bbbbbbbb"], ["aa\n"])


def test_a_long_document_is_cut_where_a_line_ends(monkeypatch) -> None:
    monkeypatch.setattr("kd.data.text.encode.PIECE", 20)
    text = "one two three four\nfive six\nseven" + "x" * 50
    assert "".join(cut(text)) == text
    assert next(iter(cut(text))) == "one two three four"
    assert max(map(len, cut(text))) == 20


# ---------------------------------------------------------------------- masks


def masked(files: Path, **options: Any) -> Documents:
    return documents(
        files, **{"masking": 0.15, "tokenizer": {"vocabulary": 300, "kind": "wordpiece"}, "length": 64, **options}
    )


def test_masks_are_15_percent_and_80_10_10_and_never_special(files) -> None:
    (files / "train.txt").write_text(prose(2000, 5))
    data = masked(files)
    plain = documents(files, length=62, tokenizer=data.tokenizer, packing=True)
    assert plain.tokenizer_digest == data.tokenizer_digest
    chosen = kept = replaced = hidden = total = 0
    for batch in batches(data, "train"):
        ids, at = batch.inputs["input_ids"], batch.targets != UNLABELLED
        special = torch.isin(torch.where(at, batch.targets, ids), torch.tensor(data.tokenizer.all_special_ids))
        assert not (special & at).any()
        assert ids[~at].ne(data.tokenizer.mask_token_id).all()
        assert ids[:, 0].eq(data.tokenizer.cls_token_id).all()
        last = batch.mask.sum(1) - 1
        assert ids[torch.arange(len(ids)), last].eq(data.tokenizer.sep_token_id).all()
        total += int((batch.mask & ~special).sum())
        chosen += int(at.sum())
        hidden += int((ids[at] == data.tokenizer.mask_token_id).sum())
        kept += int((ids[at] == batch.targets[at]).sum())
        replaced += int(((ids[at] != batch.targets[at]) & (ids[at] != data.tokenizer.mask_token_id)).sum())
    assert chosen / total == pytest.approx(0.15, abs=0.01)
    assert hidden / chosen == pytest.approx(0.8, abs=0.03)
    assert kept / chosen == pytest.approx(0.1, abs=0.02)
    assert replaced / chosen == pytest.approx(0.1, abs=0.02)


def test_a_mask_depends_on_seed_epoch_and_row_alone(files) -> None:
    def drawn(epoch: int, **options: Any) -> dict[int, list[int]]:
        data = masked(files, **options)
        loader = data.train_dataloader()
        loader.set_epoch(epoch)
        return {
            i: [*row[row != UNLABELLED].tolist(), -7, *(row != UNLABELLED).nonzero().flatten().tolist()]
            for b in loader
            for i, row in zip(b.index.tolist(), b.targets, strict=True)
        }

    assert drawn(1) == drawn(1, batch_size=3, bucketing=False)
    assert drawn(1) != drawn(2)
    assert drawn(1) != drawn(1, seed=1)


def test_masks_of_val_and_test_stay_whatever_the_seed(files) -> None:
    one, other = masked(files), masked(files, seed=3, eval_batch_size=2)
    for split in ("val", "test"):
        rows = [torch.cat([t.flatten() for b in batches(d, split) for t in b.targets]) for d in (one, other)]
        kept = [row[row != UNLABELLED] for row in rows]
        assert torch.equal(*kept)


# ---------------------------------------------------------------------- prompts


def table(files: Path, name: str, rows: list[Any]) -> str:
    (files / name).write_text("\n".join(map(json.dumps, rows)))
    return name


def test_only_completions_are_predicted(files) -> None:
    pairs = [{"prompt": f"she walked {i} ", "completion": f"in the rain {i}"} for i in range(30)]
    held = [{"prompt": f"slow {i} ", "completion": f"river {i}"} for i in range(10)]
    data = documents(files, train=table(files, "t.jsonl", pairs), val=None, test=table(files, "h.jsonl", held))
    assert data.sizes == {"train": 27, "val": 3, "test": 10, "labelled": 27}
    for batch in batches(data):
        for row, index in zip(batch.targets, batch.index.tolist(), strict=True):
            wanted = held[index]["completion"] + data.tokenizer.eos_token
            assert data.tokenizer.decode(row[row != UNLABELLED]).strip() == wanted
        assert data.tokenizer.decode(batch.inputs["input_ids"][0]).startswith(held[int(batch.index[0])]["prompt"])


def test_only_what_the_assistant_says_is_predicted(files) -> None:
    tokenizer = documents(files).tokenizer
    tokenizer.chat_template = CHATML
    turns = [("user", "home in"), ("assistant", "the rain"), ("user", "wide"), ("assistant", "and slow river")]
    rows = [{"messages": [{"role": role, "content": f"{text} {i}"} for role, text in turns]} for i in range(12)]
    options = {
        "tokenizer": tokenizer,
        "length": 200,
        "val": None,
        "test": None,
        "test_fraction": 0.2,
        "val_fraction": 0.2,
    }
    data = documents(files, train=table(files, "t.jsonl", rows), **options)
    for batch in batches(data):
        for row, index in zip(batch.targets, batch.index.tolist(), strict=True):
            said = data.tokenizer.decode(row[row != UNLABELLED])
            number = said.split()[2]
            assert said.split() == f"the rain {number} </s> and slow river {number} </s>".split()
            assert int(index) < data.sizes["test"]
    split = [{"prompt": row["messages"][:3], "completion": row["messages"][3:]} for row in rows]
    data = documents(files, train=table(files, "t.jsonl", split), **options)
    row = batches(data)[0].targets[0]
    assert data.tokenizer.decode(row[row != UNLABELLED]).strip().startswith("and slow river")


@pytest.mark.parametrize("kind", ["texts", "messages"])
def test_no_end_is_predicted_of_a_completion_that_was_cut_off(files, kind) -> None:
    tokenizer = documents(files).tokenizer
    tokenizer.chat_template = CHATML
    rows = []
    for i in range(12):
        pair = {"prompt": f"home in {i}", "completion": f"the slow river {i}"}
        if kind == "messages":
            roles = {"prompt": "user", "completion": "assistant"}
            pair = {name: [{"role": role, "content": pair[name]}] for name, role in roles.items()}
        rows.append({**pair, "finish_reason": ["stop", "length"][i % 2]})
    given = {"train": table(files, "t.jsonl", rows), "val": table(files, "v.jsonl", rows), "test": "v.jsonl"}
    data = documents(files, tokenizer=tokenizer, length=200, overlap="keep", **given)
    for batch in batches(data):
        for row, index in zip(batch.targets, batch.index.tolist(), strict=True):
            said = data.tokenizer.decode(row[row != UNLABELLED])
            assert said.split()[:3] == ["the", "slow", "river"]
            assert ((tokenizer.eos_token if kind == "texts" else "</s>") in said) is (index % 2 == 0)


def test_a_completion_that_was_cut_off_begins_as_others_do(files) -> None:
    tokenizer = documents(files).tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    first = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[first])
    reasons = ("stop", "length")
    rows = [{"prompt": f"home {i}", "completion": " rain", "finish_reason": reasons[i % 2]} for i in range(12)]
    data = documents(
        files,
        tokenizer=tokenizer,
        train=table(files, "t.jsonl", rows),
        test="t.jsonl",
        overlap="keep",
        val=table(files, "v.jsonl", rows),
    )
    ids = real_ids(data)
    assert [row.count(tokenizer.bos_token_id) for row in ids] == [1] * 12
    assert {row[0] for row in ids} == {tokenizer.bos_token_id}
    assert sum(row[-1] == tokenizer.eos_token_id for row in ids) == 6


@pytest.mark.parametrize("altered", [False, True])
def test_no_end_is_predicted_of_a_dialogue_that_was_cut_off(files, altered) -> None:
    """Where the template alters the answer, so that its end is not known, nothing of that answer is predicted."""
    tokenizer = documents(files).tokenizer
    tokenizer.chat_template = CHATML.replace("m['content']", "m['content'] | upper") if altered else CHATML
    turns = [("user", "home in"), ("assistant", "the rain"), ("user", "wide"), ("assistant", "slow river")]
    messages = [{"role": role, "content": text} for role, text in turns]
    rows = [{"messages": messages, "finish_reason": ["stop", "length"][i % 2]} for i in range(4)]
    given = {"train": table(files, "t.jsonl", rows), "val": "t.jsonl", "test": "t.jsonl"}
    data = documents(files, tokenizer=tokenizer, length=200, overlap="keep", **given)
    for batch in batches(data):
        for row, index in zip(batch.targets, batch.index.tolist(), strict=True):
            said = data.tokenizer.decode(row[row != UNLABELLED]).lower().replace("</s>", " </s> ").split()
            last = ["slow", "river", "</s>"] if index % 2 == 0 else [] if altered else ["slow", "river"]
            assert said == ["the", "rain", "</s>", *last]


def test_prompts_that_fill_a_row_are_left_out(files, caplog) -> None:
    pairs = [
        {"prompt": "she walked home in the rain " * (1 + 9 * (i == 0)), "completion": f"slow {i}"} for i in range(20)
    ]
    with caplog.at_level(logging.WARNING):
        data = documents(
            files,
            train=table(files, "t.jsonl", pairs),
            val=table(files, "v.jsonl", pairs[1:3]),
            test="v.jsonl",
            overlap="keep",
            length=24,
        )
    assert data.sizes["train"] == 19
    assert "1 of 20 rows of train have no token to predict" in caplog.text.replace("\n", " ")


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train": None}, r"data\.train = null"),
        ({"train": []}, r"data\.train = \[\] is not allowed: it must be a file, a list of files"),
        ({"train": "no.txt"}, r"data\.train = no\.txt: there is no such file"),
        ({"test": None}, r"data\.test_fraction=0\.5"),
        ({"length": 1}, r"data\.length = 1 is not allowed: it must be a whole number, 2 or more"),
        ({"length": None}, r"data\.length = null is not allowed"),
        ({"document": "page"}, r"data\.document = page is not allowed: it must be file, line or paragraph"),
        ({"masking": 1.0}, r"data\.masking = 1\.0 is not allowed"),
        ({"masking": 0.15, "separate_documents": True}, r"data\.separate_documents = true is not allowed"),
        ({"masking": 0.15, "length": 2}, r"data\.length = 2 is not allowed: the tokenizer adds 2 tokens"),
        ({"val": None, "val_fraction": 1e-9}, r"data\.val_fraction = 1e-09 leaves none"),
        ({"train_size": 10**6}, r"data\.train_size = 1000000 is not allowed"),
        ({"train": [{"text": 3}]}, r"the column text of data\.train holds no texts"),
        ({"train": [{"question": "a"}]}, r"data\.train must have columns .* it has question"),
        ({"train": [{"prompt": "a", "completion": "b"}]}, r"data\.train holds prompts, another split holds documents"),
        ({"train": [{"messages": []}]}, r"data\.tokenizer has no chat template"),
        ({"train": [{"prompt": "a", "completion": ["b"]}]}, r"must both be texts, or both lists"),
    ],
)
def test_bad_options_are_one_sentence(files, options, said) -> None:
    with pytest.raises(KdError, match=said) as found:
        documents(files, **options)
    assert "\n" not in str(found.value)


def test_an_empty_file_and_a_tokenizer_without_masks_are_refused(files) -> None:
    (files / "empty.txt").write_text(" \n\n")
    with pytest.raises(KdError, match=r"empty\.txt is empty"):
        documents(files, train="empty.txt")
    (files / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(KdError, match=r"latin\.txt is not utf-8"):
        documents(files, train="latin.txt")
    from transformers import PreTrainedTokenizerFast

    own = documents(files).tokenizer
    bare = PreTrainedTokenizerFast(tokenizer_object=own.backend_tokenizer, eos_token="[SEP]")
    with pytest.raises(KdError, match=r"data\.masking = 0\.15 needs a tokenizer with a mask token"):
        documents(files, masking=0.15, tokenizer=bare)


# ---------------------------------------------------------------------- a real set


@pytest.mark.data
def test_austen_is_read_whole(kd_data, monkeypatch, tmp_path) -> None:
    from kd.config.compose import checked
    from kd.config.instantiate import make

    monkeypatch.setenv("KD_DATA", kd_data)
    # the small file in the place of the large one: the whole takes ten seconds
    config = checked(["data=austen", "data.train=lm/austen.valid.txt", "data.overlap=keep", f"data.cache={tmp_path}"])
    data = make(config["data"], "data")
    data.setup()
    assert data.vocab_size == 4000
    length = sum(part.end[-1] for s, part in data.parts.items() if s != "train")
    assert length == pytest.approx(len(data.parts["train"].tokens.ids) + 1)  # an end token more
    assert data.parts["val"].end[-1] == pytest.approx(data.parts["test"].end[-1], rel=0.05)
