"""A teacher with a tokenizer of its own: rows of the same text in both, places where tokens end, and runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd.cli.main import main
from kd.data.text import teacher_tokens, tokenizer
from kd.data.text.encode import encode_documents
from kd.data.text.lm import Documents
from kd.distill.cache import CachedAnswers
from kd.distill.distiller import Distiller
from kd.distill.objective import Objective
from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch
from kd.losses.logits.ce import CrossEntropy
from kd.losses.logits.kd import KnowledgeDistillation
from kd.losses.tokens.gold import Gold, gold_hybrid_loss
from kd.losses.tokens.uld import UniversalLogit, uld_loss
from kd.models.transformers_model import transformers_model
from kd.setups.on_policy import OnPolicy
from kd.tasks.tokens import CausalLM
from tests.tiny_language import LLAMA

WORDS = ("the", "river", "was", "wide", "and", "slow", "она", "шла", "home", "in", "naïve", "rain", "🌧")
CHATML = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
OTHER = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def prose(lines: int, seed: int) -> str:
    random = np.random.default_rng(seed)
    return "".join(" ".join(random.choice(WORDS, random.integers(4, 14))) + f" {seed}-{i}.\n" for i in range(lines))


def made(kind: str, vocabulary: int, **settings: Any) -> Any:
    trained = tokenizer.trained([prose(60, 5)], vocabulary, kind, lowercase=False)
    found = tokenizer.wrapped(trained)
    for name, value in settings.items():
        setattr(found, name, value)
    return found


@pytest.fixture(scope="module")
def student() -> Any:
    return made("bpe", 300)


@pytest.fixture(scope="module")
def teacher() -> Any:
    return made("wordpiece", 90)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, lines in (("train", 40), ("val", 12), ("test", 12)):
        (tmp_path / f"{name}.txt").write_text(prose(lines, len(name) + lines))
    return tmp_path


def documents(root: Path, student: Any, teacher: Any, **options: Any) -> Documents:
    given = {"train": "train.txt", "val": "val.txt", "test": "test.txt", "length": 24, "batch_size": 8}
    data = Documents(root=str(root), tokenizer=student, teacher_tokenizer=teacher, **{**given, **options})
    data.setup()
    return data


def texts(ids: torch.Tensor, batch: Batch, own: Any) -> list[str]:
    """What each row of ids says, without spaces, special tokens and pads."""
    rows = [row[mask].tolist() for row, mask in zip(ids, batch.mask, strict=True)]
    return ["".join(own.decode([i for i in row if i not in own.all_special_ids]).split()) for row in rows]


def places(rows: Batch, side: str) -> list[torch.Tensor]:
    """Where the predicted tokens of each sample end."""
    return list(rows.extra[f"{side}_ends"].split(rows.extra[f"{side}_lengths"].tolist()))


# ---------------------------------------------------------------------- places and rows


def test_places_are_bytes_of_the_text_whatever_the_tokenizer(student, teacher) -> None:
    """Each token ends behind as many bytes as its text is long; the end token is a place of its own."""
    rows = ["naïve 🌧 rain", "она"]
    found = []
    for own in (student, teacher):
        tokens = encode_documents(own, rows, [], [own.eos_token_id])
        sizes = [[(0, len(row.encode()))] for row in rows]
        found.append(teacher_tokens.ends_of(tokens, sizes, np.array([True, True])))
    first = len("naïve 🌧 rain".encode())
    for ends in found:
        assert (np.diff(ends) >= 0).all()
        assert ends[-1] == first + 2 + len("она".encode()) + 1
        assert {len("naïve".encode()), first, first + 1} <= set(ends.tolist())
    words = {len("naïve".encode()), len("naïve 🌧".encode()), first, first + 1}
    assert words <= set(np.intersect1d(*found).tolist())


def test_blocks_end_where_tokens_of_both_end() -> None:
    student, teacher = np.array([1, 2, 3, 4, 6, 8, 9]), np.array([2, 4, 5, 8, 9])
    (begin, end), (other_begin, other_end), lost = teacher_tokens.blocks_together(student, teacher, 4)
    assert lost == 0
    assert list(zip(begin.tolist(), end.tolist(), strict=True)) == [(1, 4), (3, 7)]  # common: 2, 4, 8, 9
    assert list(zip(other_begin.tolist(), other_end.tolist(), strict=True)) == [(0, 2), (1, 5)]
    _, _, lost = teacher_tokens.blocks_together(student, teacher, 2)
    assert lost == 2  # 2 to 4 and 4 to 8 take three tokens of the student each


def test_rows_are_cut_where_tokens_of_both_end() -> None:
    student = (np.array([0, 5, 7]), np.array([1, 2, 3, 5, 7, 8, 9]))
    teacher = (np.array([0, 3, 4]), np.array([2, 5, 7, 9]))
    (begin, end), (other_begin, other_end), cut = teacher_tokens.cut_together([student, teacher], 4)
    assert (begin.tolist(), end.tolist()) == ([0, 5], [4, 7])
    assert (other_begin.tolist(), other_end.tolist()) == ([0, 3], [2, 4])
    assert cut == 1
    assert teacher_tokens.cut_together([student, teacher], 1)[0][1].tolist() == [0, 5]  # no common place within


@pytest.mark.parametrize("options", [{}, {"document": "line", "packing": False, "length": 12}, {"document": "line"}])
def test_a_row_has_the_same_text_in_both(files, student, teacher, options) -> None:
    data = documents(files, student, teacher, **options)
    most = options.get("length", 24)
    seen = 0
    for batch in data.test_dataloader():
        other = batch.of_teacher
        assert batch.inputs["input_ids"].shape[1] <= most >= other.inputs["input_ids"].shape[1]
        assert torch.equal(batch.index, other.index)
        ends = [side.extra["ends"].masked_fill(~side.mask, -1).amax(1) for side in (batch, other)]
        assert torch.equal(*ends)
        rows = CausalLM().rows(batch)
        sides = [
            rows.extra[f"{side}_ends"].split(rows.extra[f"{side}_lengths"].tolist()) for side in ("student", "teacher")
        ]
        for one, two in zip(*sides, strict=True):
            assert one[-1] == two[-1]
            assert set(one.tolist()) & set(two.tolist())
        seen += int(rows.extra["student_lengths"].sum())
        if not data.packing and "packing" in options:
            assert texts(batch.inputs["input_ids"], batch, student) == texts(other.inputs["input_ids"], other, teacher)
    if not options:  # each byte behind the first common place is predicted once, on both sides
        everything = data.parts["test"]
        for part in (everything, everything.teacher):
            assert part.begin[1:].tolist() == (part.end[:-1] - 1).tolist()
            assert part.end[-1] == len(part.tokens.ids)
        assert seen == int((everything.end - everything.begin - 1).sum())


def test_bits_a_byte_count_the_same_bytes_on_both_sides(files, student, teacher) -> None:
    data, counted = documents(files, student, teacher), [0, 0]
    for batch in data.test_dataloader():
        rows = CausalLM().rows(batch)
        for number, side in enumerate((rows, rows.of_teacher)):
            counted[number] += int(side.extra["row_bytes"].sum())
    assert counted[0] == counted[1]
    assert counted[0] <= len((files / "test.txt").read_bytes())


def test_answers_of_dialogues_are_compared_whatever_the_templates_write(tmp_path) -> None:
    rows = [
        {"messages": [
            {"role": "user", "content": f"where {i}?"}, {"role": "assistant", "content": "она шла home"},
            {"role": "user", "content": "and then"}, {"role": "assistant", "content": f"rain {i}"},
        ]}
        for i in range(12)
    ]  # fmt: skip
    student, teacher = made("bpe", 300, chat_template=CHATML), made("bpe", 280, chat_template=OTHER)
    data = documents(tmp_path, student, teacher, train=rows[:8], val=rows[8:10], test=rows[10:], length=120)
    batch = CausalLM().rows(next(iter(data.test_dataloader())))
    said = len("она шла home".encode())
    for number, sample in enumerate(("rain 10", "rain 11")):
        own, other = (places(batch, side)[number].tolist() for side in ("student", "teacher"))
        start = number * (1 + said + 1 + len(sample) + 1)
        common = set(own) & set(other)
        # of both answers the end, and behind it what the template closes it by
        assert {start + said, start + said + 1, start + said + 1 + len(sample)} <= common
        assert max(own) == max(other) == start + said + 1 + len(sample) + 1


def test_a_template_that_changes_an_answer_is_refused(tmp_path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "Rain"}]} for i in range(9)
    ]
    shouting = made("bpe", 280, chat_template=OTHER.replace("m['content']", "m['content'] | upper"))
    student = made("bpe", 300, chat_template=CHATML)
    with pytest.raises(KdError, match="a chat template changes what the assistant says"):
        documents(tmp_path, student, shouting, train=rows[:5], val=rows[5:7], test=rows[7:], length=120)


# ---------------------------------------------------------------------- vocabularies


def test_tokens_that_both_vocabularies_have(student, teacher) -> None:
    matched = teacher_tokens.matched_ids(student, teacher)
    own, other = teacher_tokens.token_bytes(student), teacher_tokens.token_bytes(teacher)
    assert matched.shape[0] == 2
    pairs = set(zip(*matched.tolist(), strict=True))
    assert (own[b"r"], other[b"r"]) in pairs  # ##r: within a word
    assert (student.eos_token_id, teacher.eos_token_id) in pairs
    assert all(one in own.values() or one == student.eos_token_id for one, _ in pairs)
    same = {text: number for text, number in own.items() if text in other}
    assert len(pairs) == len(same) + 1
    assert all(student.decode([number]).encode() == text for text, number in own.items() if text.isascii())
    assert (other[b"r"], other[b" r"]) == tuple(teacher.get_vocab()[token] for token in ("##r", "r"))


def test_one_vocabulary_is_one_tokenizer(files, student) -> None:
    again = made("bpe", 300)
    data = documents(files, student, again)
    assert data.for_teacher is data
    assert not next(iter(data.train_dataloader())).views
    larger = made("bpe", 300)
    larger.add_tokens(["<extra>"])
    assert teacher_tokens.same_vocabulary(student, larger)
    assert not teacher_tokens.same_vocabulary(student, made("bpe", 290))  # its ids are the same, its texts are not


# ---------------------------------------------------------------------- terms, and what is refused


def network(vocabulary: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return transformers_model(
        config={**LLAMA, "num_hidden_layers": 1, "vocab_size": len(vocabulary)}, architecture="causal_lm"
    )


def test_terms_read_the_rows_of_both(files, student, teacher) -> None:
    data = documents(files, student, teacher)
    batch = next(iter(data.train_dataloader()))
    module = Distiller(
        network(student, 0), network(teacher, 1), Objective({"gold": Gold(), "uld": UniversalLogit()}), CausalLM()
    )
    module.prepare(batch)
    assert not module.comparable
    assert module.measures_teacher
    rows = module.task.rows(batch)
    with torch.no_grad():
        answered = module.answer_of_student(rows).logits, module.answer_of_teacher(rows).logits
        alone = [
            net(**side.inputs).logits.flatten(0, 1)[side.extra["positions"]]
            for net, side in ((module.student, rows), (module.teacher.networks[0], rows.of_teacher))
        ]
        step = module.losses(rows)
    for one, two in zip(answered, alone, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    names = ("lengths", "ids", "ends", "matched")
    extra = {f"{side}_{name}": rows.extra[f"{side}_{name}"] for side in ("student", "teacher") for name in names}
    expected = gold_hybrid_loss(student_logits=alone[0], teacher_logits=alone[1], **extra)
    torch.testing.assert_close(step.values["gold"], expected, rtol=1e-4, atol=1e-6)
    lengths = [extra[f"{side}_lengths"] for side in ("student", "teacher")]
    torch.testing.assert_close(
        step.values["uld"], uld_loss(alone[0], lengths[0], alone[1], lengths[1]), rtol=1e-4, atol=1e-6
    )
    assert [term.over for _, term in module.objective.items()] == ["samples", "samples"]
    assert all((extra[f"{side}_ids"] != UNLABELLED).all() for side in ("student", "teacher"))


def test_what_compares_one_tokenizer_is_refused(files, student, teacher) -> None:
    data = documents(files, student, teacher)
    batch = next(iter(data.train_dataloader()))
    nets = network(student, 0), network(teacher, 1)
    module = Distiller(*nets, Objective({"ce": CrossEntropy(), "kd": KnowledgeDistillation()}), CausalLM())
    with pytest.raises(KdError, match=r"^loss\.kd compares the tokens of one tokenizer.* loss=\[ce,uld\] or "):
        module.prepare(batch)
    writes = OnPolicy(*nets, Objective({"gold": Gold()}), CausalLM())
    with pytest.raises(KdError, match="distiller = on_policy is not allowed with a teacher of another tokenizer"):
        writes.prepare(batch)
    with pytest.raises(KdError, match=r"teacher\.answers is not allowed with a teacher of another tokenizer"):
        CachedAnswers(None, data, CausalLM(), path="nowhere")
    with pytest.raises(KdError, match=r"task\.rows = real is not allowed with two tokenizers"):
        CausalLM(rows="real").rows(batch)
    for options, sentence in (
        ({"masking": 0.15}, "data.teacher_tokenizer is not allowed with data.masking"),
        ({"teacher_tokenizer": 3}, "data.teacher_tokenizer = 3 is not allowed: it must be the name or folder of one"),
        ({"teacher_tokenizer": "./nowhere"}, "data.teacher_tokenizer = ./nowhere: there is no such folder"),
    ):
        given = {"teacher_tokenizer": teacher, **options}
        with pytest.raises(KdError, match=re.escape(sentence)):
            documents(files, student, given.pop("teacher_tokenizer"), **given)
    short = made("wordpiece", 90, model_max_length=16)
    with pytest.raises(KdError, match=r"data\.length = 24 .*data\.teacher_tokenizer take 16 tokens"):
        documents(files, student, short)


# ---------------------------------------------------------------------- runs


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    code = main(list(argv))
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out + printed.err


def arguments(files: Path, name: str, config: dict[str, Any], tokens: str, *more: str) -> list[str]:
    left = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
    inside = ",".join(f"{key}: {value}" for key, value in config.items() if key not in left)
    return [
        *("train", "task=causal_lm", "data=lm", f"data.root={files}", "data.cache=null", "data.train=train.txt"),
        *("data.val=val.txt", "data.test=test.txt", "data.length=24", f"data.tokenizer={tokens}", "recipe.epochs=2"),
        *("model@student=transformers", "student.model.pretrained=false", f"student.model.config={{{inside}}}"),
        *("recipe.batch_size=8", "hardware=cpu", "hardware.threads=1", f"hydra.run.dir={files / name}", *more),
    ]


@pytest.mark.slow
def test_a_student_of_another_tokenizer_and_of_another_family(files, capsys) -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}
    run(capsys, *arguments(files, "teacher", gpt2, "{vocabulary: 320, kind: bpe}", "loss=[ce]"))
    small = {**LLAMA, "num_hidden_layers": 1}
    own, teaches = "{vocabulary: 90, kind: wordpiece}", f"teacher.checkpoint={files / 'teacher'}"
    printed = run(capsys, *arguments(files, "student", small, own, teaches, "loss=[ce,gold]"))
    assert "the teacher has a tokenizer of its own" in printed
    alone, record = (json.loads((files / name / "result.json").read_text()) for name in ("teacher", "student"))
    test = record["teacher"]["test"]
    assert set(test) == {"nll", "perplexity", "bpb", "acc1"}
    assert set(record["student"]["selected"]["test"]) == {"nll", "perplexity", "bpb", "acc1"}
    assert test["bpb"] == pytest.approx(alone["student"]["selected"]["test"]["bpb"], rel=0.05)  # other blocks
    assert record["teacher"]["compared_by"] == "bpb"
    ratio = record["student"]["selected"]["test"]["bpb"] / test["bpb"]
    assert f"{ratio:.3f} times the teacher's bits a byte" in printed
    assert record["data"]["teacher_tokenizer"] == alone["data"]["tokenizer"]
    assert set(record["student"]["last"]["train"]) >= {"ce", "gold"}
    for who, there in (("student", record["student"]["selected"]["test"]), ("teacher", test)):
        run(capsys, "eval", f"run={files / 'student'}", f"who={who}", f"out={files / 'found.json'}")
        found = json.loads((files / "found.json").read_text())
        assert found["metrics"] == pytest.approx(there, rel=1e-5)
    assert main(arguments(files, "refused", small, own, teaches, "loss=[ce,kd]")) == 1
    assert "loss.kd compares the tokens of one tokenizer" in capsys.readouterr().err
    begin = Distiller.on_train_epoch_start

    def stop(self: Distiller) -> None:
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        begin(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distiller, "on_train_epoch_start", stop)
        assert main(arguments(files, "cut", small, own, teaches, "loss=[ce,gold]")) != 0
    shutil.rmtree(files / "cut" / "selected")  # it is written anew
    run(capsys, "train", f"resume={files / 'cut'}")
    again = json.loads((files / "cut" / "result.json").read_text())
    assert again["student"]["last"]["digest"] == record["student"]["last"]["digest"]
    assert again["teacher"]["test"] == test


def test_a_named_tokenizer_of_a_random_teacher(files, teacher, capsys) -> None:
    teacher.save_pretrained(files / "tokens")
    small = {**LLAMA, "num_hidden_layers": 1}
    named = (f"data.teacher_tokenizer={files / 'tokens'}", "model@teacher=transformers", "teacher.allow_random=true")
    more = (
        "teacher.model.pretrained=false",
        "teacher.model.config={model_type: gpt2, n_embd: 32, n_layer: 1, n_head: 2}",
    )
    given = arguments(
        files, "run", small, "{vocabulary: 300, kind: bpe}", *named, *more, "loss=[ce,uld]", "recipe.epochs=1"
    )
    run(capsys, *given)
    record = json.loads((files / "run" / "result.json").read_text())
    assert record["teacher"]["test"]["perplexity"] == pytest.approx(len(teacher), rel=0.2)
