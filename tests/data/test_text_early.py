"""What is refused before torch is imported: the sentence of the set itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kd.data.text.early import DOCUMENTS, SENTENCES, refuse_files
from kd.data.text.lm import Documents
from kd.data.text.sentences import Sentences
from kd.errors import KdError

GOOD = "text,label\n" + "".join(f"card {i},{'ab'[i % 2]}\n" for i in range(40))
OPTIONS: dict[str, Any] = {"val": None, "test": None, "encoding": "utf-8", "delimiter": None}
COLUMNS: dict[str, Any] = {"text": "text", "text_pair": None, "label": "label", "label_names": None, "numbers": False}
WRONG = {
    "no file": ({"train": "none.csv"}, "there is no such file"),
    "encoding": ({"encoding": "ascii"}, "is not ascii"),
    "line": ({"train": "line.csv"}, "line 3 has 3 cells"),
    "column": ({"label": "intent"}, "data.label = intent is no column"),
    "second text": ({"text_pair": "other"}, "data.text_pair = other is no column"),
    "column of test": ({"test": "bad.csv"}, "data.label = label is no column"),
    "two files": ({"test": ["good.csv", "bad.csv"]}, "have other columns: class, label"),
    "one class": ({"train": "one.csv"}, "has 1 class (a)"),
    "numbers": ({"train": "numbers.csv"}, "task=text_regression"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "good.csv").write_text(GOOD + "café,a\n", encoding="utf-8")
    (tmp_path / "line.csv").write_text("text,label\na,b\nc,d,e\n")
    (tmp_path / "bad.csv").write_text("text,class\na,b\n")
    (tmp_path / "one.csv").write_text("text,label\na,a\nb,a\n")
    (tmp_path / "numbers.csv").write_text("text,label\na,1\nb,2.5\n")
    return tmp_path


@pytest.mark.parametrize("wrong", WRONG)
def test_the_sentence_is_that_of_the_set(wrong, folder) -> None:
    change, sentence = WRONG[wrong]
    given = {"root": str(folder), "train": "good.csv", **OPTIONS, **COLUMNS, **change}
    with pytest.raises(KdError) as early:
        refuse_files({"_target_": SENTENCES[0], "masking": None, **given})
    with pytest.raises(KdError) as late:
        Sentences(test_fraction=0.2 if given["test"] is None else None, **given).setup()
    assert sentence in str(early.value)
    assert str(early.value) == str(late.value)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"train": "numbers.csv", "numbers": True},
        {"train": "numbers.csv", "label_names": ["1", "2.5"]},
        {"train": "one.csv", "label": None},
        {"train": "one.csv", "masking": 0.15},
        {"train": [{"text": "a", "label": "b"}]},
        {"train": {"name": "no/such-set"}},
        {"_target_": "my.Set", "train": "none.csv"},
        {"_target_": DOCUMENTS, "train": "bad.csv"},
    ],
)
def test_what_is_allowed_or_not_known_passes(change, folder) -> None:
    given = {"_target_": SENTENCES[0], "root": str(folder), "train": "good.csv", "masking": None}
    refuse_files({**given, **OPTIONS, **COLUMNS, **change})


def test_documents_need_their_files(folder) -> None:
    given = {"root": str(folder), "train": "none.txt", **OPTIONS}
    with pytest.raises(KdError) as early:
        refuse_files({"_target_": DOCUMENTS, **given})
    with pytest.raises(KdError) as late:
        Documents(**given).setup()
    assert str(early.value) == str(late.value)


def test_a_run_is_refused_before_torch_is_imported(folder) -> None:
    given = ["data=text", "data.train=none.csv", "data.test_fraction=0.2", "task=text_classification"]
    given += ["model@student=bert_tiny", "recipe=finetune", "hydra.run.dir=run", f"paths.data={folder}"]
    code = f"import sys; from kd.cli.main import main; c = main({['train', *given]}); print(c, 'torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout.splitlines()[-1] == "1 False"
    assert "kd: data.train = none.csv: there is no such file" in done.stderr
