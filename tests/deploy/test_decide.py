"""``kd decide``: intervals beside published ones, the verdict's rules, and each bad input in one sentence."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, log_loss

from kd.deploy import calibration, cascade, decision, of_run, quality, slices
from kd.deploy.cost import compare as compare_costs
from kd.deploy.cost_file import read as read_cost
from kd.deploy.decision import CASCADE, KEEP, MORE, REPLACE, decide, verdict
from kd.deploy.examples import read
from kd.deploy.plan import plan, sentence
from kd.deploy.settings import Columns, Settings
from kd.report.curves import calibration as calibration_of_report
from kd.report.stats import mcnemar

CLASSES = np.array(["billing", "delivery", "other", "returns"])


def pair(both: int, gained: int, lost: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Student and teacher, right or wrong, with these counts."""
    student = [True] * both + [True] * gained + [False] * lost + [False] * neither
    teacher = [True] * both + [False] * gained + [True] * lost + [False] * neither
    return np.array(student), np.array(teacher)


def rows(n: int = 300, lost: float = 0.02, gained: float = 0.01, seed: int = 0) -> list[dict[str, str]]:
    """Made-up answers: the student is unsure where it is wrong."""
    rng = np.random.default_rng(seed)
    label = rng.integers(len(CLASSES), size=n)
    wrong = (label + rng.integers(1, len(CLASSES), size=n)) % len(CLASSES)
    draw = rng.random(n)
    student = np.where(draw < lost, wrong, label)
    teacher = np.where((draw >= lost) & (draw < lost + gained), wrong, label)
    sure = np.where(draw < lost, rng.uniform(0.3, 0.6, n), rng.uniform(0.5, 1.0, n))
    return [
        {"label": CLASSES[a], "student": CLASSES[b], "teacher": CLASSES[c], "p": f"{d:.4f}", "text": "x" * (1 + i % 50)}
        for i, (a, b, c, d) in enumerate(zip(label, student, teacher, sure, strict=True))
    ]


def write(path: Path, table: list[dict[str, str]]) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    return str(path)


@pytest.fixture
def table(tmp_path) -> str:
    return write(tmp_path / "predictions.csv", rows())


# ---------------------------------------------------------------------- numbers


def test_tangos_interval_is_the_published_one() -> None:
    """The 21 children of Bentur et al. in Fagerland, Lydersen and Laake (2014): 1 and 7 discordant."""
    assert quality.interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize(("gained", "lost", "n"), [(4, 10, 200), (0, 0, 50), (0, 9, 40), (12, 2, 50)])
def test_the_interval_holds_what_the_score_test_does_not_refuse(gained: int, lost: int, n: int) -> None:
    low, high = quality.interval(gained, lost, n)
    assert quality.score(gained, lost, n, low) == pytest.approx(1.959964, abs=1e-5)
    assert quality.score(gained, lost, n, high) == pytest.approx(-1.959964, abs=1e-5)
    assert quality.interval(lost, gained, n) == pytest.approx((-high, -low))


def test_intervals_at_the_ends_stay_inside() -> None:
    assert quality.interval(0, 30, 30)[0] == -1.0
    assert quality.interval(30, 0, 30)[1] == 1.0


def test_the_score_without_a_difference_is_mcnemars_statistic() -> None:
    assert quality.score(4, 10, 200, 0.0) == pytest.approx((4 - 10) / 14**0.5)


def test_quality_counts_and_tests() -> None:
    student, teacher = pair(170, 4, 10, 16)
    found = quality.compare(student, teacher, 0.05)
    assert (found.student, found.teacher, found.difference) == pytest.approx((0.87, 0.9, -0.03))
    assert (found.gained, found.lost, found.discordant) == (4, 10, 0.07)
    assert found.mcnemar == pytest.approx(mcnemar(student, teacher)) == pytest.approx(2 * stats.binom.cdf(4, 14, 0.5))
    assert (found.non_inferior < 0.05) == (found.lower > -0.05)
    assert found.lower > found.interval[0]
    assert found.bootstrap == pytest.approx((-0.065, 0.005), abs=0.012)


@pytest.mark.parametrize("margin", [0.02, 0.03, 0.04, 0.06, 0.1])
def test_the_test_and_the_limit_of_non_inferiority_never_disagree(margin: float) -> None:
    found = quality.compare(*pair(170, 4, 10, 16), margin)
    assert (found.non_inferior < 0.05) == (found.lower > -margin)


def test_macro_f1_is_scikit_learns() -> None:
    found = [np.array([row[name] for row in rows()]) for name in ("label", "student", "teacher")]
    f1 = quality.macro_f1(*found)
    label, student, teacher = found
    assert f1.student == pytest.approx(f1_score(label, student, average="macro"))
    assert f1.teacher == pytest.approx(f1_score(label, teacher, average="macro"))
    assert f1.interval[0] < f1.difference < f1.interval[1]


def test_the_source_case_of_200_conversations() -> None:
    """3 points lost on 200: with 5 to 20 % discordant 343 to 1,373 are needed, more by the test that is used."""
    assert [int(quality.first_estimate(share, 0.03)) for share in (0.05, 0.2)] == [343, 1373]
    plans = plan(200, -0.03, 0.03)
    assert [p.discordant for p in plans] == [0.05, 0.1, 0.15, 0.2]
    assert all(p.shows == "nothing" and p.difference == -0.03 for p in plans)
    assert [p.needed for p in (plans[0], plans[-1])] == [400, 1386]
    assert all(p.needed > p.textbook > 200 for p in plans)
    assert sentence(plans).startswith(
        "200 examples with a difference of -3.0 points do not settle a margin of 3 points"
    )
    assert sentence(plan(2000, 0.0, 0.03)).startswith("2,000 examples with no difference settle a margin")
    assert "show a loss of more than 3 points" in sentence(plan(200, -0.4, 0.03))


def test_the_settled_margin_inverts_the_examples_needed() -> None:
    margin = quality.shown_margin(500, 0.1)
    assert quality.examples_needed(0.1, margin) == pytest.approx(500, abs=2)


def test_no_number_of_examples_settles_a_difference_at_the_margin() -> None:
    assert quality.examples_needed(0.1, 0.03, -0.03) is None
    assert quality.examples_needed(0.1, 0.03, -0.06) == pytest.approx(quality.examples_needed(0.1, 0.03), rel=0.2)


# ---------------------------------------------------------------------- slices, calibration, cascade


def test_slices_are_corrected_and_the_worst_comes_first() -> None:
    student, teacher = pair(80, 0, 20, 0)
    source = ["mail"] * 80 + ["chat"] * 20
    found = slices.compare_slices(student, teacher, {"source": source, "length": [str(i) for i in range(100)]})
    chat = next(s for s in found if s.value == "chat")
    assert chat.difference == -1.0
    assert chat.p == pytest.approx(2 * 0.5**20)
    assert chat.corrected == pytest.approx(6 * chat.p)  # the smallest of six
    assert [s.difference for s in found] == sorted(s.difference for s in found)
    assert sum(s.n for s in found if s.column == "length") == 100
    assert len({s.value for s in found if s.column == "length"}) == 4


def test_small_slices_are_left_out_and_words_stay() -> None:
    student, teacher = pair(20, 1, 1, 1)
    found = slices.compare_slices(student, teacher, {"source": ["a"] * 20 + ["b"] * 3})
    assert [s.value for s in found] == ["a"]
    assert slices.binned(["7", "x"]) == ["7", "x"]


def test_temperature_scaling_undoes_a_temperature() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 5))
    true = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    target = (true.cumsum(1) > rng.random((4000, 1))).argmax(1)
    sharp = np.exp(3 * logits) / np.exp(3 * logits).sum(1, keepdims=True)
    scores = calibration.Scores(sharp, sharp.argmax(1), target)
    even, odd = np.arange(0, 4000, 2), np.arange(1, 4000, 2)
    found = calibration.calibrate(scores.part(even), scores.part(odd))
    assert found.temperature == pytest.approx(3.0, rel=0.1)
    assert found.after.ece < 0.04 < found.before.ece
    assert found.before.nll == pytest.approx(log_loss(target[odd], sharp[odd]))
    assert (found.fitted, found.n) == (2000, 2000)


def test_the_calibration_error_is_that_of_the_report() -> None:
    rng = np.random.default_rng(1)
    confidence, right = rng.random(500), rng.random(500) < 0.7
    assert calibration.ece(confidence, right) == pytest.approx(calibration_of_report(confidence, right)[3])


def answers(n: int, seed: int, wrong: float = 0.3) -> cascade.Answers:
    """A student that is wrong only where it is unsure, beside a teacher that is always right."""
    rng = np.random.default_rng(seed)
    confidence = rng.random(n)
    return cascade.Answers(confidence, ~((confidence < wrong) & (rng.random(n) < 0.5)), np.ones(n, dtype=bool))


def test_the_threshold_is_the_lowest_that_validation_shows_to_meet_the_margin() -> None:
    validation, test = answers(1000, 0), answers(1000, 1)
    found = cascade.cascade(validation, test, margin=0.03)
    tried = cascade.thresholds(validation.confidence)
    assert found.threshold in tried
    assert cascade.meets(validation, found.threshold, 0.03, None)
    assert not cascade.meets(validation, tried[tried.index(found.threshold) - 1], 0.03, None)
    assert found.meets
    assert found.chosen.to_teacher == pytest.approx((test.confidence < found.threshold).mean())
    assert 0.15 < found.chosen.to_teacher < 0.35
    shares = [p.to_teacher for p in found.curve]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(0.0, abs=0.01)
    assert found.curve[0].accuracy == pytest.approx(test.student.mean(), abs=0.01)


def test_a_target_of_accuracy_takes_another_threshold() -> None:
    validation, test = answers(1000, 0), answers(1000, 1)
    loose, strict = (cascade.cascade(validation, test, 0.03, target) for target in (0.88, 0.96))
    assert loose.threshold < strict.threshold
    assert loose.chosen.accuracy > 0.87
    assert cascade.cascade(validation, test, 0.03, 0.999).threshold is None


def test_few_examples_show_no_threshold() -> None:
    found = cascade.cascade(answers(40, 0), answers(40, 1), margin=0.03)
    assert (found.threshold, found.chosen, found.quality, found.meets) == (None, None, None, False)


# ---------------------------------------------------------------------- the verdict


def of(both: int, gained: int, lost: int, neither: int, margin: float = 0.03) -> quality.Quality:
    return quality.compare(*pair(both, gained, lost, neither), margin)


def test_the_verdicts() -> None:
    some = quality.Agreement(1000, 100, 0.1, 0.12)
    good, bad, unclear = of(900, 30, 30, 40), of(700, 10, 200, 90), of(160, 10, 12, 18)
    assert verdict(0.03, some, good, None, None, None) == REPLACE
    assert verdict(0.03, some, bad, None, None, None) == KEEP
    assert verdict(0.03, some, unclear, None, None, None) == MORE
    assert verdict(0.03, some, None, None, None, None) == MORE
    assert verdict(0.03, replace(some, limit=0.029), None, None, None, None) == REPLACE
    routed = cascade.cascade(answers(1000, 0), answers(1000, 1), 0.03)
    assert verdict(0.03, some, bad, routed, None, None) == CASCADE
    assert verdict(0.03, some, bad, replace(routed, meets=False), None, None) == KEEP
    cost = read_cost("customer_service")
    dear = compare_costs(replace(cost, student=cost.teacher))
    assert verdict(0.03, some, good, routed, dear, None) == KEEP
    assert verdict(0.03, some, bad, routed, compare_costs(cost), compare_costs(cost, 0.25)) == CASCADE
    assert verdict(0.03, some, bad, routed, compare_costs(cost), compare_costs(cost, 0.99)) == KEEP


def test_labels_of_the_disagreements_alone_give_the_same_difference(tmp_path) -> None:
    whole = rows()
    some = [{**row, "label": row["label"] if row["student"] != row["teacher"] else ""} for row in whole]
    one, other = (
        decide(read(write(tmp_path / f"{i}.csv", t), Columns()), Settings()) for i, t in enumerate((whole, some))
    )
    assert other.quality.interval == one.quality.interval
    assert (other.quality.student, other.f1, other.quality.mcnemar) == (None, None, one.quality.mcnemar)


# ---------------------------------------------------------------------- the command


def test_two_columns_of_predictions_are_enough(kd, tmp_path) -> None:
    write(tmp_path / "two.csv", [{"teacher": r["teacher"], "student": r["student"]} for r in rows(lost=0.05)])
    said = kd("decide", "two.csv")
    assert said.code == 0, said.err
    assert said.out.startswith("More examples needed: ")
    assert "label these" in said.out.splitlines()[0]
    alike = [{"teacher": r["teacher"], "student": r["teacher"]} for r in rows()]
    write(tmp_path / "two.csv", alike)
    assert kd("decide", "two.csv").out.startswith("Replace: 0 of 300 answers differ")


def test_the_whole_decision(kd, tmp_path, table) -> None:
    said = kd("decide", table, "student_confidence=p", "slices=[class,length]", "text=text", "cost=customer_service",
              "out=decision.json", "margin=0.05")  # fmt: skip
    assert said.code == 0, said.err
    assert said.out.startswith("Replace: on 300 examples the student is ")
    for title in ("Quality on 300", "Slices", "Disagreements", "Calibration on 150", "Cascade on 150", "can show"):
        assert title in said.out
    found = json.loads((tmp_path / "decision.json").read_text())
    assert found["verdict"] == decision.REPLACE
    assert found["cost"]["saving_year"] == 3420.0
    assert len(found["curve_month"]) == len(found["cascade"]["curve"])
    assert found["quality"]["n"] == 300
    assert {s["column"] for s in found["slices"]} == {"class", "length"}


@pytest.mark.parametrize("validation", ["0.3", "val.csv", "part"])
def test_validation_is_a_share_a_file_or_a_column(kd, tmp_path, validation: str) -> None:
    table = [{**row, "part": "val" if i % 3 == 0 else "test"} for i, row in enumerate(rows())]
    write(tmp_path / "predictions.csv", table)
    write(tmp_path / "val.csv", table[:120])
    said = kd("decide", "predictions.csv", "student_confidence=p", f"validation={validation}", "out=d.json")
    assert said.code == 0, said.err
    found = json.loads((tmp_path / "d.json").read_text())["cascade"]
    assert (found["fitted"], found["n"]) == {"0.3": (90, 210), "val.csv": (120, 300), "part": (100, 200)}[validation]


def test_probabilities_of_all_classes(kd, tmp_path) -> None:
    table = []
    for row in rows():
        sure = max(float(row["p"]), 0.5)
        table.append({**row, **{f"s_{c}": sure if c == row["student"] else (1 - sure) / 3 for c in CLASSES}})
    write(tmp_path / "predictions.csv", table)
    said = kd("decide", "predictions.csv", "student_probabilities=s_", "out=d.json")
    assert said.code == 0, said.err
    assert json.loads((tmp_path / "d.json").read_text())["calibration"]["student"]["temperature"] > 0
    for row in table:
        row["s_billing"], row["s_delivery"] = row["s_delivery"], row["s_billing"]
    write(tmp_path / "predictions.csv", table)
    said = kd("decide", "predictions.csv", "student_probabilities=s_")
    assert said.code == 1
    assert "are the classes in another order?" in said.err


def test_before_labelling(kd) -> None:
    said = kd("decide", "examples=200", "difference=-0.03")
    assert said.code == 0
    assert said.out.startswith("200 examples with a difference of -3.0 points do not settle")
    assert "343.5" in said.out
    assert "1,373.9" in said.out


def changed(name: str, value: str, rows_: slice = slice(5, 6)) -> list[dict[str, str]]:
    table = rows()
    for row in table[rows_]:
        row[name] = value
    return table


ROTATED = {name: CLASSES[(i + 1) % len(CLASSES)] for i, name in enumerate(CLASSES)}


@pytest.mark.parametrize(
    ("table", "arguments", "expected"),
    [
        (rows()[:3], (), "has 3 rows: a decision needs 20 examples or more"),
        (changed("label", ""), (), "row 6 of predictions.csv has no label"),
        (changed("label", "billing", slice(None)), (), "has labels of one class only, billing"),
        (changed("student", ""), (), "student = student has no answer in row 6 of predictions.csv"),
        (rows(), ("label=lable",), "label = lable is no column of predictions.csv (near: label)"),
        (rows(), ("student=p",), "student has other classes than label"),
        ([{**r, "student": ROTATED[r["student"]]} for r in rows()], (), "student has its classes in another order"),
        ([{**r, "teacher": ROTATED[r["teacher"]]} for r in rows()], (), "teacher has its classes in another order"),
        (changed("p", "1.7"), ("student_confidence=p",), "student_confidence = p is 1.7 in row 6 of predictions.csv"),
        (changed("p", ""), ("student_confidence=p",), "is empty in row 6"),
        (rows(), ("student_probabilities=q",), "student_probabilities = q: 0 columns"),
        (rows(), ("margin=0",), "margin = 0 is not allowed: it must be a number above 0"),
        (rows(), ("margin=3",), "margin = 3 is not allowed"),
        (rows(), ("marign=0.03",), "kd decide has no marign (near: margin)"),
        (rows(), ("slices=[length]",), "slices = length needs text=COLUMN"),
        (rows(), ("slices=[sorce]",), "slices = sorce is no column"),
        (rows(), ("validation=0.99", "student_confidence=p"), "validation = 0.99"),
        (rows(), ("validation=text", "student_confidence=p"), "validation = text holds"),
        (rows(), ("cost=customer_servise",), "near: customer_service"),
        (rows(), ("run=somewhere",), "given: predictions and run"),
        (rows(), ("difference=0.1",), "difference=… has no use with predictions=…"),
        (rows(), ("write=a.csv",), "write=… has no use with predictions=…"),
    ],
)
def test_bad_input_is_one_sentence_and_no_file(kd, tmp_path, table, arguments: tuple[str, ...], expected: str) -> None:
    write(tmp_path / "predictions.csv", table)
    said = kd("decide", "predictions.csv", *arguments, "out=decision.json")
    assert said.code == 1
    assert expected in said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.csv"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "none is given"),
        (("nowhere.csv",), "there is no such file"),
        (("examples=5",), "examples = 5 is not allowed"),
        (("examples=200", "out=a.txt"), "its name must end in .json"),
        (("run=nowhere",), "nowhere is not a run directory"),
    ],
)
def test_what_there_is_not_is_refused(kd, arguments: tuple[str, ...], expected: str) -> None:
    said = kd("decide", *arguments)
    assert said.code == 1
    assert expected in said.err


def test_a_weak_student_is_not_taken_for_one_with_other_labels(tmp_path) -> None:
    """Right on four of ten, wrong at random: no exchange of classes makes it much better."""
    read(write(tmp_path / "weak.csv", rows(lost=0.6)), Columns())


@pytest.mark.parametrize(("own", "count", "said"), [(0.999, 300, True), (0.999, 299, False), (0.9, 300, False)])
def test_a_teacher_that_was_better_in_its_own_run_is_said(tmp_path, own: float, count: int, said: bool) -> None:
    examples = read(write(tmp_path / "answers.csv", rows()), Columns())
    here = examples.right("teacher").mean()
    measured = {"student": {"selected": {"test": {"acc1": own}}}, "data": {"sizes": {"test": count}}}
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "result.json").write_text(json.dumps({"schema": 1, "status": "finished", **measured}))
    note = of_run._own_run_of_teacher({"teacher": {"checkpoint": str(tmp_path / "teacher")}}, examples)
    assert (f"99.9% of the test samples in its own run, {tmp_path / 'teacher'}, and on {here:.1%}" in note) == said
    assert (note == "") == (not said)
    if said:
        assert decide(replace(examples, note=note), Settings()).notes[0] == note


@pytest.mark.slow
def test_a_run_decides_and_writes_its_examples(kd, tmp_path, teacher_run) -> None:
    """The same accuracies as in its record; the table it writes leads to the same difference."""
    out = tmp_path / "run"
    said = kd("train", "loss=[ce,kd]", f"teacher.checkpoint={teacher_run}", "recipe.epochs=2", "hardware=cpu",
              f"hydra.run.dir={out}", "protocol.keep_predictions=true")  # fmt: skip
    assert said.code == 0, said.err
    measured = json.loads((out / "result.json").read_text())
    said = kd("decide", f"run={out}", "slices=[class]", "out=d.json", "write=examples.csv")
    assert said.code == 0, said.err
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["quality"]["student"] == pytest.approx(measured["student"]["selected"]["test"]["acc1"])
    assert found["quality"]["teacher"] == pytest.approx(measured["teacher"]["test"]["acc1"])
    assert found["calibration"]["student"]["before"]["ece"] == pytest.approx(
        measured["student"]["selected"]["test"]["ece"], abs=1e-5
    )
    assert set(found["calibration"]) == {"student", "teacher"}
    (out / "predictions_test.npz").unlink()  # then the student is measured
    again = kd("decide", f"run={out}", "slices=[class]", "out=again.json")
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "again.json").read_text())["quality"] == found["quality"]
    kd("decide", "examples.csv", "out=csv.json")  # its columns of confidence are found by their names
    of_csv = json.loads((tmp_path / "csv.json").read_text())
    assert of_csv["quality"] == found["quality"]
    assert set(of_csv["calibration"]) == {"student", "teacher"}
    (tmp_path / "plain.csv").write_text("\n".join(",".join(line.split(",")[:4]) for line in
        (tmp_path / "examples.csv").read_text().splitlines()))  # fmt: skip
    said = kd("decide", "examples.csv", "validation=examples.csv")
    assert said.code == 1
    assert "validation = examples.csv holds the examples that are decided on" in said.err
    said = kd("decide", "examples.csv", "validation=plain.csv")
    assert said.code == 0, said.err
    assert "no cascade: the validation examples have no confidence of the student" in said.out
    percent = (tmp_path / "examples.csv").read_text().replace("0.9", "90.")
    (tmp_path / "percent.csv").write_text(percent)
    said = kd("decide", "percent.csv")
    assert said.code == 1
    assert "it must be a number from 0 to 1 (rename the column if it is something else)" in said.err
