"""Every preset of text: its header is true of it, and two steps of it run, on tiny networks of its families.

``KD_PAPERS=FILE``, a YAML of papers with their tables, also compares the published numbers of the headers with it.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kd.config.compose import checked
from kd.config.composition import CONF
from kd.errors import KdError

FOLDER = CONF / "experiment"
FAMILY = {"num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 12, "intermediate_size": 64}
GROUPED = {**FAMILY, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
FAMILIES: dict[str, dict[str, Any]] = {  # part of a name on the hub → the same architecture, tiny
    "distilbert": {"model_type": "distilbert", "n_layers": 2, "dim": 24, "n_heads": 2, "hidden_dim": 32},
    "bert": {**FAMILY, "model_type": "bert", "max_position_embeddings": 64},
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 160},
    "gemma-2": {**GROUPED, "model_type": "gemma2"},
    "llama-3": {**GROUPED, "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 48},
    "qwen3": {**GROUPED, "model_type": "qwen3"},
}
SHORT = {"max_length": 32, "length": 32}  # positions of a row
LONGER = {"length": 128}  # with a prompt
WINDOWS = {"stride": 9, "question_length": 8}


@functools.cache
def preset(name: str) -> dict[str, Any]:
    """The composed and checked config of a preset."""
    return checked([f"experiment={name}"])


def source(name: str) -> str:
    """The text of a preset, with that of the file it begins from."""
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    return text + "".join(source(base) for base in re.findall(r"^  - (_\w+)$", text, re.MULTILINE) if base != "_self_")


def header(name: str) -> list[str]:
    """The comment lines at the top of a preset."""
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[1:]
    return [line.removeprefix("# ") for line in lines[: lines.index("defaults:")]]


ALL = [file.stem for file in sorted(FOLDER.glob("*.yaml")) if not file.name.startswith("_")]
PRESETS = [name for name in ALL if re.search(r"override /task: (?!classification)", source(name))]


def number(text: str) -> float:
    return float(text.replace(",", ""))


# ---------------------------------------------------------------------- headers


def test_there_are_presets() -> None:
    assert PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_header_says_is_what_is_set(name: str) -> None:
    """Rate, batch, temperature, length and duration are in the header and in the config: they must be the same."""
    config, said = preset(name), "\n".join(header(name))
    recipe, data = config["recipe"], config["data"]
    terms = [*config["loss"].values(), config["distiller"]]
    size = recipe["batch_size"] * recipe["accumulate"]
    for rate in re.findall(r"\blr (\d[\d.e-]*\d)", said):
        assert float(rate) == recipe["optimizer"]["lr"]
    for factors in re.findall(r"\bbatch (\d+(?: x \d+)*)", said):
        assert math.prod(map(int, factors.split(" x "))) == size
    for temperature in re.findall(r"\bT = ([\d.]*\d)", said):
        assert float(temperature) in [term["temperature"] for term in terms if "temperature" in term]
    for length in re.findall(r"\blength (\d+)", said):
        assert int(length) == data.get("length", data.get("max_length"))
    for seed in re.findall(r"\bseed (\d+)", said):
        assert int(seed) == config["seed"]
    for steps in re.findall(r"([\d,]+) steps", said):
        assert number(steps) == recipe["steps"]
    for steps, epochs, rows in re.findall(r"steps: (\d+) # (\d+) epochs of ([\d,]+)", source(name)):
        assert int(steps) == int(epochs) * math.ceil(number(rows) / size) == recipe["steps"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_header_has_the_published_number_or_says_that_there_is_none(name: str) -> None:
    published = [line for line in header(name) if "Published" in line]
    assert published
    assert all(re.search(r"\d", line) or "none" in line or "see there" in line for line in published)


def published(papers: list[dict[str, Any]], paper: str, line: str) -> list[tuple[str, str]]:
    """The numbers of the entry of a paper, each with its row and column; of a table the columns that ``line`` names.

    All columns where the line names none. Of what is no entry (a repository) the facts that mention it.
    """
    entry = next((one for one in papers if one["id"] == paper), None)
    facts = [fact["fact"] for one in ([entry] if entry else papers) for fact in one.get("facts", [])]
    texts, found = [fact for fact in facts if entry or paper in fact], []
    for table in entry["tables"] if entry else ():
        named = [column for column in table["columns"] if column in line] or table["columns"]
        texts += [*table["rows"], *table["columns"]]
        for row, values in table["rows"].items():
            cells = zip(table["columns"], values, strict=True)
            found += [(str(value), f"{row}, {column}") for column, value in cells if column in named]
    return [*found, *((value, text) for text in texts for value in re.findall(r"\d+\.\d+", text))]


@pytest.mark.skipif("KD_PAPERS" not in os.environ, reason="KD_PAPERS names no file of papers")
def test_the_published_numbers_are_those_of_the_papers() -> None:
    papers = yaml.safe_load(Path(os.environ["KD_PAPERS"]).read_text(encoding="utf-8"))["papers"]
    said = [(name, *line) for name in PRESETS for line in re.findall(r"Published \((\w+)\): (.*)", source(name))]
    assert said
    for name, paper, line in said:
        there = published(papers, paper, line)
        assert set(re.findall(r"\d+\.\d+", line)) <= {value for value, _ in there}, name
        for word, value in re.findall(r"(?<!\S)([A-Z][\w-]*)(?:'s)? (\d+\.\d+)", line):
            if any(word in where for _, where in there):  # it names a row or a column: the number is of it
                assert any(word in where for other, where in there if other == value), (name, word, value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wikibooks_distilbert_bert_base_6layers", ["seed 56", "rare tokens"]),
        ("dolly_minillm_gpt2_xl_gpt2", ["LM loss on OpenWebText", "prompt (published: 256 tokens)"]),
        ("dolly_distillm_gpt2_xl_gpt2", ["LM loss on OpenWebText", "seed 10", "seeds 10, 20, 30, 40 and 50"]),
        ("glue_mrpc_kd_bert_large_bert_base", ["f1_positive"]),
        ("glue_qqp_kd_bert_large_bert_base", ["f1_positive"]),
    ],
)
def test_what_a_paper_says_is_set_or_said_to_be_left_out(name: str, words: list[str]) -> None:
    assert all(word in source(name) for word in words)


def test_the_published_samples_are_drawn_by_a_command_that_there_is() -> None:
    from kd.cli.generate import parsed

    (command,) = re.findall(r"^# kd generate (.*)$", source("_dolly"), re.MULTILINE)
    options = parsed(command.split())
    assert [options[key] for key in ("max_new_tokens", "temperature", "seed")] == [256, 1.0, 10]


# ---------------------------------------------------------------------- what presets read


def saved(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    """A set as ``datasets`` saves it, with these rows in its splits."""
    import datasets

    made = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    datasets.DatasetDict(made).save_to_disk(str(folder))
    return folder


def test_a_split_of_a_set_by_name(tmp_path: Path) -> None:
    from kd.data.text.records import read

    folder = saved(tmp_path / "set", train=[{"text": "one"}], validation=[{"text": "two"}], matched=[{"text": "three"}])
    name = {"name": "set"}
    assert read(name, str(tmp_path), "utf-8", "train").columns == {"text": ["one"]}
    assert read(name, str(tmp_path), "utf-8", "val").columns == {"text": ["two"]}
    assert read({"name": str(folder), "split": "matched"}, None, "utf-8", "test").columns == {"text": ["three"]}


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({"name": "set", "splt": "train"}, r"data\.test\.splt is not a key of a set of the hub \(near: split\)"),
        ({"split": "train"}, r"data\.test = {'split': 'train'} is not allowed: it must have a name"),
        ({"name": "set", "split": "trian"}, r"data\.test\.split = trian is no split of set \(near: train\)"),
        ({"name": "set"}, r"data\.test\.split = null is no split of set: it has train"),
        ({"name": "other/set"}, r"data\.test\.name = other/set cannot be loaded"),
    ],
)
def test_a_set_that_cannot_be_read(
    source: dict[str, str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd.data.text.records import read

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    saved(tmp_path / "set", train=[{"text": "one"}])
    with pytest.raises(KdError, match=sentence):
        read(source, str(tmp_path), "utf-8", "test")


def test_instructions_become_prompts_with_answers(tmp_path: Path) -> None:
    from kd.data.text.instructions import Instructions

    contexts = {n: "" if int(n) % 2 else f"{n} is it" for n in "12345678"}
    rows = [{"instruction": f" Say {n}.", "context": text, "response": f"{n} "} for n, text in contexts.items()]
    data = Instructions(
        train=rows, val_fraction=0.2, test_fraction=0.2, preamble="Answer.", tokenizer={"vocabulary": 300}
    )
    data.setup()
    batches = [batch for split in ("train", "val", "test") for batch in data._loader(split, shuffle=False)]
    found = {}
    for batch in batches:
        for ids, targets in zip(batch.inputs["input_ids"], batch.targets, strict=True):
            text, own = (data.tokenizer.decode(part, skip_special_tokens=True) for part in (ids, targets[targets >= 0]))
            found[own] = text
    for n, text in contexts.items():
        given = f"### Input:\n{text}\n\n" if text else ""
        assert found[n] == f"Answer.\n\n### Instruction:\nSay {n}.\n\n{given}### Response:\n{n}"
    assert len(found) == len(rows)
    with pytest.raises(
        KdError, match=r"data\.response = answer is no column of .*it has instruction, context, response"
    ):
        Instructions(train=rows, test_fraction=0.2, response="answer").setup()


# ---------------------------------------------------------------------- two steps


def network(role: str, model: dict[str, Any]) -> list[str]:
    """A tiny network of the family of a preset's, with a third of its layers, narrower where it is narrower."""
    tiny = dict(next(config for part, config in FAMILIES.items() if part in model["name"].lower()))
    for key, value in (model["config"] or {}).items():
        tiny[key] = {"num_hidden_layers": value // 3, "hidden_size": 24, "intermediate_size": 32}[key]
    inside = ", ".join(f"{key}: {value}" for key, value in tiny.items())
    return [f"{role}.model.name=null", f"{role}.model.pretrained=false", f"{role}.model.config={{{inside}}}"]


def rows(data: dict[str, Any], prompts: bool, count: int) -> list[dict[str, Any]]:
    """Made rows with the columns that a preset reads."""
    found: list[dict[str, Any]] = []
    for place in range(count):
        one, two, three = (" ".join(f"w{(place * step + i) % 97}" for i in range(3 + place % 3)) for step in (1, 3, 5))
        if "instruction" in data:
            found.append({"instruction": one, "context": two if place % 2 else "", "response": three})
        elif "answers" in data:
            text = f"{one} {two} " * 4
            answers = {"text": [two], "answer_start": [len(one) + 1]}
            found.append({data["question"]: three, data["context"]: text, data["answers"]: answers})
        elif "text_pair" in data:
            pair = {data["text_pair"]: two} if data["text_pair"] else {}
            found.append({data["text"]: one, **pair, data["label"]: place % 2})
        else:
            found.append({"prompt": one, "completion": two} if prompts else {"text": f"{one} {two} {three}"})
    return found


def scaled(name: str, folder: Path) -> list[str]:
    """The preset with made data, tiny networks, short rows, two steps; terms, set-up and recipe stay what they are."""
    config = preset(name)
    data, recipe, student, teacher = (config[section] for section in ("data", "recipe", "student", "teacher"))
    on_policy = "OnPolicy" in config["distiller"]["_target_"]
    prompts = on_policy or data["train"] is None or "instruction" in data
    for split, count in {"train": 40, "test": 8}.items():
        lines = [json.dumps(row) for row in rows(data, prompts, count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    kind = "wordpiece" if "bert" in str(data["tokenizer"]) else "bpe"
    lengths = {key: value for key, value in {**(LONGER if prompts else SHORT), **WINDOWS}.items() if key in data}
    more = [f"experiment={name}", "hardware=cpu", "hardware.threads=1", f"data.train={folder}/train.jsonl"]
    more += [f"data.tokenizer={{vocabulary: 300, kind: {kind}}}", "data.cache=null", "data.overlap=keep"]
    more += [f"data.{key}={value}" for key, value in lengths.items()]
    more += [f"data.test={folder}/test.jsonl"] if data["test"] else ["data.test_fraction=0.2"]
    more += ["data.val_fraction=0.2", "protocol.val_every=1", "protocol.val_every_steps=null"]
    more += ["recipe.epochs=null", "recipe.steps=2", "recipe.batch_size=4"]
    more += [f"recipe.accumulate={min(2, recipe['accumulate'])}"]
    more += ["recipe.warmup=1"] if recipe["warmup"] else []
    more += ["distiller.share=1.0", "distiller.max_new_tokens=4"] if on_policy else []
    more += network("student", student["model"]) if student["model"] else []
    more += [*network("teacher", teacher["model"]), "teacher.allow_random=true"] if teacher["model"] else []
    more += [f"teacher.answers.folder={folder}/answers"] if teacher["answers"] else []
    surgery = student.get("surgery") or {}  # half of the layers is kept, of twelve, of thirty-two, of four
    tiny = {"layers": 2, "hidden": 24, "intermediate": 32}
    return [*more, *(f"student.surgery.{key}={value}" for key, value in tiny.items() if surgery.get(key))]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_two_steps_of_a_preset(name: str, tmp_path: Path) -> None:
    import torch

    from kd.run import build, trainer

    config, whole = checked(scaled(name, tmp_path)), preset(name)
    assert [config[section] for section in ("loss", "task")] == [whole[section] for section in ("loss", "task")]
    trainer.begin(config)
    data = build.datamodule(config)
    module = build.distiller(config, data)
    before = [p.detach().clone() for p in module.student.parameters()]
    fit = trainer.make_trainer(config, None, [], [], module)
    fit.fit(module, datamodule=data)
    assert fit.global_step == 2
    assert all(math.isfinite(module.epoch_means[f"train/{term}"]) for term in whole["loss"])
    after = module.student.parameters()
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
