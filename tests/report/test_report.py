"""The two pages, and ``kd report`` from the shell."""

from __future__ import annotations

import base64
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kd import report
from kd.errors import KdError
from kd.records import manifest, record, sources
from kd.records.manifest import Job, Manifest
from kd.report import frame
from kd.report.page import markdown, spread
from kd.report.tables import Grid
from kd.studies.study import Comparison, Condition, Published
from tests.pages import read

pytestmark = pytest.mark.slow  # pages, figures, exports and processes take their time

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def small(study):
    """The study without its grid and its figures."""
    return replace(study, rows={n: r for n, r in study.rows.items() if not r.values}, figures=())


def plain(text: str) -> str:
    return " ".join(text.replace("\u00a0", " ").split())


def test_a_study_with_its_runs(study, runs, tmp_path) -> None:
    found = report.build(study, frame.of_study(study, runs), runs, tmp_path / "out")
    assert found.verdict.headline == "2 supported"
    assert set(found.figures) == {"bars", "map_1", "lines_2", "pareto", "curves", "reliability"}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["figures", "report.html", "report.md"]
    page = read(found.paths["html"])
    assert len(page.addresses) == len(found.figures)
    for address, picture in zip(page.addresses, found.figures.values(), strict=True):
        head, _, content = address.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(content) == picture.read_bytes()
        assert picture.read_bytes()[:8] == PNG
    html = found.paths["html"].read_text()
    assert "<script" not in html
    assert "http" not in html
    said, text = plain(page.text), plain(found.paths["md"].read_text().replace("**", ""))
    for page_text in (said, text):
        assert "2 conditions: 2 supported" in page_text
        for judged in found.verdict.conditions:
            assert plain(judged.text) in page_text
        for word in (study.question, study.paper, study.claim, study.published.source, study.cost, "4acf7a75e6"):
            assert word in page_text
        assert "2 runs are not finished" in page_text
        assert "the loss is not finite" in page_text
    order = [said.index(w) for w in (study.question, "2 conditions", "Results", "Comparisons", "Published", "Protocol")]
    assert order == sorted(order)
    links = re.findall(r"\]\((figures/\w+\.png)\)", found.paths["md"].read_text())
    assert [tmp_path / "out" / link for link in links] == list(found.figures.values())


def test_from_results_csv_alone_the_same_numbers_without_curves(small, runs, tmp_path) -> None:
    full = frame.of_study(small, runs)
    frame.write_results(tmp_path / "results.csv", small, full)
    first = report.build(small, full, runs, tmp_path / "first")
    second = report.build(small, frame.read_results(tmp_path / "results.csv", small), None, tmp_path / "second")
    assert set(first.figures) - set(second.figures) == {"curves", "reliability"}
    assert second.verdict == first.verdict
    tables = [p.paths["md"].read_text().split("## Results")[1].split("## ")[0] for p in (first, second)]
    assert tables[0] == tables[1]


def test_the_same_runs_give_the_same_page(small, runs, tmp_path) -> None:
    found = frame.of_study(small, runs)
    pages = [report.build(small, found, runs, tmp_path / name).paths["md"].read_text() for name in ("a", "b")]
    assert pages[0] == pages[1]


def test_a_paper_without_numbers_has_no_table(small, runs, tmp_path) -> None:
    words = replace(small, published=Published("a paper", "in words only", {}))
    page = report.build(words, frame.of_study(small, runs), runs, tmp_path).paths["md"].read_text()
    section = page.split("## Published\n")[1].split("## ")[0]
    assert "in words only" in section
    assert "|" not in section


def test_one_seed_says_that_it_has_no_interval(small, runs, tmp_path) -> None:
    found = frame.of_study(small, runs)
    built = report.build(small, found[found["seed"] == 0], None, tmp_path)
    assert built.verdict.headline == "2 undecided"
    text = built.paths["md"].read_text()
    assert "2 conditions: 2 undecided" in text
    assert "There is one seed a row: no spread and no interval can be given." in text
    assert "one seed: no interval" in built.verdict.conditions[0].sentence


def test_a_contradicted_claim(small, runs, tmp_path) -> None:
    wrong = replace(small, comparisons={"x": Comparison("x", "alone", "distilled", "test/acc1")},
                    supported=(Condition("x", above=0.0),))  # fmt: skip
    built = report.build(wrong, frame.of_study(wrong, runs), None, tmp_path)
    assert built.verdict.headline == "1 rejected", "a bound of our own"
    built = report.build(replace(wrong, claim_of="paper"), frame.of_study(wrong, runs), None, tmp_path)
    assert built.verdict.headline == "1 contradicted"
    html = built.paths["html"].read_text()
    assert 'class="verdict contradicted"' in html
    assert '<li class="contradicted"><b>contradicted</b>' in html
    assert "Contradicted: none of the interval fulfils a condition that the paper itself claims." in html
    assert "Rejected:" not in html, "a word that the page does not have"


def test_text_of_others_is_escaped(small, runs, tmp_path) -> None:
    rows = {**small.rows, "alone": replace(small.rows["alone"], label="a | <b>student</b>")}
    built = report.build(replace(small, rows=rows), frame.of_study(small, runs), None, tmp_path)
    assert "<b>student" not in built.paths["html"].read_text()
    assert "| a \\| <b>student</b> | 5 |" in built.paths["md"].read_text()
    assert markdown(Grid(("a", "b"), (("x|y", "1"), ("z", "2")), (1,))) == (
        "| a | b |\n| :-- | --: |\n| x\\|y | 1 |\n| **z** | **2** |"
    )


@pytest.mark.parametrize(
    ("cell", "html"),
    [
        ("97.47 ± 0.51", '97.47<span class="spread"> ± 0.51</span>'),
        ("74.0 ± 2.5 (n = 3)", '74.0<span class="spread"> ± 2.5 (n = 3)</span>'),
        ("70 [−69, 71]", '70<span class="spread"> [−69, 71]</span>'),
        ("+1.2 points", "+1.2 points"),
        ("a ± b <i>", "a ± b <i>"),  # left to the template, which escapes it
        ("loss [ce, kd]", "loss [ce, kd]"),
    ],
)
def test_a_spread_is_small_print(cell, html) -> None:
    assert spread(cell) == html


def test_nothing_is_written_when_something_is_wrong(small, runs, tmp_path) -> None:
    out = tmp_path / "out"
    report.build(small, frame.of_study(small, runs), runs, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    (runs / "distilled" / "seed1" / "metrics.csv").write_text("")
    with pytest.raises(KdError, match=r"metrics\.csv"):
        report.build(small, frame.of_study(small, runs), runs, out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    nothing = frame.of_study(small, tmp_path / "nowhere")
    with pytest.raises(KdError, match=r"made_up: no run is finished \(16 missing\): there is nothing to report"):
        report.build(small, nothing, None, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(KdError, match="cannot be written"):
        report.build(small, frame.of_study(small, runs), None, tmp_path / "file")


# ---------------------------------------------------------------------- the command


@pytest.fixture
def known(small, monkeypatch):
    """The study by its name."""
    monkeypatch.setattr("kd.studies.load.load_study", lambda name: small, raising=False)
    small.folder.mkdir(parents=True)
    return small


def test_kd_report_of_a_study(kd, known, runs, monkeypatch) -> None:
    monkeypatch.setenv("KD_RUNS", str(runs.parent))
    said = kd("report", "made_up")
    assert said.code == 0, said.err
    assert "2 supported:" in said.out
    assert "soft targets, T = 4" in said.out
    assert (runs / "report.html").is_file()
    frame.write_results(known.folder / "results.csv", known, frame.of_study(known, runs))
    monkeypatch.setenv("KD_RUNS", "elsewhere")
    assert kd("report", "made_up", "out=page").code == 0
    assert "curves.png" not in (Path("page") / "report.md").read_text()
    assert "anew" not in said.out
    object.__setattr__(known.rows["alone"], "overrides", ("recipe.epochs=9",))
    said = kd("report", "made_up", "out=page")
    for text in (said.out, (Path("page") / "report.md").read_text()):
        assert "ow alone: these results were made with other overrides than study.yaml has now" in text


def test_kd_report_of_a_study_that_ran_elsewhere(kd, known, runs, monkeypatch) -> None:
    manifest.write(runs, Manifest("study", "made_up", {}, str(known.folder)))
    (known.folder / "study.yaml").touch()
    asked = []
    monkeypatch.setattr("kd.studies.load.load_study", lambda name: asked.append(name) or known)
    assert kd("report", str(runs)).code == 0
    shutil.rmtree(known.folder)
    assert kd("report", str(runs)).code == 0
    assert asked == [str(known.folder), "made_up"], "by its folder, by name if that was moved"


def test_kd_report_of_a_study_without_results(kd, known) -> None:
    said = kd("report", "made_up")
    assert (said.code, said.out) == (1, "")
    assert re.fullmatch(
        r"kd: made_up has no results: no runs in runs/study_made_up, no results\.csv in \S+\n", said.err
    )
    assert not Path("runs").exists()


def test_kd_report_of_a_sweep(kd, write, tmp_path) -> None:
    sweep, jobs = tmp_path / "sweep", {}
    number = 0
    for t in (1, 2, 4):
        for seed in (0, 1, 2):
            overrides = ("loss=[ce,kd]", f"loss.kd.temperature={t}", f"seed={seed}", f"data.split_seed={seed}")
            jobs[str(number)] = Job(str(number), "", overrides)
            if (t, seed) != (4, 2):
                write(sweep / str(number), seed, 0.9 + 0.01 * t + 0.001 * seed)
            number += 1
    manifest.write(sweep, Manifest("sweep", "sweep", jobs))
    said = kd("report", "sweep")
    assert said.code == 0, said.err
    text = (sweep / "report.md").read_text()
    lines = [line for line in text.split("## Results")[1].splitlines() if "temperature" in line][:3]
    assert [line.replace("*", "").split(" | ")[:3] for line in lines] == [
        ["| temperature=4", "2", "94.05 ± 0.07"],
        ["| temperature=2", "3", "92.10 ± 0.10"],
        ["| temperature=1", "3", "91.10 ± 0.10"],
    ]
    assert "| temperature=4 | missing | 2 | – |" in text
    assert (sweep / "figures" / "lines_1.png").read_bytes()[:8] == PNG
    assert "condition" not in text


def test_kd_report_of_runs(kd, write, tmp_path) -> None:
    for seed in (0, 1):
        write(tmp_path / "runs" / "alone" / f"seed{seed}", seed, 0.9 + 0.01 * seed)
        write(tmp_path / "runs" / "distilled" / f"seed{seed}", seed, 0.94)
    said = kd("report", "runs/alone", "runs/distilled/seed0", "runs/distilled/seed1", "out=here")
    assert said.code == 0, said.err
    lines = Path("here/report.md").read_text().splitlines()
    assert lines[0] == "# 4 runs"
    assert any(line.startswith("| alone | 2 | 90.50 ± 0.71 |") for line in lines)
    assert any(line.startswith("| **distilled** | **2** | **94.00 ± 0.00** |") for line in lines)
    assert kd("report", "runs/alone/seed0").code == 0
    assert Path("report/report.html").is_file()


@pytest.mark.parametrize("place", [("student", "selected", "test", "nll"), ("teacher", "test", "acc1")])
def test_a_run_whose_predictions_were_no_numbers_is_left_out_by_name(kd, write, tmp_path, place) -> None:
    """A record with a null in place of a metric, as NaN is written, spoils no mean and is no traceback."""
    for seed, accuracy in ((0, 0.9), (1, 0.92), (2, 0.3)):
        write(tmp_path / "runs" / f"seed{seed}", seed, accuracy, teacher=0.95)
    bad = tmp_path / "runs" / "seed2"
    result = record.read(bad)
    part = result
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = None
    record.write(bad, result)
    said = kd("report", "runs", "out=here")
    assert said.code == 0, said.err
    sentence = f"un seed2 is left out: {'/'.join(place)} is not finite"
    text = Path("here/report.md").read_text()
    assert sentence in said.out
    assert sentence in text
    assert "91.00 ± 1.41" in text
    alone = kd("report", "runs/seed2")
    assert alone.code == 1
    assert sentence in alone.err
    assert "Traceback" not in alone.err


def taught(run_dir: Path, seed: int, path: str, weights: str, write) -> None:
    about = {"name": "x", "config_hash": "1", "overrides": ["loss=[ce,kd]", f"seed={seed}"]}
    write(run_dir, seed, 0.9, teacher=0.95, **about, weights_read={"teacher.checkpoint": [weights]})
    found = record.read(run_dir)
    record.write(run_dir, {**found, "teacher": {**found["teacher"], "checkpoint": path}})


def rows_of(page: str) -> list[str]:
    lines = [line.replace("*", "") for line in Path(page).read_text().split("## Results")[1].splitlines()]
    return [line for line in lines if line.startswith("| x")]


def test_students_of_a_teacher_that_was_replaced_are_another_row(kd, write, tmp_path) -> None:
    for seed, weights in enumerate(("aaaa", "aaaa", "bbbb")):
        taught(tmp_path / "a" / f"run{seed}", seed, "runs/teacher", weights, write)
        taught(tmp_path / "b" / f"run{seed}", seed, f"runs/teacher{seed}", f"{seed}", write)
    assert kd("report", "a").code == 0
    found = rows_of("report/report.md")
    assert found[0].startswith("| x teacher=sha256:aaaa | 2 |")
    assert found[1].startswith("| x teacher=sha256:bbbb | 1 |")
    assert kd("report", "b").code == 0
    assert rows_of("report/report.md")[0].startswith("| x | 3 |"), "a teacher for each seed is one experiment"


def test_runs_by_different_code_are_two_rows(kd, write, tmp_path) -> None:
    about = {"name": "x", "config_hash": "1"}
    for seed, code in enumerate(({"own": "aaaa"}, {"own": "aaaa"}, {"own": "aaaa", "beside": "cccc"}, None)):
        read = {"code_read": {"own.Term": code}} if code else {}
        write(tmp_path / "a" / f"run{seed}", seed, 0.9, overrides=["loss=[ce]", f"seed={seed}"], **about, **read)
    assert kd("report", "a").code == 0
    marks = [sources.fingerprint(record.read(tmp_path / "a" / f"run{seed}"), ["own.Term"]) for seed in (0, 2)]
    assert {tuple(row.split(" | ")[:2]) for row in rows_of("report/report.md")[:3]} == {
        (f"| x code=sha256:{marks[0]}", "2"),
        (f"| x code=sha256:{marks[1]}", "1"),
        ("| x", "1"),  # of before: by which code is not known
    }
    assert kd("report", "a/run0", "a/run1", "a/run3").code == 0
    assert rows_of("report/report.md")[0].startswith("| x | 3 |"), "one code is one experiment"


def test_runs_by_different_code_and_values_are_told_apart_by_both(kd, write, tmp_path) -> None:
    for seed, (code, value) in enumerate((("aaaa", 1), ("bbbb", 4))):
        read = {"own.Term": {"own": code}, f"own.Net{seed}": {"net": str(seed)}}  # a network of one alone is no change
        about = {"config_hash": str(value), "overrides": [f"loss.kd.temperature={value}"], "code_read": read}
        write(tmp_path / "one" / f"run{seed}", 0, 0.9, name="x", **about)
        write(tmp_path / "two" / f"run{seed}", 0, 0.9, name=f"x{value}", **about)
    marks = [sources.fingerprint({"code_read": {"own.Term": {"own": code}}}, ["own.Term"]) for code in ("aaaa", "bbbb")]
    for folder, named in (("one", ("x temperature=1", "x temperature=4")), ("two", ("x1", "x4"))):
        assert kd("report", folder).code == 0
        found = {row.split(" | ")[0] for row in rows_of("report/report.md")[:2]}
        assert found == {f"| {name} code=sha256:{mark}" for name, mark in zip(named, marks, strict=True)}


def test_runs_by_code_that_is_other_code_now_are_said(kd, write, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_of_report.py").write_text("SCALE = 1\n")
    code = {"own_of_report.Term": sources.code_of("own_of_report.Term")}
    for seed in (0, 1):
        write(tmp_path / "a" / f"run{seed}", seed, 0.9, name="x", config_hash="1", code_read=code)
    assert "Outdated" not in kd("report", "a").out
    (tmp_path / "own_of_report.py").write_text("SCALE = 10\n")
    said = kd("report", "a")
    assert "Outdated, 2 of 2 runs: _target_ = own_of_report.Term is other code" in said.out
    assert "Outdated, 2 of 2 runs" in Path("report/report.md").read_text()


def test_runs_of_one_name_and_another_configuration_are_two_rows(kd, write, tmp_path) -> None:
    write(tmp_path / "a" / "run", 0, 0.9, name="x", config_hash="1", overrides=["loss=[ce]", "seed=0"])
    write(tmp_path / "b" / "run", 0, 0.8, name="x", config_hash="2", overrides=["loss=[ce,kd]", "seed=0"])
    assert kd("report", "a", "b").code == 0
    text = Path("report/report.md").read_text()
    assert "| **x loss=[ce]** | **1** |" in text
    assert "| x loss=[ce,kd] | 1 |" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "kd report needs the name of a study, or directories of runs"),
        (["--force"], "--force is not understood: kd report takes STUDY or RUNS..., and out=DIR"),
        (["runs", "to=x"], "to=x is not understood"),
        (["runs", "out=file"], "out = file is not a directory"),
        (
            ["runs/twice/a", "nowhere"],
            "nowhere is not a run, a sweep or a folder of runs: there is no result.json in it",
        ),
        (["empty"], "empty is not a run, a sweep or a folder of runs"),
        (["runs/broken"], "result.json cannot be read: it is not valid JSON"),
        (["runs/newer"], "result.json was written by a newer version of kd (schema 7, known: 1)"),
        (["runs/twice"], "there are two runs of seed 0; give one of them"),
        (["sweep"], "sweep.json cannot be read: it is not what kd writes"),
        (["begun"], "begun is a sweep without jobs: none has begun yet"),
    ],
)
def test_bad_input(kd, write, tmp_path, arguments, sentence) -> None:
    for name in ("empty", "sweep", "begun", "runs/broken", "runs/newer", "runs/twice/a", "runs/twice/b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "sweep" / "sweep.json").write_text("{")
    (tmp_path / "begun" / "sweep.json").write_text('{"schema": 1, "kind": "sweep", "name": "x", "jobs": {}}')
    (tmp_path / "runs" / "broken" / "result.json").write_text('{"schema": 1, "stat')
    (tmp_path / "runs" / "newer" / "result.json").write_text(json.dumps({"schema": 7}))
    for name in "ab":
        write(tmp_path / "runs" / "twice" / name, 0, 0.9)
    said = kd("report", *arguments)
    assert (said.code, said.out) == (1, "")
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_real_runs_end_to_end(kd, teacher_run, tmp_path) -> None:
    """Two seeds of a student that ``kd train`` distils, reported."""
    common = [f"teacher.checkpoint={teacher_run}", "loss=[ce,kd]", "recipe.epochs=3", "hardware=cpu"]
    for seed in (0, 1):
        assert (
            kd("train", *common, f"seed={seed}", "protocol.keep_predictions=true", f"hydra.run.dir=runs/{seed}").code
            == 0
        )
    said = kd("report", "runs", "out=page")
    assert said.code == 0, said.err
    text = Path("page/report.md").read_text()
    first = json.loads(Path("runs/0/result.json").read_text())["student"]["selected"]["test"]["acc1"]
    second = json.loads(Path("runs/1/result.json").read_text())["student"]["selected"]["test"]["acc1"]
    head, _, row = (line.split(" | ") for line in text.split("\n## ")[1].splitlines() if line.startswith("|"))
    assert row[head.index("test top-1, % (val-selected)")].startswith(f"{50 * (first + second):.2f} ±")
    assert "Bold" not in text, "one row is not the best of any"
    assert "teacher.checkpoint" not in text
    assert f"batch size 64; optimiser Adam; learning rate 0.01; teacher {teacher_run} (85,002 parameters" in text
    assert {p.stem for p in Path("page/figures").iterdir()} == {"curves", "reliability", "pareto"}
