"""``kd predict`` and ``kd.load``: the same answers as in the run's own evaluation, in order; what cannot be read."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import kd
from kd.cli.main import main
from kd.deploy import inputs
from kd.deploy.predict import _of_images
from kd.errors import KdError
from kd.run.evaluate import evaluate, run_config

SUBJECTS = {
    "card": ("lost card", "my card is gone", "card stolen"),
    "rate": ("exchange rate", "what rate today", "rates"),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class folders of photographs, of other sizes than the network's, and a run on it."""
    folder = tmp_path_factory.mktemp("images")
    drawn = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for place, name in enumerate(("ant", "bee")):
            (folder / "pets" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = drawn.integers(0, 120, (20 + number, 24, 3)) + 120 * place
                Image.fromarray(pixels.astype("uint8")).save(folder / "pets" / split / name / f"{number}.png")
    argv = ["train", "data=imagefolder", f"data.folder={folder / 'pets'}", "data.image_size=16", "data.num_workers=0"]
    argv += ["model@student=mlp", "student.model.hidden=[8]", "recipe.epochs=2", "hardware=cpu", "recipe.batch_size=8"]
    assert main([*argv, "recipe.optimizer.lr=0.01", f"hydra.run.dir={folder / 'run'}"]) == 0
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A csv of texts, and the run of a BERT of one layer on it."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [
        (f"{phrase} {word}", name) for name, phrases in SUBJECTS.items() for phrase in phrases for word in "abcdefgh"
    ]
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(folder / "train.csv", index=False)
    argv = ["train", "data=text", f"data.train={folder / 'train.csv'}", "data.test_fraction=0.25", "data.cache=null"]
    argv += ["task=text_classification", "model@student=bert_tiny", "student.model.config.num_hidden_layers=1"]
    assert main([*argv, "hardware=cpu", "recipe=finetune", "recipe.epochs=1", f"hydra.run.dir={folder / 'run'}"]) == 0
    return folder


def test_images_are_answered_as_in_the_run(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept: dict[str, Any] = {}
    config = run_config(images / "run")
    evaluate(config, "student", "test", images / "run" / "student.safetensors", kept)
    expected = torch.cat(kept["logits"]).softmax(1)
    predictor = kd.load(images / "run")
    files = sorted((images / "pets" / "test").rglob("*.png"))
    found = predictor.predict(files, batch_size=3)
    assert [one.input for one in found] == list(map(str, files))
    order = torch.cat(kept["index"]).argsort()
    probabilities = torch.tensor([list(one.probabilities.values()) for one in found])
    torch.testing.assert_close(probabilities, expected[order], rtol=1e-4, atol=1e-6)
    for one in found:
        assert list(one.probabilities) == ["ant", "bee"]
        assert one.top(2)[0] == (one.label, one.probability)
        assert one.probability == max(one.probabilities.values())
    with Image.open(files[0]) as opened:
        assert predictor.predict([opened.copy()])[0].probability == pytest.approx(found[0].probability)


def test_a_grey_image_keeps_its_levels(tmp_path: Path) -> None:
    levels = np.arange(256, dtype="uint8").reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    facts = {"input_shape": [1, 16, 16], "mean": [0.0], "std": [1.0]}
    (found,) = _of_images(facts, {"data": {}})([tmp_path / "grey.png"])
    torch.testing.assert_close(found[0] * 255, torch.from_numpy(levels).float())


def test_the_command_writes_rows_in_order(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = str(images / "run"), images / "pets" / "test"
    assert main(["predict", run, str(folder), "top=3", "probabilities=true"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["input"] for row in rows] == sorted(map(str, folder.rglob("*.png")))
    for row in rows:
        assert float(row["p(ant)"]) + float(row["p(bee)"]) == pytest.approx(1, abs=1e-4)
        assert {row["label"], row["label_2"]} == {"ant", "bee"}
        assert row["label_3"] == row["probability_3"] == ""
    pattern, out = str(folder / "ant" / "*.png"), tmp_path / "found.jsonl"
    assert main(["predict", f"run={run}", f"data={pattern}", f"out={out}", "who=student", "weights=last"]) == 0
    assert [json.loads(line)["input"] for line in out.read_text().splitlines()] == sorted(
        map(str, (folder / "ant").glob("*.png"))
    )


def test_an_image_that_cannot_be_read(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = next((images / "pets" / "test" / "bee").iterdir())
    bad, out = tmp_path / "bad.png", tmp_path / "found.csv"
    bad.write_text("no image")
    arguments = ["predict", str(images / "run"), str(bad), str(good), f"out={out}"]
    capsys.readouterr()
    for argv in (arguments[:-1], arguments, [*arguments[:-1], f"out={out.with_suffix('.jsonl')}"]):
        assert main(argv) == 1
        said = capsys.readouterr()
        assert str(bad) in said.err
        assert said.out == ""  # no header without a row
        assert list(tmp_path.iterdir()) == [bad]  # and no part of a file
    assert main([*arguments, "skip_unreadable=true"]) == 1
    first, second = csv.DictReader(io.StringIO(out.read_text()))
    assert first["label"] == ""
    assert str(bad) in first["error"]
    assert second["label"] in ("ant", "bee")
    assert second["error"] == ""


def test_texts_of_a_table_of_lines_and_of_standard_input(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: dict[str, Any] = {}
    evaluate(run_config(texts / "run"), "student", "test", texts / "run" / "student.safetensors", kept)
    whole = pd.read_csv(texts / "train.csv")["text"].tolist()
    asked = [whole[row] for row in torch.cat(kept["index"]).tolist()]
    (tmp_path / "new.csv").write_text("question\n" + "\n".join(asked) + "\n")
    named = [f"{place},{text}" for place, text in enumerate(asked)]
    (tmp_path / "named.csv").write_text("id,question\n" + "\n".join(named) + "\n")
    (tmp_path / "new.txt").write_text("\n".join(asked) + "\n\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(asked)))
    expected = torch.cat(kept["logits"]).softmax(1).max(1).values
    tables = ([str(tmp_path / f"{name}.csv"), "column=question"] for name in ("new", "named"))
    for source in (*tables, [str(tmp_path / "new.txt")], ["-"]):
        capsys.readouterr()
        assert main(["predict", str(texts / "run"), *source, "batch_size=5"]) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert [row["input"] for row in rows] == asked
        assert [row.get("id") for row in rows] == [str(i) if "named" in source[0] else None for i in range(len(asked))]
        assert [float(row["probability"]) for row in rows] == pytest.approx(expected.tolist(), rel=1e-4)


def test_what_cannot_be_is_one_sentence(images: Path, texts: Path, tmp_path: Path) -> None:
    for sentence, call in {
        "who = techer is not allowed.*near: teacher": lambda: kd.load(images / "run", "techer"),
        "is not a run directory": lambda: kd.load(tmp_path),
        "a list of inputs": lambda: kd.load(images / "run").predict("photo.png"),
        "no teacher": lambda: kd.load(images / "run", "teacher"),
        r"int64 \(3, 16, 16\)": lambda: kd.load(images / "run").predict([torch.zeros(3, 16, 16, dtype=torch.int64)]),
        "trained on texts, this is none": lambda: kd.load(texts / "run").predict([("a", "b")]),
    }.items():
        with pytest.raises(KdError, match=sentence):
            call()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run"], "needs a run and inputs"),
        (["run", "nowhere.png"], "nowhere.png"),
        (["run", "x.png", "top=0"], "top = 0"),
        (["run", "x.png", "tpo=1"], "near: top"),
        (["run", "x.png", "out=a.txt"], "out = a.txt"),
        (["run", "{image}", "out=a.json"], ".json is {id: answer} of questions"),
        (["run", "x.png", "skip_unreadable=1"], "true or false"),
        (["run", "x.csv", "delimiter=;;"], "delimiter = ;; is not allowed: it must be one character"),
    ],
)
def test_bad_arguments(argv: list[str], words: str, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(next((images / "pets" / "test" / "bee").iterdir()))
    argv = [str(images / "run") if argv[0] == "run" else argv[0], *(image if a == "{image}" else a for a in argv[1:])]
    assert main(["predict", *argv]) == 1
    assert words in capsys.readouterr().err


def test_no_file_is_written_over(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "texts.csv"
    kept.write_text("text\nmine\n")
    assert main(["predict", str(images / "run"), str(kept), f"out={kept}"]) == 1
    assert f"out = {kept} is there already: give another file, or delete it" in capsys.readouterr().err
    assert kept.read_text() == "text\nmine\n"


def test_whole_ids_of_a_column_with_gaps_are_written_as_they_were(tmp_path: Path) -> None:
    pd.DataFrame({"id": [1, None, 3], "text": ["a", "b", "c"]}).to_parquet(tmp_path / "asked.parquet")
    assert inputs.texts([str(tmp_path / "asked.parquet")], ["text"]).columns["id"] == ["1", "", "3"]


def test_a_table_with_another_delimiter_is_read_as_the_sentence_says(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "asked.csv").write_text("text;id\nlost, card;7\n")
    argv = ["predict", str(texts / "run"), str(tmp_path / "asked.csv")]
    assert main(argv) == 1
    assert 'asked.csv has one column, text;id: set delimiter, here delimiter=";"' in capsys.readouterr().err
    assert main([*argv, "delimiter=;"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith('7,"lost, card",')


@pytest.mark.parametrize(
    ("content", "name", "sentence"),
    [
        (b"text\ncaf\xe9\n", "x.csv", r"x\.csv is not utf-8 .* set encoding, for example encoding=latin-1$"),
        (b"caf\xe9\n", "x.txt", r"x\.txt is not utf-8 .* set encoding, for example encoding=latin-1$"),
        ("a\n".encode("utf-16-le"), "x.txt", "for example encoding=utf-16-le"),
        (None, "x.csv", r"^data = .*x\.csv is no file"),
    ],
)
def test_a_text_file_that_cannot_be_read(content: bytes | None, name: str, sentence: str, tmp_path: Path) -> None:
    """The keys of ``kd predict`` are named, not those of ``data``."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(KdError, match=sentence):
        inputs.texts([str(tmp_path / name)], ["text"])
