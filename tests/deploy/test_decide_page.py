"""The page of a decision: its numbers, what was not measured, texts of strangers, one file that needs no other."""

from __future__ import annotations

import csv
import json
from base64 import b64decode
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from kd.cli.main import main
from kd.config.compose import checked
from kd.deploy import quality, samples
from kd.deploy.page.facts import Facts
from kd.records import bench_file
from kd.records.bench_file import Bench, Plan, Size, Speed
from tests.pages import read

CLASSES = np.array(["billing", "<script>alert(1)</script>", "returns & refunds"])
TEXT = "<b>Where</b> is my parcel? <img src=x onerror=alert(1)>"


@pytest.fixture
def table(tmp_path: Path) -> list[dict[str, str]]:
    """400 answers, 24 of them lost and 8 gained; the student is not sure of what it loses."""
    rng = np.random.default_rng(0)
    label = rng.integers(len(CLASSES), size=400)
    wrong = (label + 1) % len(CLASSES)
    student, teacher = label.copy(), label.copy()
    student[:24], teacher[24:32] = wrong[:24], wrong[24:32]
    sure = np.where(np.arange(400) < 24, rng.uniform(0.34, 0.5, 400), rng.uniform(0.6, 1, 400))
    order = rng.permutation(400)
    rows = [
        {"label": CLASSES[label[i]], "student": CLASSES[student[i]], "teacher": CLASSES[teacher[i]],
         "p": f"{sure[i]:.4f}", "text": f"{TEXT} {i}"}
        for i in order
    ]  # fmt: skip
    write(tmp_path / "answers.csv", rows)
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def measured(**changed: object) -> Bench:
    """What ``kd bench`` may have found of DistilBERT and BERT."""
    sizes = {
        "student": Size(66_000_000, 0, 0, 264_000_000, 264_000_000, 10_000, None),
        "against": Size(110_000_000, 0, 0, 440_000_000, 440_000_000, 20_000, None),
    }
    milliseconds = {name: {"p50": ms, "p95": ms, "p99": ms} for name, ms in (("student", 6.15), ("against", 10.0))}
    rate = {"student": 162.6, "against": 100.0}
    speeds = [
        Speed("onnx", 1, milliseconds, rate, 0.9, (0.8, 1.0)),
        Speed("eager", 8, milliseconds, rate, 0.7, (0.6, 0.8)),
        Speed("eager", 1, milliseconds, rate, 0.625, (0.5, 0.8)),
    ]
    machine = {"device": "a processor", "threads": 1, "cores": 2, "versions": {"torch": "2.14.1"}}
    made = Bench({"student": "small", "against": "large"}, machine, Plan(["onnx", "eager"], (1, 8)), sizes, speeds)
    return replace(made, **changed)


ALL = ("student_confidence=p", "text=text", "cost=customer_service", "training.machine=570", "start=2026-01-01")


def test_the_page_has_the_whole_decision(kd, tmp_path, table) -> None:
    bench_file.write(tmp_path / "bench.json", measured())
    said = kd("decide", "answers.csv", *ALL, "bench=bench.json", "page=decision.html", "out=decision.json")
    assert said.code == 0, said.err
    assert said.out.splitlines()[-1] == "decision.html"
    page, found = read(tmp_path / "decision.html"), json.loads((tmp_path / "decision.json").read_text())
    kept = found["quality"]["retention"]
    assert kept == pytest.approx(376 / 392)
    for words in (
        "Can the student replace its teacher? Replace with a cascade",
        "accuracy kept 95.9 %",
        "94.0 of 98.0 %",
        "smaller by 40.0 % 66,000,000 of 110,000,000 parameters",
        "faster by 60 % time ratio 0.625, 95 %: 0.5 to 0.8; eager, batch of 1",  # the smallest batch, not the fastest
        "this student 95.9",
        "40.0 60 [25, 100]",
        "DistilBERT, published 97 40 60",
        "arXiv 1910.01108",
        "410 against 668 seconds",
        f"only the teacher: 24; McNemar p = {2 * stats.binom.cdf(8, 32, 0.5):.3g}",
        "The margin of 3 points",
        f"lower limit (one-sided, 95 %) is −{-100 * quality.interval(8, 24, 400, 0.9)[0]:.1f} points, not above −3",
        "settle the margin if there is no difference",
        "paid for itself on 2026-03-0",
        "length",
        "NLL",
        "on a processor, 1 of 2 cores, 50 interleaved rounds",
        "kd decide answers.csv",
    ):
        assert words in page.text, words
    assert "What was not measured" not in page.text
    assert page.tags.count("blockquote") == page.tags.count("dl") == 10
    assert {card["label"] for card in found["disagreements"]} <= {*CLASSES}


def test_texts_of_strangers_stay_text_and_nothing_else_is_needed(kd, tmp_path, table) -> None:
    assert kd("decide", "answers.csv", *ALL, "page=decision.html").code == 0
    page, html = read(tmp_path / "decision.html"), (tmp_path / "decision.html").read_text()
    assert TEXT in page.text
    assert CLASSES[1] in page.text
    assert not {"script", "link", "iframe", "b onerror"} & {*page.tags}
    assert [address.partition(",")[0] for address in page.addresses] == ["data:image/png;base64"] * 2
    assert "http" not in html
    assert "url(" not in html
    assert [file.name for file in tmp_path.glob(".*")] == []  # no half of a page


def test_what_was_not_measured_is_said_with_its_command(kd, tmp_path, table) -> None:
    write(tmp_path / "two.csv", [{name: row[name] for name in ("student", "teacher")} for row in table])
    assert kd("decide", "two.csv", "page=two.html").code == 0
    page = read(tmp_path / "two.html")
    for words in (
        "More examples needed 32 of 400 answers differ",
        "answers agree 92.0 %",
        "smaller by not measured",
        "faster by not measured",
        "saved a year not measured",
        "this student – – –",
        "kd bench STUDENT against=TEACHER out=bench.json",
        "kd decide two.csv page=two.html bench=bench.json",
        "kd decide two.csv page=two.html cost=FILE.yaml",
        "kd decide two.csv page=two.html label=COLUMN",
    ):
        assert words in page.text, words
    assert page.addresses == []
    assert "Calibration on" not in page.text
    write(tmp_path / "some.csv", [{**r, "label": r["label"] if r["student"] != r["teacher"] else ""} for r in table])
    assert kd("decide", "some.csv", "page=some.html").code == 0
    some = read(tmp_path / "some.html").text
    assert "accuracy −4.0 points both accuracies are not known" in some
    assert "they need a label for every example" in some


def test_a_slower_and_larger_student_is_called_so(kd, tmp_path, table) -> None:
    bench = measured()
    slow = replace(bench.speeds[2], ratio=1.25, interval=(1.2, 1.3))
    small, large = bench.sizes.values()
    bench_file.write(tmp_path / "b.json", replace(bench, speeds=[slow], sizes={"student": large, "against": small}))
    assert kd("decide", "answers.csv", "bench=b.json", "page=d.html").code == 0
    text = read(tmp_path / "d.html").text
    assert "larger by 66.7 %" in text
    assert "slower by 20 %" in text
    assert "−20 [−23, −17]" in text


def test_a_bench_file_is_read_as_it_was_written(tmp_path) -> None:
    bench_file.write(tmp_path / "b.json", measured())
    found = bench_file.read(tmp_path / "b.json")
    assert found.sizes == measured().sizes
    assert [s.interval for s in found.speeds] == [s.interval for s in measured().speeds]
    facts = Facts("", "", "", bench=found)
    assert facts.faster == pytest.approx((0.6, 0.25, 1.0))
    assert facts.smaller is None


def test_intervals_of_one_accuracy_and_of_retention() -> None:
    assert quality.wilson(10, 100) == pytest.approx((0.0552, 0.1744), abs=1e-4)  # Wilson 1927, textbook values
    right = np.array([True] * 90 + [False] * 10)
    same = quality.compare(right, right, 0.03)
    assert (same.retention, same.retention_interval) == (1.0, (1.0, 1.0))
    half = quality.compare(np.array([True, False] * 50), np.ones(100, dtype=bool), 0.03)
    assert half.retention == 0.5
    assert half.retention_interval == pytest.approx((0.4, 0.6), abs=0.02)
    assert quality.compare(right, ~np.ones(100, dtype=bool), 0.03).retention is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("page=d.txt",), "page = d.txt is not allowed: it must be a name that ends in .html"),
        (("page=nowhere/d.html",), "page = nowhere/d.html"),
        (("page=d.html", "cost=customer_servise"), "near: customer_service"),
        (("page=d.html", "volume.requests=1"), "volume.requests=… has no use without cost=…"),
        (("page=d.html", "cost=customer_service", "volume.requets=1"), "there is no key volume.requets"),
        (("bench=b.json",), "bench=… has no use without page=…"),
        (("image=text",), "image=… has no use without page=…"),
        (("page=d.html", "image=picture"), "image = picture is no column of answers.csv"),
        (("page=d.html", "image=text"), "image = text: there is no file"),
        (("page=d.html", "bench=nope.json"), "bench = nope.json: there is no such file: kd bench"),
        (("page=d.html", "bench=answers.csv"), "bench = answers.csv cannot be read"),
        (("page=d.html", "bench=one.json"), "bench = one.json measures one network alone"),
        (("page=d.html", "bench=none.json"), "bench = none.json holds no speed: no compiler"),
        (("page=d.html", "bench=zero.json"), "bench = zero.json cannot be read"),
    ],
)
def test_bad_input_is_one_sentence_and_no_page(kd, tmp_path, table, arguments: tuple[str, ...], expected: str) -> None:
    bench = measured()
    alone = {"student": bench.sizes["student"]}
    bench_file.write(tmp_path / "one.json", replace(bench, sizes=alone))
    bench_file.write(tmp_path / "none.json", replace(bench, speeds=[], left_out={"compiled": "no compiler"}))
    bench_file.write(tmp_path / "zero.json", replace(bench, speeds=[replace(bench.speeds[0], ratio=0.0)]))
    said = kd("decide", "answers.csv", *arguments)
    assert said.code == 1
    assert expected in said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""
    assert not list(tmp_path.glob("*.html"))


def test_texts_of_a_run_by_the_index_of_its_test_split(tmp_path, monkeypatch) -> None:
    rows = [{"text": f"{'one two' if i % 2 else 'three'} {i}", "label": "ab"[i % 2]} for i in range(40)]
    write(tmp_path / "t.csv", rows)
    config = checked(["data=text", f"data.train={tmp_path / 't.csv'}", "data.test_fraction=0.25", "data.cache=null",
                      "task=text_classification", "model@student=bert_tiny"])  # fmt: skip
    monkeypatch.setattr(samples, "run_config", lambda run: config)
    found = samples.texts("run", "test")
    assert len(found) == 10
    assert all(found[index] == rows[index]["text"] for index in found)
    monkeypatch.setattr(samples, "run_config", lambda run: checked([]))
    assert samples.texts("run", "test") == {}


def test_a_table_shows_its_images(kd, tmp_path, table) -> None:
    with (tmp_path / "answers.csv").open() as file:
        rows = list(csv.DictReader(file))
    (tmp_path / "photos").mkdir()
    for number, row in enumerate(rows):
        row["image"] = f"photos/{number}.png"
        Image.new("RGB", (300, 200), (number % 256, 0, 90)).save(tmp_path / row["image"])
    with (tmp_path / "seen.csv").open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    said = kd("decide", "seen.csv", "page=d.html", "image=image", "show=3", "out=d.json")
    assert said.code == 0, said.err
    found = json.loads((tmp_path / "d.json").read_text())
    wanted = [tmp_path / rows[d["row"] - 1]["image"] for d in found["disagreements"]]
    assert len(wanted) == 3
    shown = [one for one in read(tmp_path / "d.html").addresses if one.startswith("data:image/png")]
    colours = {Image.open(BytesIO(b64decode(one.partition(",")[2]))).convert("RGB").getpixel((0, 0)) for one in shown}
    assert {Image.open(file).getpixel((0, 0)) for file in wanted} <= colours


@pytest.mark.slow
def test_a_run_shows_its_images(kd, tmp_path, teacher_run) -> None:
    out = tmp_path / "run"
    said = kd("train", "loss=[ce,kd]", f"teacher.checkpoint={teacher_run}", "recipe.epochs=2", "hardware=cpu",
              f"hydra.run.dir={out}", "protocol.keep_predictions=true")  # fmt: skip
    assert said.code == 0, said.err
    result = json.loads((out / "result.json").read_text())
    said = kd("decide", "run", "page=d.html", "show=7", "out=d.json", "write=d.csv")
    assert said.code == 0, said.err
    page, found = read(tmp_path / "d.html"), json.loads((tmp_path / "d.json").read_text())
    assert found["slices"][0]["column"] == "class"
    pictures = samples.pictures("run", "test", [d["row"] - 1 for d in found["disagreements"]])
    assert len(pictures) == 7
    with (tmp_path / "d.csv").open() as file:
        written = {int(row["index"]): (row["student"], row["teacher"]) for row in csv.DictReader(file)}
    with np.load(out / "predictions_test.npz") as kept:
        assert {*written} == {*kept["index"].tolist()}
    assert all(written[d["row"] - 1] == (d["student"], d["teacher"]) for d in found["disagreements"])
    assert {*pictures.values()} <= {*page.addresses}
    student, teacher = result["student"]["parameters"], result["teacher"]["parameters"]
    assert f"smaller by {100 * (1 - student / teacher):.1f} % {student:,} of {teacher:,} parameters" in page.text
    assert "faster by not measured" in page.text
    assert "kd bench run against=teacher out=run/bench.json" in page.text
    assert "weights file, MB" in page.text
    bench_file.write(out / "bench.json", measured())  # that of a run is found there
    said = kd("decide", "run", "page=e.html")
    assert said.code == 1
    assert "bench is of small and large with 66,000,000 and 110,000,000 parameters" in said.err
    said = kd("decide", str(teacher_run), "page=e.html")
    assert said.code == 1
    assert "has no teacher" in said.err
    assert not (tmp_path / "e.html").exists()


def test_kd_report_writes_it_beside_the_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("a", "a", "a"), ("b", "b", "a"), ("a", "a", "a"), ("b", "b", "b")] * 20
    table = tmp_path / "answers.csv"
    table.write_text("label,teacher,student\n" + "".join(",".join(row) + "\n" for row in rows))
    assert main(["report", "--decision", str(table), "margin=0.05"]) == 0
    assert "Do not replace" in read(tmp_path / "decision.html").text
    assert main(["report", "--decision"]) == 1
    assert "needs the directory of a run, or a file with the answers of both" in capsys.readouterr().err
