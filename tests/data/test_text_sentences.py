"""Sentences with classes: files, classes, splits without a text on two sides, and each kind of bad input."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kd.data.text.clinc import Clinc
from kd.data.text.content import normalised
from kd.data.text.records import read
from kd.data.text.sentences import Sentences
from kd.errors import KdError
from kd.losses.base import UNLABELLED

WORDS = ("card", "money", "bank", "pin", "transfer", "late", "lost", "help")
CLASSES = ("arrival", "limits", "top up")
TOKENIZER = {"vocabulary": 120}


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Texts that differ, of 4 to 9 words, with a class each."""
    return [
        {
            "text": " ".join(WORDS[(i * (k + 1) + k) % 8] for k in range(3 + i % 6)) + f" {i}",
            "label": CLASSES[i % 3],
        }
        for i in range(first, first + count)
    ]


def sentences(**options: Any) -> Sentences:
    data = Sentences(**{"train": rows(60), "test": rows(12, 100), "tokenizer": TOKENIZER, **options})
    data.setup()
    return data


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection is tried: the libraries read the variable when they are imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def texts_of(data: Sentences, split: str) -> list[str]:
    """Texts as the batches hold them."""
    ids = [row for batch in getattr(data, f"{split}_dataloader")() for row in batch.inputs["input_ids"].tolist()]
    return data.tokenizer.batch_decode(ids, skip_special_tokens=True)


def write(path: Path, found: list[dict[str, Any]]) -> Path:
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(found[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(found)
    elif path.suffix == ".parquet":
        import pandas as pd

        pd.DataFrame(found).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(found))
    else:
        path.write_text("\n".join(json.dumps(row) for row in found) + "\n")
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_gives_the_same_batches(tmp_path, kind) -> None:
    wanted = sentences()
    files = {split: write(tmp_path / f"{split}.{kind}", wanted.given[split]) for split in ("train", "test")}
    found = sentences(root=str(tmp_path), train=f"train.{kind}", test=str(files["test"]))
    assert found.content == wanted.content
    assert found.class_names == list(CLASSES)
    assert found.num_classes == 3
    assert found.sizes == wanted.sizes == {"train": 54, "val": 6, "test": 12, "labelled": 54}
    for one, other in zip(found.train_dataloader(), wanted.train_dataloader(), strict=True):
        assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
        assert torch.equal(one.targets, other.targets)


def test_a_batch_holds_the_text_its_class_and_its_place() -> None:
    data = sentences(batch_size=8)
    seen = []
    for batch in data.train_dataloader():
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert set(batch.inputs) == {"input_ids", "attention_mask"}
        assert torch.equal(batch.mask, mask.bool())
        assert torch.equal(ids == data.pad_token_id, ~batch.mask)
        assert ids.shape[1] == int(mask.sum(1).max())
        assert ids.max() < data.vocab_size
        for row, target, index in zip(ids, batch.targets, batch.index.tolist(), strict=True):
            source = data.given["train"][index]
            assert data.tokenizer.decode(row, skip_special_tokens=True) == source["text"]
            assert data.class_names[target] == source["label"]
        seen += batch.index.tolist()
    assert sorted(seen) == sorted(data.train_index.tolist())
    assert len(data.train_targets) == 54


def test_lines_of_text_have_no_label(tmp_path) -> None:
    (tmp_path / "all.txt").write_text("\n".join(row["text"] for row in rows(40)), encoding="utf-8-sig")
    data = sentences(train=str(tmp_path / "all.txt"), test=None, test_fraction=0.25)
    assert data.num_classes is None
    assert data.sizes == {"train": 27, "val": 3, "test": 10, "labelled": 0}
    assert next(iter(data.train_dataloader())).targets.eq(UNLABELLED).all()
    assert rows(1)[0]["text"] in {text for split in ("train", "val", "test") for text in texts_of(data, split)}


def test_words_that_look_like_missing_values_stay(tmp_path) -> None:
    file = write(tmp_path / "x.csv", [{"text": t, "label": t} for t in ("NA", "null", "None", "007")] * 5)
    data = sentences(train=str(file), test=rows(0) or [{"text": "other", "label": "NA"}], val_fraction=0.25)
    assert data.class_names == ["007", "NA", "None", "null"]


def test_numbers_are_classes_in_their_order() -> None:
    train = [{**row, "label": i % 11} for i, row in enumerate(rows(60))]
    data = sentences(train=train, test=[{"text": "lost", "label": 10}])
    assert data.class_names == [str(i) for i in range(11)]
    assert data.parts["test"].targets.tolist() == [10]


def test_label_names_fix_the_order_and_may_be_counted() -> None:
    names = ["top up", "limits", "arrival"]
    by_name = sentences(label_names=names)
    counted = [{**row, "label": names.index(row["label"])} for row in rows(60)]
    by_number = sentences(label_names=names, train=counted)
    assert by_name.class_names == by_number.class_names == names
    assert torch.equal(by_name.train_targets, by_number.train_targets)


def test_a_pair_becomes_one_row_with_types() -> None:
    train = [{**row, "other": "late money"} for row in rows(30)]
    data = sentences(train=train, test=train[:0] or [{**rows(1, 50)[0], "other": "bank"}], text_pair="other")
    batch = next(iter(data.val_dataloader()))
    types, ids = batch.inputs["token_type_ids"], batch.inputs["input_ids"]
    sep = data.tokenizer.sep_token_id
    for row, kind, real in zip(ids, types, batch.mask, strict=True):
        first_end = row.tolist().index(sep)
        assert kind[: first_end + 1].eq(0).all()
        assert kind[first_end + 1 :][real[first_end + 1 :]].eq(1).all()


def test_training_texts_without_a_label_are_unlabelled() -> None:
    train = [{**row, "label": None if i % 4 == 0 else row["label"]} for i, row in enumerate(rows(60))]
    data = sentences(train=train)
    assert data.sizes["labelled"] < data.sizes["train"]
    assert (data.parts["val"].targets != UNLABELLED).all()
    wanted = {i for i, row in enumerate(train) if row["label"] is None}
    assert set(data.train_index[data.train_targets == UNLABELLED].tolist()) == wanted


def test_numbers_are_targets_to_regress_on() -> None:
    train = [{**row, "label": i / 4 - 1} for i, row in enumerate(rows(60))]
    data = sentences(train=train, test=[{"text": "lost", "label": "-1"}], numbers=True, train_size=20)
    assert data.num_classes is None
    assert data.sizes == {"train": 20, "val": 6, "test": 1, "labelled": 20}
    assert data.train_targets.tolist() == [i / 4 - 1 for i in data.train_index.tolist()]
    assert data.parts["test"].targets.tolist() == [-1.0]
    assert next(iter(data.train_dataloader())).targets.dtype == torch.float32
    for wrong in ("good", None, "nan"):
        with pytest.raises(KdError, match=r"data\.test has a label that is no number, or none"):
            sentences(train=train, test=[{"text": "lost", "label": wrong}], numbers=True)


# ---------------------------------------------------------------------- splits


def test_no_text_is_on_two_sides_however_it_is_written() -> None:
    train = rows(40) + [{**row, "text": f"  {row['text'].upper()} "} for row in rows(40)]
    data = sentences(train=train, test=None, test_fraction=0.2, val_fraction=0.2)
    held = {s: {normalised(data.given["train"][i]["text"]) for i in data.parts[s].index.tolist()} for s in data.parts}
    assert not held["train"] & held["val"]
    assert not held["train"] & held["test"]
    assert not held["val"] & held["test"]
    assert sum(len(part) for part in data.parts.values()) == 80
    assert data.copies_in_test() == 0


@pytest.mark.parametrize(("overlap", "left", "copies"), [("remove", 48, 0), ("keep", 54, 6)])
def test_texts_of_test_leave_the_training_set_and_it_is_said(caplog, overlap, left, copies) -> None:
    val = rows(6, 200)
    train = rows(54)
    test = [{**row, "text": row["text"].title()} for row in rows(6)] + rows(6, 100)
    with caplog.at_level(logging.WARNING):
        data = sentences(train=train, val=val, test=test, overlap=overlap)
    assert data.sizes["train"] == left
    assert data.sizes["test"] == 12
    assert data.copies_in_test() == copies
    assert "6 of 54 texts of train are in val or test as well" in caplog.text


def test_overlap_can_be_refused() -> None:
    with pytest.raises(KdError, match=r"6 of 54 texts of train .* data\.overlap"):
        sentences(train=rows(54), val=rows(6, 200), test=rows(6), overlap="refuse")


def test_the_split_seed_decides_alone_and_is_in_the_facts() -> None:
    one, same, other = (sentences(seed=s, split_seed=p) for s, p in ((0, 3), (1, 3), (0, 4)))
    assert torch.equal(one.parts["val"].index, same.parts["val"].index)
    assert not torch.equal(one.parts["val"].index, other.parts["val"].index)
    assert one.split_facts == same.split_facts != other.split_facts
    assert one.content == other.content


def test_train_size_and_label_fraction_are_stratified() -> None:
    data = sentences(train_size=30, label_fraction=0.3)
    targets = data.train_targets
    assert len(targets) == 30
    assert torch.bincount(targets[targets >= 0]).tolist() == [3, 3, 3]
    assert data.sizes["labelled"] == 9
    assert sentences(train_size=30, label_fraction=0.3, keep_unlabelled=False).sizes["train"] == 9


def test_the_vocabulary_does_not_depend_on_train_size() -> None:
    assert sentences(train_size=6).tokenizer_digest == sentences().tokenizer_digest


def test_weights_that_have_seen_a_text_are_found_out() -> None:
    data = sentences()
    assert data.seen_in_test(sentences(train=rows(12, 100), test=rows(5, 300)).seen)
    assert not data.seen_in_test(sentences().seen)


# ---------------------------------------------------------------------- tokens


def test_long_texts_are_truncated_with_their_end_token_and_counted(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        data = sentences(max_length=6)
    long = [t for t in data.given["test"] if len(data.tokenizer(t["text"])["input_ids"]) > 6]
    assert f"{len(long)} of 12 texts of test are longer than data.max_length = 6 tokens" in caplog.text
    for batch in data.test_dataloader():
        for row, real in zip(batch.inputs["input_ids"], batch.mask, strict=True):
            assert len(row) <= 6
            assert row[real][-1] == data.tokenizer.sep_token_id


def test_masking_needs_no_labels_and_num_classes_is_the_vocabulary() -> None:
    data = sentences(train=[{"text": row["text"]} for row in rows(40)], test=rows(10, 100), masking=0.15)
    assert data.num_classes == data.vocab_size
    assert data.class_names == []
    assert data.train_targets is None
    assert data.random_view == "data.masking"
    batch = next(iter(data.train_dataloader()))
    assert batch.targets.shape == batch.inputs["input_ids"].shape
    assert data.sizes["labelled"] == data.sizes["train"]


def test_answering_gives_every_training_text_once_in_order() -> None:
    data = sentences()
    index = torch.cat([batch.index for batch in data.answering_dataloader()])
    assert torch.equal(index, data.train_index)


def test_an_example_has_full_length() -> None:
    data = sentences(max_length=16)
    assert data.input_shape == (16,)
    assert {name: tuple(part.shape) for name, part in data.example().items()} == {
        "input_ids": (1, 16),
        "attention_mask": (1, 16),
    }


# ---------------------------------------------------------------------- datasets


def test_a_dataset_and_a_saved_folder_give_what_rows_give(tmp_path, offline) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(CLASSES))})
    made = {
        split: datasets.Dataset.from_list(part, features=features)
        for split, part in (("train", rows(60)), ("validation", rows(9, 200)), ("test", rows(12, 100)))
    }
    wanted = sentences(val=rows(9, 200))
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    for found in (
        sentences(train=made["train"], val=made["validation"], test=made["test"]),
        sentences(train=None, test=None, name="saved", root=str(tmp_path)),
    ):
        assert found.class_names == list(CLASSES)
        assert torch.equal(found.train_targets, wanted.train_targets)
        assert found.sizes == wanted.sizes


# ---------------------------------------------------------------------- bad input


def file_of(tmp_path: Path, text: str | bytes, name: str = "x.csv") -> str:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train": None}, r"data\.train = null"),
        ({"train": "none.csv"}, r"data\.train = none\.csv: there is no such file"),
        ({"text": "txt"}, r"data\.text = txt is no column of data\.train \(near: text\): it has text, label"),
        ({"label": "intent"}, r"data\.label = intent is no column .* it has text, label"),
        (
            {"test": [{"text": "a", "label": "limit"}]},
            r"data\.test has a label that train does not have: 'limit'.*limits",
        ),
        ({"test": [{"text": "a", "label": None}]}, r"data\.test has 1 text without a label"),
        ({"test": None}, r"data\.test_fraction=0\.2"),
        ({"test_fraction": 0.1}, r"data\.test_fraction = 0\.1 is not allowed"),
        ({"train": [{"text": " ", "label": "a"}]}, r"no text in data\.text = text: all are empty"),
        (
            {"train": [{"text": "a", "label": ["b"]}]},
            r"data\.label = label of data\.train has \['b'\] as one of its values",
        ),
        ({"train": [{"text": 3, "label": "a"}]}, r"data\.text = text of data\.train holds no texts: 3"),
        (
            {"train": [{"text": "a", "label": "1"}] * 30 + [{"text": "a", "label": "one"}], "numbers": True},
            r"row 31 of data\.train has a label that is no number",
        ),
        ({"train": [{"text": "a", "label": 0.5}]}, r"data\.label = label .* such as 0\.5"),
        (
            {"train": [{"text": str(i), "label": f"{i // 2},5"} for i in range(45)]},
            r"holds 23 different numbers in 45 texts.*task=text_regression",
        ),
        ({"delimiter": ";;"}, r"data\.delimiter = ;; is not allowed: it must be one character"),
        ({"train": [{"text": str(i), "label": "a"} for i in range(9)]}, r"1 class \(a\)"),
        ({"val_fraction": 0.001}, r"data\.val_fraction = 0\.001 leaves no text for val"),
        ({"train_size": 55}, r"data\.train_size = 55 .* 54"),
        ({"max_length": 1}, r"data\.max_length = 1 is not allowed: .* 2 or more"),
        ({"max_length": 2}, r"data\.max_length = 2 is not allowed: the tokenizer adds 2 special"),
        ({"overlap": "drop"}, r"data\.overlap = drop is not allowed: it must be remove, keep or refuse"),
        ({"label_names": ["a"]}, r"data\.label_names = .* two names or more"),
        ({"tokenizer": {"vocabulary": 9}}, r"data\.tokenizer\.vocabulary = 9 is not allowed: it must be \d+ or more"),
        ({"tokenizer": {"size": 9}}, r"data\.tokenizer = "),
        ({"tokenizer": "no/such-tokenizer"}, r"data\.tokenizer = no/such-tokenizer cannot be loaded"),
        ({"tokenizer": "./none"}, r"data\.tokenizer = \./none: there is no such folder"),
        ({"name": "no/such-set", "train": None, "test": None}, r"data\.name = no/such-set cannot be loaded"),
        ({"name": "a-set"}, r"data\.train is not allowed with data\.name = a-set"),
        ({"drop_last": True, "batch_size": 55}, r"data\.drop_last = true leaves no batch"),
    ],
)
def test_bad_options_are_one_sentence(options, said, offline) -> None:
    with pytest.raises(KdError, match=said) as found:
        sentences(**options)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("", "x.csv", "is empty"),
        ("text,label\n", "x.csv", "has no rows"),
        ("text,label\ncaf\xe9,a\n".encode("latin-1"), "x.csv", r"is not utf-8 \(byte 0xe9 at 14\): set data\.encoding"),
        ('{"text": "a"}\n{"text": \n', "x.jsonl", "not valid JSON in line 2"),
        ('"a"\n', "x.jsonl", "must hold objects"),
        ('text,label\nx,b\n"a\nb,c\n', "x.csv", r"cannot be read as csv: line 3: unexpected end of data"),
        (
            "text,label\na,b,\nc,d,\n",
            "x.csv",
            r"line 2 has 3 cells, the header has 2: a cell with , in it must be quoted",
        ),
        ('text,label\na,b\n\n"c\nd",e\nf, g,h\n', "x.csv", "line 6 has 3 cells, the header has 2"),
        ("text,label\na,b\nc\n", "x.csv", "line 3 has 1 cell, the header has 2$"),
        ("text\tlabel\na\tb\tc\n", "x.tsv", "a cell with a tab in it must be quoted"),
        ("text,label,label\na,b,c\n", "x.csv", "has two columns named label"),
        ("text;label\na;b\n", "x.csv", r"""one column, text;label: .* 'data\.delimiter=";"'$"""),
        ("text\tlabel\na\tb\n", "x.csv", r"one column, text label: .* data\.delimiter=tab$"),
        ("text,label\na,b\n", "x.tsv", r"""one column, text,label: .* 'data\.delimiter=","'$"""),
        (
            "text,label\na,b\n".encode("utf-16"),
            "x.csv",
            r"is utf-16, by its byte order mark, .* data\.encoding=utf-16$",
        ),
        ("a\n".encode("utf-32"), "x.txt", r"data\.encoding=utf-32$"),
        ("not parquet", "x.parquet", "cannot be read as parquet"),
        ("a", "x.doc", r"its ending must be one of \.csv"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, text, name, said) -> None:
    with pytest.raises(KdError, match=said) as found:
        sentences(train=file_of(tmp_path, text, name))
    assert "\n" not in str(found.value)


def test_another_encoding_is_read_where_it_is_named(tmp_path) -> None:
    lines = "text,label\n" + "".join(f"caf\xe9 {i},{'ab'[i % 2]}\n" for i in range(20))
    file = file_of(tmp_path, lines.encode("latin-1"))
    data = sentences(train=file, test=[{"text": "x", "label": "a"}], encoding="latin-1")
    assert "\xe9" not in texts_of(data, "val")[0]  # the tokenizer takes accents away
    assert texts_of(data, "val")[0].startswith("cafe")
    with pytest.raises(KdError, match=r"data\.encoding = latin-99"):
        sentences(train=file, encoding="latin-99")


@pytest.mark.parametrize(
    ("encoding", "delimiter", "given"),
    [
        ("utf-8-sig", ",", {}),
        ("utf-16", ";", {"encoding": "utf-16", "delimiter": ";"}),
        ("utf-16-be", "\t", {"encoding": "utf-16-be", "delimiter": "tab"}),
    ],
)
def test_tables_as_spreadsheets_write_them_are_read(tmp_path, encoding, delimiter, given) -> None:
    """A mark that is no part of the first name, other delimiters, an empty column and an empty line."""
    found = [["text", "label", ""], *([f'card, {i}; "late"\n{i}', "ab"[i % 2], ""] for i in range(20)), [""]]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(found)
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    (tmp_path / "x.csv").write_bytes(mark + text.getvalue().encode(encoding))
    records = read(str(tmp_path / "x.csv"), None, **{"encoding": "utf-8", "key": "train", **given})
    assert list(records.columns) == ["text", "label", "Unnamed: 2"]
    assert records.columns["text"] == [row[0] for row in found[1:-1]]
    assert records.columns["label"] == ["a", "b"] * 10


def test_a_mark_of_utf_8_is_no_latin_1(tmp_path) -> None:
    with pytest.raises(KdError, match=r"data\.encoding=utf-8$"):
        sentences(train=file_of(tmp_path, b"\xef\xbb\xbftext,label\na,b\n"), encoding="latin-1")


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (
            b"text,label\na,b\n",
            {"encoding": "utf-16"},
            r"is not utf-16, whose files begin with a mark: set .* data\.encoding=utf-8$",
        ),
        ("text,label\na,é\n".encode("utf-16-le"), {"encoding": "utf-16"}, r"mark: set .* data\.encoding=utf-16-le$"),
        ("text,label\na,é\n".encode("utf-16-be"), {"encoding": "utf-16"}, r"mark: set .* data\.encoding=utf-16-be$"),
        ("text,label\na,é\n".encode("utf-16-le"), {}, r"is not utf-8 .*: set .* data\.encoding=utf-16-le$"),
        (
            "text,label\na,b\n".encode("utf-16-le"),
            {},
            r"x\.csv, .* holds NUL .*: set .* data\.encoding=utf-16-le, or take",
        ),
        ("text,label\na,b\n".encode("utf-16-be"), {"encoding": "latin-1"}, r"holds NUL .* data\.encoding=utf-16-be"),
        (b"text,label\na\0\0,b\n", {}, "holds NUL characters: take them out$"),
        ("text,label\n“a”,b\n".encode("cp1252"), {}, r"set data\.encoding, for example data\.encoding=cp1252"),
        (b"text;label\na, b;c\n", {}, r"has one column, text;label: set data\.delimiter, here 'data\.delimiter=\";\"'"),
        (b"text;;label\na;;b\n", {"delimiter": ";;"}, r"data\.delimiter = ;; is not allowed: it must be one character"),
    ],
)
def test_a_table_that_is_read_in_the_wrong_way(tmp_path, content, options, said) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(KdError, match=said):
        read(str(tmp_path / "x.csv"), None, **{"encoding": "utf-8", "key": "train", **options})


def test_a_row_of_plain_text_ends_with_its_line(tmp_path) -> None:
    (tmp_path / "x.txt").write_text("one\fpage\ntwo\u2028parts\n")
    assert read(str(tmp_path / "x.txt"), None, "utf-8", "train").columns["text"] == ["one\fpage", "two\u2028parts"]


def test_a_cell_may_be_longer_than_pythons_limit(tmp_path) -> None:
    long = "word " * 30_000
    records = read(file_of(tmp_path, f"text,label\n{long},a\n"), None, "utf-8", "train")
    assert records.columns["text"] == [long]


def test_decimals_are_classes_where_they_are_named() -> None:
    train = [{**row, "label": ("0.5", "1.5")[i % 2]} for i, row in enumerate(rows(20))]
    test = [{"text": "lost", "label": "1.5"}]
    assert sentences(train=train, test=test, label_names=["0.5", "1.5"]).parts["test"].targets.tolist() == [1]
    for written in ("0.5", "-1.25", "1e-3", "2.5E+3"):
        with pytest.raises(KdError, match=rf"holds numbers such as {re.escape(written)}: .* task=text_regression"):
            sentences(train=[{**row, "label": written} for row in train], test=test)


def test_texts_without_a_label_are_counted(caplog) -> None:
    train = [{**row, "label": "" if i % 10 == 0 else row["label"]} for i, row in enumerate(rows(60))]
    with caplog.at_level(logging.WARNING):
        sentences(train=train)
    assert "data.train: 6 of 60 texts have no label" in caplog.text


def test_few_texts_to_measure_on_are_said(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        sentences(train=rows(10), test=None, test_fraction=0.2)
    assert "val has 1 text, so one is 100.0 points of accuracy; test has 2 texts, so one is 50.0 points" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sentences(train=rows(90), test=rows(30, 100), val=rows(30, 200))
    assert "points of accuracy" not in caplog.text


def test_empty_texts_are_left_out_and_counted(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        data = sentences(
            train=[*rows(20), {"text": " ", "label": "limits"}, {"text": None, "label": None}, *rows(20, 40)]
        )
    assert "2 of 42 texts are empty and left out" in caplog.text
    assert data.sizes["train"] + data.sizes["val"] == 40
    assert max(*data.train_index.tolist(), *data.parts["val"].index.tolist()) == 41  # places in the file


def test_a_length_beyond_the_tokenizers_is_refused(tmp_path) -> None:
    made = sentences().tokenizer
    made.model_max_length = 32
    made.save_pretrained(tmp_path / "tok")
    assert sentences(root=str(tmp_path), tokenizer="tok", max_length=None).input_shape == (32,)
    with pytest.raises(KdError, match=r"data\.max_length = 64 is not allowed: .* 32 tokens at most"):
        sentences(tokenizer=str(tmp_path / "tok"), max_length=64)


def test_clinc_reads_its_file_without_out_of_scope(tmp_path) -> None:
    pairs = [[row["text"], row["label"]] for row in rows(60)]
    found = {"train": pairs[:30], "val": pairs[30:45], "test": pairs[45:], "oos_train": [["who am i", "oos"]]}
    (tmp_path / "clinc.json").write_text(json.dumps(found))
    data = Clinc(root=str(tmp_path), file="clinc.json", tokenizer=TOKENIZER)
    assert data.sizes == {"train": 30, "val": 15, "test": 15, "labelled": 30}
    assert data.class_names == list(CLASSES)
    (tmp_path / "clinc.json").write_text(json.dumps({"train": pairs}))
    with pytest.raises(KdError, match=r"is not CLINC150's data_full\.json"):
        Clinc(root=str(tmp_path), file="clinc.json").setup()


# ---------------------------------------------------------------------- real sets


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "classes", "most"),
    [("banking77", 77, (10003, 3080)), ("trec", 6, (4304, 1077)), ("clinc150", 150, (15000, 4500))],
)
def test_real_sets_are_complete(kd_data, monkeypatch, tmp_path, name, classes, most) -> None:
    from kd.config.compose import checked
    from kd.config.instantiate import make

    monkeypatch.setenv("KD_DATA", kd_data)
    config = checked([f"data={name}", f"data.cache={tmp_path}", "data.tokenizer={vocabulary: 1000}"])
    data = make(config["data"], "data")
    data.setup()
    assert data.num_classes == classes
    assert data.sizes["test"] == most[1]
    train = data.sizes["train"] + (0 if name == "clinc150" else data.sizes["val"])
    assert 0.98 * most[0] < train <= most[0]
    assert data.copies_in_test() == 0
    batch = next(iter(data.train_dataloader()))
    assert batch.inputs["input_ids"].shape[0] == len(batch.targets)
