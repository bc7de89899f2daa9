"""Regression of sentences: metrics against SciPy, the squared error, and runs on made pairs of sentences."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from kd.cli.main import main
from kd.distill.distiller import Distiller
from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch, Output
from kd.losses.logits.ce import CrossEntropy
from kd.losses.logits.mse import SquaredError, squared_error
from kd.tasks.text_regression import TextRegression
from tests.tiny_language import BERT

WORDS = ("river", "rain", "walks", "slow", "home", "wide", "winter", "train")


def pairs(count: int, seed: int) -> str:
    """Pairs of sentences as csv; the score, 0 to 5, grows with the share of words that they have in common."""
    random = np.random.default_rng(seed)
    lines = ["one,other,score"]
    for number in range(count):
        first = random.choice(WORDS, 4, replace=False)
        kept = int(random.integers(0, 5))
        second = [*first[:kept], *random.choice(WORDS, 4 - kept)]
        lines.append(f"{' '.join(first)} {seed}-{number},{' '.join(second)},{5 * kept / 4 + random.normal() / 5:.3f}")
    return "\n".join(lines) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in {"train": 48, "val": 16, "test": 16}.items():
        (tmp_path / f"{split}.csv").write_text(pairs(count, len(split)))
    return tmp_path


def arguments(folder: Path, run: str, *more: str) -> list[str]:
    """The student's arguments; a network of two layers."""
    inside = {k: v for k, v in BERT.items() if k not in ("model_type", "vocab_size", "num_hidden_layers")}
    config = ",".join(
        f"{key}: {value}" for key, value in {"model_type": "bert", "num_hidden_layers": 2, **inside}.items()
    )
    return [
        *(
            "train",
            "task=text_regression",
            "data=text",
            f"data.root={folder}",
            "data.cache=null",
            "data.train=train.csv",
        ),
        *("data.val=val.csv", "data.test=test.csv", "data.numbers=true", "data.text=one", "data.text_pair=other"),
        *("data.label=score", "data.tokenizer.vocabulary=90", "data.max_length=32", "recipe=finetune"),
        *("model@student=transformers", "student.model.pretrained=false", f"student.model.config={{{config}}}"),
        *("loss=[mse]", "recipe.epochs=2", "recipe.batch_size=8", "recipe.optimizer.lr=2e-3", "hardware=cpu"),
        *("hardware.threads=1", f"hydra.run.dir={folder / run}", *more),
    ]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    code = main(list(argv))
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


# ---------------------------------------------------------------------- metrics and loss


def test_metrics_are_those_of_scipy() -> None:
    task = TextRegression()
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(2, 23))
    targets = np.round(random.normal(size=23), 1)  # with equal ranks
    meter = task.meter(None)
    for rows in (slice(0, 9), slice(9, 23)):
        outputs = [Output(torch.tensor(numbers[rows, None])) for numbers in (student, teacher)]
        batch = Batch(torch.zeros(len(outputs[0].logits), 1), torch.tensor(targets[rows]))
        meter.update(outputs[0], task.rows(batch), outputs[1])
    found = meter.compute(with_teacher=True)
    assert list(found) == ["spearman", "pearson", "mse", "similarity"]
    assert found["spearman"] == pytest.approx(stats.spearmanr(student, targets).statistic, abs=1e-6)
    assert found["pearson"] == pytest.approx(stats.pearsonr(student, targets).statistic, abs=1e-6)
    assert found["mse"] == pytest.approx(np.mean((student - targets) ** 2), abs=1e-6)
    assert found["similarity"] == pytest.approx(stats.pearsonr(student, teacher).statistic, abs=1e-6)
    assert "similarity" not in meter.compute(with_teacher=False)
    assert task.metrics[0].name == "spearman"
    assert task.metrics[0].better == "max"


def test_a_teacher_of_random_ranks_is_doubted() -> None:
    task = TextRegression()
    assert "is it trained?" in task.doubt({"spearman": 0.01}, {}, 1)
    assert "0.900 in its own run" in task.doubt({"spearman": 0.8}, {"spearman": 0.9}, 1)
    assert task.doubt({"spearman": 0.88}, {"spearman": 0.9}, 1) == ""


def test_squared_error_of_labels_teacher_and_classes() -> None:
    student, labels = torch.tensor([[1.0], [3.0], [-2.0]], requires_grad=True), torch.tensor([2.0, 3.0, 0.5])
    batch = Batch(torch.zeros(3, 1), labels)
    loss = SquaredError()(Output(student), Output(), batch)
    assert loss.item() == pytest.approx((1 + 0 + 6.25) / 3)
    loss.backward()
    assert student.grad.flatten().tolist() == pytest.approx([-2 / 3, 0, -5 / 3])
    teacher = Output(torch.tensor([[0.0], [3.0], [1.0]]))
    against = SquaredError("teacher")
    assert (against.needs_labels, against.needs_teacher, against.needs_teacher_logits) == (False, True, True)
    assert against(Output(student), teacher, batch.without_targets()).item() == pytest.approx((1 + 0 + 9) / 3)
    logits, classes = torch.tensor([[1.0, 2.0], [0.0, 0.0], [9.0, 9.0]]), torch.tensor([1, 0, UNLABELLED])
    assert squared_error(logits, classes).item() == pytest.approx((1 + 1 + 1 + 0) / 4)
    assert squared_error(logits, torch.full((3,), UNLABELLED)).item() == 0
    assert squared_error(student.half(), labels.half()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"outputs and targets must have one shape: the student's is \(3, 2\)"):
        squared_error(logits, labels)
    with pytest.raises(ValueError, match="against = both is not allowed: it must be labels or teacher"):
        SquaredError("both")


def test_classes_and_losses_of_classes_are_refused() -> None:
    task = TextRegression()
    with pytest.raises(KdError, match=r"set data\.numbers=true"):
        task.rows(Batch(torch.zeros(2, 1), torch.tensor([0, 1])))
    with pytest.raises(KdError, match=r"^loss\.ce is for classes, .*use loss=\[mse\]$"):
        task.check_terms([("mse", SquaredError()), ("ce", CrossEntropy())])
    with pytest.raises(KdError, match="the teacher answers 3 numbers a row"):
        task.agree(Output(torch.zeros(2, 1)), Output(torch.zeros(2, 3)), None, True)


# ---------------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_teacher_and_its_student(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, *arguments(folder, "teacher"))
    teacher = json.loads((folder / "teacher" / "result.json").read_text())
    assert teacher["protocol"]["monitor"] == "val/spearman"
    soft = "+loss.soft={_target_: kd.losses.logits.mse.SquaredError, weight: 0.5, against: teacher}"
    given = [a for a in arguments(folder, "student") if "student.model" not in a and not a.startswith("model@student")]
    cut = ["model@student=none", "student.surgery.layers=1", f"teacher.checkpoint={folder / 'teacher'}", soft]
    run(capsys, *given, *cut)
    record = json.loads((folder / "student" / "result.json").read_text())
    assert set(record["student"]["selected"]["test"]) == {"spearman", "pearson", "mse", "similarity"}
    assert record["teacher"]["test"] == pytest.approx(teacher["student"]["selected"]["test"], rel=1e-5)
    assert set(record["student"]["last"]["train"]) >= {"loss", "mse", "soft"}
    run(capsys, "eval", f"run={folder / 'student'}", f"out={folder / 'found.json'}")
    found = json.loads((folder / "found.json").read_text())["metrics"]
    assert found == pytest.approx(record["student"]["selected"]["test"], rel=1e-5)
    page = folder / "page"
    run(capsys, "report", str(folder / "student"), f"out={page}")
    assert "| test Spearman (val-selected) |" in (page / "report.md").read_text()
    import transformers

    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "student" / "selected")
    assert (loaded.config.num_labels, loaded.config.problem_type) == (1, "regression")


@pytest.mark.slow
def test_a_resumed_run_is_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, *arguments(folder, "whole"))
    begin = Distiller.on_train_epoch_start

    def stop(self: Distiller) -> None:
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        begin(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distiller, "on_train_epoch_start", stop)
        assert main(arguments(folder, "cut")) != 0
    shutil.rmtree(folder / "cut" / "selected")  # it is written anew
    run(capsys, "train", f"resume={folder / 'cut'}")
    ended = [json.loads((folder / name / "result.json").read_text())["student"] for name in ("whole", "cut")]
    assert ended[0]["last"]["digest"] == ended[1]["last"]["digest"]
    assert ended[0]["selected"]["test"] == ended[1]["selected"]["test"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("loss=[kd]", "loss.kd needs a teacher"),
        ("loss=[ce]", "loss.ce is for classes, and a row of this task is a number: use loss=[mse]"),
        ("data.numbers=false", "csv holds numbers such as "),
        ("data.label=one", "/train.csv has a label that is no number, or none: "),
    ],
)
def test_what_cannot_be_is_one_sentence(
    change: str, sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(folder, "run"), change]) == 1
    printed = capsys.readouterr().err
    assert sentence in printed
    assert not (folder / "run" / "student.safetensors").exists()
