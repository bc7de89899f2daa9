"""A run takes the tokenizer that its pretrained networks were trained with, or says in a sentence which it must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel

from kd.cli.main import main
from kd.data.text.tokenizer import digest, trained, wrapped

SEA = ("the ship sailed over the wide water", "sailors sang while sailing", "waves washed the ship", "a wave rose")
LAND = ("gardeners planted roses", "the garden grew", "planting takes months", "roses grow in the garden")
TASKS = {
    "text_classification": ["data=text", "data.train=rows.csv", "data.label=label", "data.max_length=16"],
    "masked_lm": ["data=lm", "data.train=rows.txt", "data.masking=0.15", "data.length=16"],
}
OWN_SIZE = "student.model.config={model_type: bert, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pretrained encoders of one size, whose tokenizers know the words of the sea and of the land; texts."""
    for name, texts in (("sea", SEA), ("land", LAND)):
        tokenizer = wrapped(trained(texts * 3, 150, "wordpiece", True))
        sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        BertModel(BertConfig(vocab_size=160, intermediate_size=8, **sizes)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [f"{text} {i}" for i, text in enumerate(SEA * 8)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{row},{i % 2}\n" for i, row in enumerate(rows)))
    (tmp_path / "rows.txt").write_text("\n".join(rows))
    return tmp_path


def arguments(folder: Path, task: str, *more: str, run: str = "run") -> list[str]:
    return [
        *("train", *TASKS[task], f"task={task}", f"data.root={folder}", "data.val_fraction=0.2"),
        *("data.test_fraction=0.2", "model@student=transformers", "recipe.epochs=1", "recipe.batch_size=8"),
        *("hardware=cpu", "hardware.threads=1", f"hydra.run.dir={folder / run}", *more),
    ]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("side", ["student", "teacher", "surgery"])
def test_the_tokenizer_is_that_of_the_pretrained_network(
    folder: Path, task: str, side: str, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = ["model@teacher=transformers", f"teacher.model.name={folder / 'sea'}", "teacher.allow_random=true"]
    more = {
        "student": [f"student.model.name={folder / 'sea'}", "loss=[ce]"],
        "teacher": [OWN_SIZE, *teacher, "loss=[ce,kd]"],
        "surgery": ["model@student=none", "student.surgery.layers=1", *teacher, "loss=[ce,kd]"],
    }[side]
    if side == "teacher" and task == "masked_lm":  # it is padded, the student is not
        more.append("data.vocabulary=tokenizer")
    code = main(arguments(folder, task, *more))
    assert code == 0, capsys.readouterr().err
    from transformers import AutoTokenizer

    record = json.loads((folder / "run" / "result.json").read_text())
    own = AutoTokenizer.from_pretrained(folder / "sea")
    assert len(AutoTokenizer.from_pretrained(folder / "run" / "selected")) == len(own)
    assert record["data"]["tokenizer"] == digest(own)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_network_of_another_tokenizer_is_refused(
    folder: Path, task: str, restricted: bool, side: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one size and another order, as well as of other entries: ids would mean other tokens, without a word."""
    more = [f"data.tokenizer={folder / 'sea'}", *(["data.vocabulary=corpus"] if restricted else [])]
    more += {
        "student": [f"student.model.name={folder / 'land'}", "loss=[ce]"],
        "teacher": [OWN_SIZE, "model@teacher=transformers", f"teacher.model.name={folder / 'land'}", "loss=[ce,kd]"],
    }[side]
    assert main(arguments(folder, task, *more, "teacher.allow_random=true")) == 1
    said = capsys.readouterr().err
    assert f"{side}.model.name = {folder / 'land'} was trained with another tokenizer than data.tokenizer" in said
    assert f"set data.tokenizer={folder / 'land'}" in said


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("student", [[OWN_SIZE], ["model@student=none", "student.surgery.layers=1"]])
def test_the_tokenizer_is_that_of_the_teachers_run(
    folder: Path, task: str, student: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it one of 4,000 entries would be trained on the texts, and the teacher refused."""
    own = [OWN_SIZE, "data.tokenizer.vocabulary=270", "loss=[ce]"]
    code = main(arguments(folder, task, *own, run="teacher"))
    assert code == 0, capsys.readouterr().err
    code = main(arguments(folder, task, *student, f"teacher.checkpoint={folder / 'teacher'}", "loss=[ce,kd]"))
    assert code == 0, capsys.readouterr().err
    teacher, made = (json.loads((folder / name / "result.json").read_text()) for name in ("teacher", "run"))
    assert made["data"]["tokenizer"] == teacher["data"]["tokenizer"]
    on = [OWN_SIZE, f"student.checkpoint={folder / 'teacher'}", "loss=[ce]"]
    capsys.readouterr()
    other = f"data.tokenizer.lowercase={str(task == 'masked_lm').lower()}"
    assert main(arguments(folder, task, *on, other, run="other")) == 1
    assert "set data.tokenizer=RUN, its run" in capsys.readouterr().err
    code = main(arguments(folder, task, *on, f"data.tokenizer={folder / 'teacher'}", run="on"))
    assert code == 0, capsys.readouterr().err
