"""Questions with contexts as windows: against the tokenizer's own overflow, and what cannot be answered."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kd.data.text.questions import Questions
from kd.data.text.tokenizer import trained, wrapped
from kd.errors import KdError
from kd.losses.base import Batch

WORDS = ("river", "Rain,", "walks", "slow", "home", "the wide", "winter", "train.", "1999", "(café)")


def asked(count: int, seed: int = 0, answered: float = 1.0) -> list[dict[str, Any]]:
    """Questions, three on each context of 5 to 60 words, of which the answer is a part."""
    drawn = random.Random(seed)
    rows = []
    for number in range(count):
        if number % 3 == 0:
            context = " ".join(drawn.choices(WORDS, k=drawn.randint(5, 60))) + f" {seed}-{number}"
        begin = drawn.randint(0, len(context) - 12)
        begin += context[begin:].index(" ") + 1 if " " in context[begin:] else 0
        end = begin + drawn.randint(3, 14)
        end += len(context[end:].split(" ")[0]) if number % 4 else 0  # some end inside of a word
        text = context[begin:end].strip()
        there = drawn.random() < answered
        answers = {"text": [text] if there else [], "answer_start": [begin] if there else []}
        rows.append({"question": f"what of {number} {text[:2]} ?", "context": context, "answers": answers})
    return rows


def tokenizer(rows: list[dict[str, Any]]) -> PreTrainedTokenizerFast:
    return wrapped(trained([f"{row['question']} {row['context']}" for row in rows], 120, "wordpiece", True))


def data(rows: list[dict[str, Any]], **options: Any) -> Questions:
    given = {"train": rows, "test_fraction": 0.2, "val_fraction": 0.2, "tokenizer": tokenizer(rows)}
    made = Questions(**{**given, "max_length": 40, "stride": 9, "question_length": 12, **options})
    made.setup()
    return made


def decoded(made: Questions, batch: Batch, line: int) -> str:
    """The text of the target of one window, by the characters of its tokens."""
    first, last = batch.targets[line].tolist()
    _, context, _ = batch.extra["asked"][line]
    begin, end = batch.extra["characters"][line, first, 0], batch.extra["characters"][line, last, 1]
    return str(context[int(begin) : int(end)])


def test_windows_are_those_of_the_tokenizers_own_overflow() -> None:
    """Its stride is the overlap; it truncates the second text alone, and knows where each token comes from."""
    rows = asked(30)
    made = data(rows, question_length=30, max_length=60, stride=9)
    part = made.parts["test"]
    for number, (context, _) in enumerate(part.asked):
        chosen = np.nonzero(part.windows.question == number)[0]
        ids = [part.windows.ids[slice(*part.windows.offsets[i : i + 2])].tolist() for i in chosen]
        question = made.tokenizer.decode(ids[0][1 : ids[0].index(made.tokenizer.sep_token_id)])
        before = len(made.tokenizer(question)["input_ids"])
        room = 60 - before - 1
        whole = made.tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=60,
            stride=room - 9,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        assert ids == whole["input_ids"]
        for place, i in enumerate(chosen):
            inside = np.array(whole.sequence_ids(place), dtype=object) == 1
            wanted = np.where(inside[:, None], np.array(whole["offset_mapping"][place]), 0)
            assert (part.windows.characters[slice(*part.windows.offsets[i : i + 2])] == wanted).all()
            assert part.windows.context[i].tolist() == [inside.argmax(), inside.argmax() + inside.sum()]


def test_targets_are_the_tokens_of_the_answer_or_none() -> None:
    rows = asked(60)
    made = data(rows, eval_batch_size=7)
    found: dict[int, int] = {}
    windows = 0
    for batch in made.test_dataloader():
        for line, (number, _, answers) in enumerate(batch.extra["asked"]):
            first, last = batch.targets[line].tolist()
            windows += 1
            if (first, last) == (0, 0):
                assert batch.extra["null"][line] == 0  # [CLS]
                continue
            found[number] = found.get(number, 0) + 1
            text = decoded(made, batch, line)
            assert answers[0] in text  # whole tokens: never less than the answer
            assert len(text) - len(answers[0]) < 14
            assert batch.extra["allowed"][line, first : last + 1].all()
    assert set(found) == set(range(len(made.parts["test"].asked)))  # windows overlap: one of them has it whole
    assert sum(found.values()) < windows


def test_what_is_allowed_is_the_context_and_the_place_of_no_answer() -> None:
    made = data(asked(30))
    for batch in made.train_dataloader():
        assert "asked" not in batch.extra
        ids, allowed = batch.inputs["input_ids"], batch.extra["allowed"]
        assert allowed.shape == (len(batch), 40)
        width = ids.shape[1]
        assert not allowed[:, width:].any()
        inside = allowed[:, :width].clone()
        inside[:, 0] = False
        types = batch.inputs["token_type_ids"].bool() & (ids != made.tokenizer.sep_token_id)
        assert torch.equal(inside, types & batch.mask)
        assert allowed[:, 0].all()
        assert batch.targets.shape == (len(batch), 2)
        assert allowed.gather(1, batch.targets).all()


def test_long_questions_are_truncated_and_windows_leave_no_token_out() -> None:
    rows = asked(12)
    for row in rows:
        row["question"] = " ".join([row["question"], *WORDS * 3])
    made = data(rows)
    windows = made.parts["train"].windows
    assert int((windows.offsets[1:] - windows.offsets[:-1]).max()) == 40
    assert set(windows.context[:, 0].tolist()) == {12 + 2}
    per_question: dict[int, list[int]] = {}
    for number, (begin, end) in zip(windows.question.tolist(), windows.context.tolist(), strict=True):
        per_question.setdefault(number, []).append(end - begin)
    for number, (context, _) in enumerate(made.parts["train"].asked):
        size = len(made.tokenizer(context, add_special_tokens=False)["input_ids"])
        parts = per_question[number]
        assert sum(parts[:-1]) - (len(parts) - 1) * (parts[0] - 9) + parts[-1] == size
        assert parts[:-1] == [40 - 12 - 3] * (len(parts) - 1)


def test_contexts_are_cut_whole_and_the_order_of_windows_is_their_index() -> None:
    made = data(asked(60))
    contexts = {split: {context for context, _ in part.asked} for split, part in made.parts.items()}
    assert not contexts["train"] & contexts["val"] | contexts["train"] & contexts["test"]
    assert sum(map(len, contexts.values())) == 20
    assert made.sizes["labelled"] == made.sizes["train"] == len(made.parts["train"])
    again = data(asked(60))
    assert torch.equal(again.parts["train"].targets, made.parts["train"].targets)
    assert made.digest == again.digest
    assert len(data(asked(60), train_size=10).parts["train"].asked) == 10


def test_a_cache_gives_the_same_windows(tmp_path: Path) -> None:
    rows = asked(24)
    first, again = (data(rows, cache=str(tmp_path)) for _ in range(2))
    assert list(tmp_path.glob("windows-*"))
    assert isinstance(again.parts["val"].windows.ids, np.memmap)
    one, other = (next(iter(made.val_dataloader())) for made in (first, again))
    assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
    assert torch.equal(one.extra["characters"], other.extra["characters"])


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_windows_of_a_question_are_on_one_process(world_size: int) -> None:
    made = data(asked(30), eval_batch_size=4)
    seen: list[Tensor] = []
    steps, owner = set(), {}
    for rank in range(world_size):
        made.trainer = SimpleNamespace(world_size=world_size, global_rank=rank)
        loader = made.val_dataloader()
        batches = list(loader)
        steps.add(len(batches))
        assert len(batches) == len(loader)
        for batch in batches:
            seen.append(batch.index)
            for number, *_ in batch.extra["asked"]:
                assert owner.setdefault(number, rank) == rank
    assert len(steps) == 1
    assert sorted(torch.cat(seen).tolist()) == list(range(len(made.parts["val"])))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_files_and_their_forms_of_answers(kind: str, tmp_path: Path) -> None:
    import pandas as pd

    rows = asked(24)
    file = tmp_path / f"questions.{kind}"
    if kind == "csv":
        table = pd.DataFrame(rows)
        table["answers"] = [json.dumps(row["answers"]) for row in rows]
        table.to_csv(file, index=False)
    elif kind == "parquet":
        pd.DataFrame(rows).to_parquet(file)
    else:  # one answer, or a list of them
        forms = [
            lambda a: {"text": a["text"][0], "answer_start": a["answer_start"][0]},
            lambda a: [{"text": a["text"][0], "answer_start": a["answer_start"][0]}],
        ]
        lines = [{**row, "answers": forms[i % 2](row["answers"])} for i, row in enumerate(rows)]
        file.write_text("\n".join(map(json.dumps, lines)))
    plain, read = data(rows), data(rows, train=str(file))
    assert torch.equal(read.parts["train"].targets, plain.parts["train"].targets)
    assert read.parts["test"].asked == plain.parts["test"].asked


def test_questions_without_an_answer() -> None:
    rows = asked(60, answered=0.5)
    made = data(rows, unanswerable=True)
    windows = made.parts["test"].windows
    for number, (_, answers) in enumerate(made.parts["test"].asked):
        targets = windows.targets[windows.question == number]
        assert (targets == 0).all() == (not answers)
    with pytest.raises(KdError, match=r"row \d+ of data\.train has no answer: set data\.unanswerable=true"):
        data(rows)


ROW = {"question": "who ?", "context": "It was the river.", "answers": {"text": ["the river"], "answer_start": [7]}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"answers": {"text": ["the river"], "answer_start": [6]}},
            r"row 13 of data\.train: the answer 'the river' is not in its context at answer_start = 6: ' the rive'",
        ),
        ({"answers": {"text": ["river."], "answer_start": [-6]}}, "answer_start = -6"),
        ({"answers": {"text": [" "], "answer_start": [2]}}, "the answer ' ' is not in its context"),
        ({"answers": None}, r"row 13 of data\.train has no answer: set data\.unanswerable=true"),
        ({"answers": {"text": ["river"]}}, r"data\.answers = answers must be \{text: \[TEXT, …\], answer_start"),
        ({"answers": {"text": ["river"], "answer_start": ["11"]}}, r"it is \{'text': \['river'\], 'answer_start'"),
        ({"answers": {"text": ["a", "b"], "answer_start": [1]}}, r"data\.answers = answers must be"),
        ({"answers": "river"}, r"data\.answers = answers must be .*it is river"),
        (
            {"context": " "},
            r"row 13 of data\.train: data\.context = context must be a text that is not empty, it is ' '",
        ),
        (
            {"question": None},
            r"row 13 of data\.train: data\.question = question must be a text that is not empty, it is None",
        ),
    ],
)
def test_a_row_that_is_no_question_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KdError, match=sentence):
        data([*asked(12), {**ROW, **change}, *asked(3, 1)])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"stride": 26}, r"data\.stride = 26 is not allowed: data\.max_length = 40 leaves 25 tokens of the context"),
        ({"stride": 0}, r"data\.stride = 0 is not allowed: it must be a whole number"),
        ({"max_length": None}, r"data\.max_length = null is not allowed"),
        ({"masking": 0.15}, r"data\.masking = 0\.15 is not allowed with questions"),
        ({"answers": "answer"}, r"data\.answers = answer is no column of data\.train \(near: answers\)"),
        ({"train_size": 1000}, r"data\.train_size = 1000 is not allowed"),
        ({"test_fraction": None}, "there is no test set"),
        ({"train": None}, r"data\.train = null is not allowed"),
        ({"overlap": "refuse", "test": asked(3), "test_fraction": None}, "questions of train are in val or test"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KdError, match=sentence):
        data(asked(30), **options)


class Slow:
    """A tokenizer without the characters of its tokens."""

    def __init__(self, fast: Any) -> None:
        self.fast = fast

    def __getattr__(self, name: str) -> Any:
        return False if name == "is_fast" else getattr(self.fast, name)


def test_a_tokenizer_that_is_not_fast_is_refused() -> None:
    rows = asked(30)
    with pytest.raises(KdError, match=r"data\.tokenizer is a Slow, .*: questions need a fast one"):
        data(rows, tokenizer=Slow(tokenizer(rows)))


def test_what_the_tokenizer_drops_is_refused() -> None:
    rows = [
        *asked(12),
        {**ROW, "context": "It was \u200b\u200b here.", "answers": {"text": ["\u200b\u200b"], "answer_start": [7]}},
    ]
    with pytest.raises(KdError, match="leaves nothing of the answer"):
        data(rows, val_fraction=0.2)


def test_articles_of_squads_own_file_are_the_same_questions(tmp_path: Path) -> None:
    """A paragraph has many questions, an article many paragraphs."""
    rows = asked(24)
    articles: list[dict[str, Any]] = [{"title": "one", "paragraphs": []}, {"title": "two", "paragraphs": []}]
    for number, context in enumerate(dict.fromkeys(row["context"] for row in rows)):
        about = [row for row in rows if row["context"] == context]
        single = [
            {"question": row["question"], "id": "x", "answers": [{"text": text, "answer_start": begin}]}
            for row in about
            for text, begin in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        ]
        articles[number % 2]["paragraphs"].append({"context": context, "qas": single})
    (tmp_path / "train-v1.1.json").write_text(json.dumps({"version": "1.1", "data": articles}))
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kind = tokenizer(rows)
    nested = data(rows, train=str(tmp_path / "train-v1.1.json"), tokenizer=kind)
    plain = data(rows, train=str(tmp_path / "train.jsonl"), tokenizer=kind)
    assert sum(len(part.asked) for part in nested.parts.values()) == 24
    both = [sorted(one for part in made.parts.values() for one in map(str, part.asked)) for made in (nested, plain)]
    assert both[0] == both[1]
    articles[0]["paragraphs"][0].pop("qas")
    (tmp_path / "train-v1.1.json").write_text(json.dumps({"version": "1.1", "data": articles}))
    with pytest.raises(KdError, match="is not SQuAD's file: its articles must have paragraphs"):
        data(rows, train=str(tmp_path / "train-v1.1.json"), tokenizer=kind)
