"""Question answering: masked rows, the likeliest span of all windows, the texts' metrics, and runs."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.text import SQuAD

import kd
from kd.cli.main import main
from kd.config.composition import CONF
from kd.data.text.questions import Questions
from kd.distill.evaluation import measure
from kd.distill.objective import Objective
from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch, Output, Setup
from kd.losses.logits.ce import CrossEntropy
from kd.losses.logits.kd import KnowledgeDistillation
from kd.tasks.base import Want
from kd.tasks.question_answering import MASKED, QuestionAnswering
from kd.tasks.spans import Scored, answered, best_spans
from tests.data.test_text_questions import asked, data
from tests.tiny_language import BERT

TASK = QuestionAnswering(max_answer_length=8)


class Answers(nn.Module):
    """A network whose logits are random, the same for the same batch."""

    def forward(self, input_ids: Tensor, **_: Tensor) -> Any:
        start, end = torch.randn(2, *input_ids.shape, generator=torch.Generator().manual_seed(int(input_ids.sum())))
        return SimpleNamespace(start_logits=start, end_logits=end)


# ---------------------------------------------------------------------- rows


def test_rows_are_start_and_end_of_each_window_over_the_positions_that_may_be_answers() -> None:
    made = data(asked(30))
    batch = next(iter(made.train_dataloader()))
    rows = TASK.rows(batch)
    network = Answers()
    logits = TASK.answer(network, batch.inputs, rows, Want()).logits
    raw = network(**batch.inputs)
    allowed, width = batch.extra["allowed"], batch.inputs["input_ids"].shape[1]
    assert logits.shape == (2 * len(batch), 40)
    assert rows.targets.tolist() == [place for pair in batch.targets.tolist() for place in pair]
    assert TASK.rows(rows) is rows
    for line in range(len(batch)):
        for side, own in enumerate((raw.start_logits, raw.end_logits)):
            row = logits[2 * line + side]
            assert torch.equal(row[:width][allowed[line, :width]], own[line][allowed[line, :width]])
            assert (row[~allowed[line]] == MASKED).all()
            assert row.softmax(0)[~allowed[line]].sum() == 0
    assert TASK.labelled(rows) == 2 * len(batch)


def test_the_step_of_distilbert_is_the_sum_of_its_two_losses() -> None:
    """Sanh et al.: 0.5 T² KL + 0.5 CE, each the mean of starts and ends, each a mean over the windows."""
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 2, 9, dtype=torch.float64), torch.randn(4, 2, 9, dtype=torch.float64)
    targets = torch.randint(0, 9, (4, 2))
    batch = TASK.rows(Batch({"input_ids": torch.zeros(4, 9)}, targets))
    objective = Objective({"ce": CrossEntropy(), "kd": KnowledgeDistillation(2.0)}, {"ce": 0.5, "kd": 0.5})
    _, total = objective(Output(student.flatten(0, 1)), Output(teacher.flatten(0, 1)), batch, 0, 1, None)
    soft, hard = nn.KLDivLoss(reduction="batchmean"), nn.CrossEntropyLoss()
    kl = [
        soft((s / 2).log_softmax(-1), (t / 2).softmax(-1)) * 4
        for s, t in zip(student.unbind(1), teacher.unbind(1), strict=True)
    ]
    ce = [hard(s, t) for s, t in zip(student.unbind(1), targets.unbind(1), strict=True)]
    assert total.item() == pytest.approx(0.5 * sum(kl).item() / 2 + 0.5 * sum(ce).item() / 2, rel=1e-12)


# ---------------------------------------------------------------------- every loss of logits

EXACT = (
    "abkd",
    "akl",
    "ce",
    "ctkd",
    "cwtm",
    "dkd",
    "hard_label",
    "jsd",
    "kd",
    "mft",
    "minillm",
    "nkd",
    "rkl",
    "rld",
    "skl",
)
EXACT += ("srkl", "symmetric_kl", "topk_kl", "ttm", "tvd", "wsld", "wttm")  # the others are means over classes as well


def nodes() -> dict[str, dict[str, Any]]:
    """Losses that read logits and nothing else, by name: `wkd_logit` reads the teacher's classifier as well."""
    found = {}
    for file in sorted((CONF / "loss").glob("*.yaml")):
        (node,) = OmegaConf.to_container(OmegaConf.load(file)).values()
        given = {key: value for key, value in node.items() if key not in ("weight", "schedule")}
        if file.stem != "wkd_logit" and not any("taps" in key for key in given):
            found[file.stem] = given
    return found


def value(node: dict[str, Any], columns: int) -> float:
    """The loss with so many masked positions more."""
    torch.manual_seed(0)
    logits = {side: 2 * torch.randn(8, 10, dtype=torch.float64) for side in ("student", "teacher")}
    student, teacher = (Output(F.pad(one, (0, columns), value=MASKED)) for one in logits.values())
    batch = Batch(torch.zeros(8, 3), torch.arange(8), torch.arange(8))
    term = instantiate(node).double()
    term.prepare(Setup(student, teacher, batch, classes=10 + columns, epochs=2, steps=9, train_index=batch.index))
    torch.manual_seed(1)
    return float(term(student, teacher, batch).detach())


@pytest.mark.parametrize("name", nodes())
def test_masked_positions_change_no_loss_that_the_task_allows(name: str) -> None:
    """A mean over classes is one of three times as many then, and no more, or the term must say ``every_class``."""
    node = nodes()[name]
    term = instantiate(node)
    assert term.needs_student_logits or term.needs_teacher_logits
    plain, masked = value(node, 0), value(node, 20)
    same = masked == pytest.approx(plain, rel=1e-9, abs=1e-12)
    if term.every_class:
        assert not same
        with pytest.raises(KdError, match=rf"loss\.{name} is not allowed with task = question_answering"):
            TASK.check_terms([(name, term)])
        return
    TASK.check_terms([(name, term)])
    assert same or name not in EXACT
    assert 0.1 * abs(plain) <= abs(masked) <= 2 * abs(plain), "declare every_class = True"


@pytest.mark.parametrize(
    ("node", "refused"),
    [
        ({"_target_": "kd.losses.logits.ce.CrossEntropy", "label_smoothing": 0.1}, True),
        ({"_target_": "kd.losses.logits.fkd.SoftLabels", "k": 5, "form": "renormalised"}, False),
        ({"_target_": "kd.losses.logits.mse.SquaredError", "against": "teacher"}, False),
    ],
)
def test_a_setting_may_decide_whether_a_loss_is_allowed(node: dict[str, Any], refused: bool) -> None:
    assert instantiate(node).every_class == refused
    assert abs(value(node, 20) / value(node, 0)) < 1.01 or refused


def test_z_scores_are_refused() -> None:
    objective = Objective({"kd": KnowledgeDistillation(2.0)}, standardise=["kd"])
    with pytest.raises(KdError, match=r"loss\.kd is not allowed with task = question_answering"):
        TASK.check_terms(objective.items())


# ---------------------------------------------------------------------- answers


def test_the_likeliest_span_is_that_of_all_pairs() -> None:
    torch.manual_seed(0)
    start, end = torch.randn(2, 50, 13).unbind(0)
    for most in (1, 3, 20):
        context = torch.zeros(50, 13, dtype=torch.bool)
        for line in range(50):
            begin = int(torch.randint(1, 12, ()))
            context[line, begin : int(torch.randint(begin + 1, 14, ()))] = True
        scores, first, last = best_spans(start, end, context, most)
        for line in range(50):
            inside = context[line].nonzero().flatten().tolist()
            pairs = {(i, j): start[line, i] + end[line, j] for i in inside for j in inside if i <= j < i + most}
            best = max(pairs, key=lambda pair: pairs[pair])
            assert (int(first[line]), int(last[line])) == best
            assert scores[line] == pairs[best]


@pytest.mark.parametrize("threshold", [None, 0.0, 1.0])
def test_the_answer_of_a_question_is_the_likeliest_of_all_of_its_windows(threshold: float | None) -> None:
    drawn = torch.Generator().manual_seed(0)
    question = torch.randint(0, 20, (90,), generator=drawn)  # in any order, equal scores among them
    score, none = torch.randint(0, 6, (2, 90), generator=drawn).float().unbind(0)
    none += 4
    found = answered(question, Scored(score, none, torch.zeros(90, 2)), threshold)
    assert found.question.tolist() == sorted(set(question.tolist()))
    for number, window, lacks in zip(*(part.tolist() for part in found), strict=True):
        of = (question == number).nonzero().flatten().tolist()
        best, least = max(of, key=lambda i: score[i]), min(of, key=lambda i: none[i])
        assert lacks == (threshold is not None and bool(none[least] - score[best] > threshold))
        assert window == (least if lacks else best)
    assert 0 < found.none.sum() < len(found.none) or threshold is None


def official(predicted: str, answers: list[str]) -> tuple[float, float]:
    """SQuAD's own script: exact match and F1 beside the best answer, after its normalisation."""

    def plain(text: str) -> list[str]:
        bare = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", bare).split()

    def f1(one: list[str], other: list[str]) -> float:
        same = sum((Counter(one) & Counter(other)).values())
        return float(one == other) if not one or not other else 2 * same / (len(one) + len(other))

    wanted = [plain(answer) for answer in answers or [""]]
    own = plain(predicted)
    return float(own in wanted), max(f1(own, answer) for answer in wanted)


def expected(made: Questions, network: nn.Module, threshold: float | None) -> dict[str, float]:
    """The same numbers by loops: n-best lists of each window, the best of all windows, the official script."""
    windows, asked_of = made.parts["test"].windows, made.parts["test"].asked
    found: dict[int, list[tuple[float, str]]] = {}
    null: dict[int, float] = {}
    for i, (number, (begin, end)) in enumerate(zip(windows.question.tolist(), windows.context.tolist(), strict=True)):
        part = slice(*windows.offsets[i : i + 2])
        ids = torch.from_numpy(windows.ids[part].astype("int64"))[None]
        raw = network(ids)
        start, stop = raw.start_logits[0], raw.end_logits[0]
        null[number] = min(float(start[0] + stop[0]), null.get(number, 1e9))
        for one in range(begin, end):
            for other in range(one, min(end, one + 8)):
                places = windows.characters[part]
                text = asked_of[number][0][places[one, 0] : places[other, 1]]
                found.setdefault(number, []).append((float(start[one] + stop[other]), text))
    texts = {number: max(spans)[1] for number, spans in found.items()}
    if threshold is not None:
        texts |= {n: "" for n, spans in found.items() if null[n] - max(spans)[0] > threshold}
    scores = [official(texts[number], asked_of[number][1]) for number in texts]
    return {"exact_match": sum(s[0] for s in scores) / len(scores), "f1": sum(s[1] for s in scores) / len(scores)}


def measured(made: Questions, network: nn.Module, task: QuestionAnswering) -> dict[str, float]:
    def answer(batch: Batch) -> Output:
        return task.answer(network, {"input_ids": batch.inputs["input_ids"]}, batch, Want())

    return measure(task, made.num_classes, answer, made.test_dataloader(), torch.device("cpu"))[0]


class Hinted(Answers):
    """Logits that a window's ids decide, so that batches and padding change none; near the right answers."""

    def __init__(self, made: Questions, error: float) -> None:
        super().__init__()
        windows = made.parts["test"].windows
        self.known: dict[tuple[int, ...], Tensor] = {}
        drawn = torch.Generator().manual_seed(0)
        for i in range(len(windows)):
            ids = tuple(windows.ids[slice(*windows.offsets[i : i + 2])].tolist())
            logits = error * torch.randn(2, len(ids), generator=drawn)
            logits[[0, 1], torch.from_numpy(windows.targets[i])] += 3
            self.known[ids] = logits

    def forward(self, input_ids: Tensor, **_: Tensor) -> Any:
        lines = [tuple(token for token in row if token) for row in input_ids.tolist()]  # 0 is [PAD]
        found = [F.pad(self.known[line], (0, input_ids.shape[1] - len(line))) for line in lines]
        start, end = torch.stack(found).unbind(1)
        return SimpleNamespace(start_logits=start, end_logits=end)


@pytest.mark.parametrize(("answered", "threshold"), [(1.0, None), (0.6, 0.0), (0.6, -2.0)])
def test_texts_of_answers_are_measured_as_the_official_script_does(answered: float, threshold: float | None) -> None:
    made = data(asked(90, answered=answered), unanswerable=answered < 1, eval_batch_size=5)
    task = QuestionAnswering(8, 0.0 if threshold is None else threshold)
    network = Hinted(made, 1.5)
    found, wanted = measured(made, network, task), expected(made, network, threshold)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    assert 0.05 < found["exact_match"] <= found["f1"] < 0.95
    right = measured(made, Hinted(made, 0.0), QuestionAnswering(40))
    assert right["f1"] > 0.8  # whole tokens: an answer may end inside of one
    assert right["nll"] < 1.5


def test_agreement_is_over_all_rows() -> None:
    made = data(asked(30))
    task, batch = TASK, next(iter(made.test_dataloader()))
    rows = task.rows(batch)
    student, teacher = (Output(torch.randn(2 * len(batch), 40)) for _ in range(2))
    meter = task.meter(40)
    meter.update(student, rows, teacher)
    found = meter.compute(True)
    assert found["agreement"] == (student.logits.argmax(1) == teacher.logits.argmax(1)).float().mean()
    kl = F.kl_div(student.logits.log_softmax(1), teacher.logits.log_softmax(1), log_target=True, reduction="batchmean")
    assert found["kl"] == pytest.approx(float(kl), rel=1e-5)
    assert set(found) == set(task.names(True))
    unlabelled = torch.where(torch.arange(len(rows.targets)) % 2 == 0, rows.targets, UNLABELLED)
    meter = task.meter(40)
    meter.update(student, Batch(rows.inputs, unlabelled, extra=rows.extra))
    assert meter.compute(False)["nll"] == pytest.approx(float(F.cross_entropy(student.logits[::2], unlabelled[::2])))


def test_what_is_not_of_the_task_is_one_sentence() -> None:
    with pytest.raises(KdError, match=r"task = question_answering needs the start and the end"):
        TASK.rows(Batch({"input_ids": torch.zeros(4, 9)}, torch.zeros(4, dtype=torch.int64)))
    with pytest.raises(KdError, match="needs a network that answers start_logits and end_logits"):
        TASK.answer(nn.Linear(9, 2), torch.zeros(4, 9), Batch(torch.zeros(4, 9)), Want())
    plain = Batch(torch.zeros(2, 9), torch.zeros(4, dtype=torch.int64), extra={})
    with pytest.raises(KdError, match="measures the texts of answers, which batches of val and test must bring along"):
        TASK.meter(9).update(Output(torch.zeros(4, 9)), plain)
    with pytest.raises(KdError, match=r"task\.max_answer_length = 0 is not allowed"):
        QuestionAnswering(max_answer_length=0)
    assert "is it trained?" in TASK.doubt({"f1": 0.01}, {}, None)
    assert "in its own run" in TASK.doubt({"f1": 0.5}, {"f1": 0.8}, None)
    assert TASK.doubt({"f1": 0.79}, {"f1": 0.8}, None) == ""


# ---------------------------------------------------------------------- runs


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    code = main(list(argv))
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in {"train": 60, "val": 15, "test": 15}.items():
        lines = [json.dumps(row) for row in asked(count, len(split), answered=0.7)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    files = [f"data.{split}={folder}/{split}.jsonl" for split in ("train", "val", "test")]
    size = ["data.max_length=32", "data.stride=8", "data.question_length=12", "data.tokenizer.vocabulary=120"]
    rest = ["data.unanswerable=true", "data.cache=null", "hardware=cpu", "hardware.threads=1", "recipe=finetune"]
    return ["train", "task=question_answering", "data=questions", *files, *size, *rest, "recipe.epochs=2", *more]


def network(role: str, model: dict[str, Any]) -> list[str]:
    inside = ",".join(f"{key}: {value}" for key, value in model.items() if key != "vocab_size")
    return [f"model@{role}=transformers", f"{role}.model.pretrained=false", f"{role}.model.config={{{inside}}}"]


def check_ids(folder: Path, rows: list[dict[str, Any]], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """SQuAD's own file and other tables keep the ids of their questions; {id: answer} is for SQuAD's script."""
    nested = [
        {"context": row["context"], "qas": [{"question": row["question"], "id": f"q{i}"}]} for i, row in enumerate(rows)
    ]
    (folder / "dev.json").write_text(json.dumps({"version": "2", "data": [{"paragraphs": nested}]}))
    named = ["id," + said[0], *(f"q{i},{line}" for i, line in enumerate(said[1:]))]
    assert run(capsys, "predict", f"{folder}/s", f"{folder}/dev.json").splitlines() == named
    flat = [json.dumps({**row, "id": f"q{i}"}) for i, row in enumerate(rows)]
    (folder / "dev.jsonl").write_text("\n".join(flat))
    run(capsys, "predict", f"{folder}/s", f"{folder}/dev.jsonl", f"out={folder}/found.jsonl")
    lines = [json.loads(line) for line in (folder / "found.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [["id", "input", "answer", "probability"]] * 15
    run(capsys, "predict", f"{folder}/s", f"{folder}/dev.json", f"out={folder}/answers.json")
    assert json.loads((folder / "answers.json").read_text()) == {line["id"]: line["answer"] for line in lines}
    for name, words in (("test.jsonl", "needs an id for each question"), ("twice.jsonl", "q3 is there twice")):
        (folder / "twice.jsonl").write_text("\n".join([*flat, flat[3]]))
        assert main(["predict", f"{folder}/s", f"{folder}/{name}", f"out={folder}/none.json"]) == 1
        assert words in capsys.readouterr().err
        assert not (folder / "none.json").exists()


@pytest.mark.slow
def test_a_teacher_its_student_and_what_transformers_loads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A BERT with token types teaches a DistilBERT, which has none."""
    small = {"model_type": "distilbert", "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
    run(capsys, *arguments(folder, *network("student", BERT), "recipe.optimizer.lr=1e-3", f"hydra.run.dir={folder}/t"))
    distil = [f"teacher.checkpoint={folder}/t", "loss=[ce,kd]", "loss.kd.temperature=2", "loss.kd.weight=0.5"]
    said = run(capsys, *arguments(folder, *network("student", small), *distil, f"hydra.run.dir={folder}/s"))
    assert "; 32 positions, " in said
    record = json.loads((folder / "s" / "result.json").read_text())
    assert record["status"] == "finished"
    assert record["protocol"]["monitor"] == "val/f1"
    assert set(record["student"]["selected"]["test"]) == {"f1", "exact_match", "nll", "agreement", "kl"}
    run(capsys, "eval", f"run={folder}/s", f"out={folder}/found.json")
    found = json.loads((folder / "found.json").read_text())["metrics"]
    assert found["nll"] == pytest.approx(record["student"]["selected"]["test"]["nll"], rel=1e-5)
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    for who, measured in (("student", record["student"]["selected"]["test"]), ("teacher", record["teacher"]["test"])):
        answers = kd.load(folder / "s", who).predict([(row["question"], row["context"]) for row in rows], batch_size=4)
        texts = SQuAD()  # of what is predicted: the metrics of the run
        given = [{"answers": {"text": row["answers"]["text"] or [""], "answer_start": []}} for row in rows]
        texts.update(
            [{"prediction_text": one.label, "id": str(i)} for i, one in enumerate(answers)],
            [{**one, "id": str(i)} for i, one in enumerate(given)],
        )
        found = {name: float(value) / 100 for name, value in texts.compute().items()}
        assert found == pytest.approx({name: measured[name] for name in found})
        assert all(0 < one.probability <= 1 for one in answers)
        assert all(one.label in row["context"] for one, row in zip(answers, rows, strict=True))
    said = run(capsys, "predict", f"{folder}/s", f"{folder}/test.jsonl").splitlines()
    assert said[0] == "input,answer,probability"
    assert len(said) == 16
    assert main(["predict", f"{folder}/s", f"{folder}/test.jsonl", "top=2"]) == 1
    assert "are of classes, and the run answers none" in capsys.readouterr().err
    check_ids(folder, rows, said, capsys)
    (folder / "empty.jsonl").write_text(json.dumps({**rows[0], "context": " "}))
    assert main(["predict", f"{folder}/s", f"{folder}/test.jsonl", f"{folder}/empty.jsonl"]) == 1
    assert f"the context of row 1 of {folder}/empty.jsonl is empty" in capsys.readouterr().err
    given = kd.load(folder / "s")
    pair = (rows[0]["question"], rows[0]["context"])
    for wrong in ("what is this ?", None, {"question": "a", "context": "b"}):
        with pytest.raises(KdError, match=r"answers pairs \(question, context\), input 2 is none"):
            given.predict([pair, wrong])
    with pytest.raises(KdError, match="the context of input 2 is empty"):
        given.predict([pair, ("what?", " ")])
    first, second, third = given.predict([pair, ("what?", ""), pair], skip_unreadable=True)
    assert first == third
    assert (second.input, second.label, second.error) == ("what?", None, "the context of input 2 is empty")
    loaded = transformers.AutoModelForQuestionAnswering.from_pretrained(folder / "s" / "selected")
    assert type(loaded).__name__ == "DistilBertForQuestionAnswering"
    kept = [*network("student", small), f"teacher.checkpoint={folder}/t", "protocol.keep_predictions=true"]
    assert main(arguments(folder, *kept, "loss=[ce,kd]", f"hydra.run.dir={folder}/k")) == 1
    assert "a row is a start or an end" in capsys.readouterr().err
