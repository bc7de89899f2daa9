"""The page of a sweep: the teacher, what is lost to it, the student alone, what samples show, sizes, classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from kd.config.compose import checked
from kd.records import bench_file, manifest, record
from kd.records.bench_file import Bench, Plan, Size, Speed
from kd.records.manifest import Job, Manifest
from kd.report import beside_teacher, cost, gather
from kd.report.alone import of_groups
from kd.report.frame import measure_of
from kd.report.run_row import rows_of

pytestmark = pytest.mark.slow  # pages, figures, exports and processes take their time

LEVEL = {"[ce]": 0.94, "[ce,kd]": 0.96}


@pytest.fixture
def sweep(write, tmp_path) -> Path:
    """Two losses and three seeds beside a teacher of 97.5 %."""
    folder, jobs = tmp_path / "sweep", {}
    for loss, level in LEVEL.items():
        for seed in range(3):
            name, overrides = f"{loss.strip('[]')}-{seed}", (f"loss={loss}", f"seed={seed}", "recipe.epochs=20")
            jobs[name] = Job(name, f"loss={loss} seed={seed}", overrides)
            write(folder / name, seed, level + 0.002 * seed * (-1 if "kd" in loss else 1), 0.975)
            config = checked([f"loss={loss}", f"seed={seed}", "model@teacher=mlp_teacher", "teacher.allow_random=true"])
            (folder / name / record.CONFIG).write_text(as_yaml(config))
            (folder / name / "student.safetensors").write_bytes(bytes(20_000))
    manifest.write(folder, Manifest("sweep", "sweep", jobs))
    return folder


def as_yaml(config: dict) -> str:
    return yaml.safe_dump(config)


def bench(run: Path, ratio: float = 0.5) -> None:
    size = Size(3466, 0, 0, None, 13864, 3392, None)
    sides = {"student": size, "teacher": size}
    numbers = dict.fromkeys(sides, 1.0)
    milliseconds = {name: {"p50": 1.0} for name in sides}
    speed = Speed("eager", 1, milliseconds, numbers, ratio, (ratio - 0.1, ratio + 0.1))
    machine = {"device": "a processor", "threads": 1, "cores": 2, "versions": {}}
    bench_file.write(run / bench_file.KEPT, Bench(dict.fromkeys(sides, "x"), machine, Plan(["eager"]), sides, [speed]))


def section(sweep: Path):
    study, frame = gather.read_sweep(sweep)
    return beside_teacher.section(study, frame, sweep)


def test_the_teacher_stands_first_and_points_lost_have_an_interval(sweep) -> None:
    found = section(sweep)
    (grid,) = found.grids
    assert grid.head == ("", "test top-1, %", "95 % by 1,000 test rows", "lost to the teacher, points", "parameters",
                         "MB", "MACs")  # fmt: skip
    teacher, kd, alone = grid.rows
    assert teacher[:2] == ("teacher", "97.50")
    assert teacher[4:] == ("85,002", "–", "84,480")
    assert kd[0] == "loss=[ce,kd]"
    lost = 100 * np.array([0.015, 0.017, 0.019])
    half = stats.t.ppf(0.975, 2) * lost.std(ddof=1) / 3**0.5
    assert kd[3] == f"{lost.mean():.2f} [{lost.mean() - half:.2f}, {lost.mean() + half:.2f}]"
    assert alone[3].startswith("3.30 [")
    assert kd[4:] == ("3,466", "0.02", "3,392")
    low, high = (float(x) for x in teacher[2].split(" to "))
    assert (low, high) == pytest.approx((96.34, 98.30), abs=0.01)  # Wilson, 975 of 1,000
    assert "One of 270 validation rows is 0.37 points" in found.notes[0]
    assert "Time is not measured: kd bench " in found.notes[-1]
    assert f"against=teacher out={sweep}/ce,kd-0/bench.json" in found.notes[-1].replace("'", "")


def test_a_bench_of_one_run_holds_for_all_of_its_size(sweep, write) -> None:
    bench(sweep / "ce-1")
    grid = section(sweep).grids[0]
    assert [row[-1] for row in grid.rows] == ["–", "0.5 [0.4, 0.6]", "0.5 [0.4, 0.6]"]
    result = record.read(sweep / "ce,kd-0")
    for seed in range(3):
        run = sweep / f"ce,kd-{seed}"
        result = record.read(run)
        record.write(run, {**result, "student": {**result["student"], "parameters": 9000}})
    assert [row[-1] for row in section(sweep).grids[0].rows] == ["–", "–", "0.5 [0.4, 0.6]"]
    run = sweep / "ce,kd-0"
    result = record.read(run)
    record.write(run, {**result, "student": {**result["student"], "latency_ratio": 0.7}})  # as kd search measures
    assert [row[-1] for row in section(sweep).grids[0].rows] == ["–", "0.7", "0.5 [0.4, 0.6]"]


def test_distilled_is_compared_with_alone(kd, sweep) -> None:
    study, _ = gather.read_sweep(sweep)
    (comparison,) = study.comparisons.values()
    assert (comparison.row, comparison.than, comparison.measure) == ("loss=[ce,kd]", "loss=[ce]", "test/acc1")
    assert study.rows["loss=[ce,kd]"].alone == "loss=[ce]"
    assert kd("report", str(sweep)).code == 0
    text = (sweep / "report.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| over alone"))
    differences = 100 * np.array([0.02, 0.016, 0.012])
    assert f"| 3 | +{differences.mean():.2f} points |" in line
    assert text.index("## Beside the teacher") < text.index("## Comparisons") < text.index("## Classes")
    assert "Grey: students alone" in text


def test_alone_has_the_same_student_data_and_recipe(tmp_path) -> None:
    def of(name: str, *overrides: str) -> tuple[str, Path]:
        (tmp_path / name).mkdir()
        (tmp_path / name / record.CONFIG).write_text(as_yaml(checked(list(overrides))))
        return name, tmp_path / name

    teacher = ("model@teacher=mlp_teacher", "teacher.allow_random=true")
    runs = [
        of("alone", "loss=[ce]"),
        of("beside", "loss=[ce]", *teacher, "seed=3"),
        of("wide", "loss=[ce]", "student.model.hidden=[64]"),
        of("kd", "loss=[ce,kd]", *teacher),
        of("longer", "loss=[ce,kd]", *teacher, "recipe.epochs=7", "protocol.val_every=1"),
        of("wide_kd", "loss=[kd]", *teacher, "student.model.hidden=[64]", "loss.kd.temperature=9"),
    ]
    assert of_groups(runs) == {"kd": "beside", "wide_kd": "wide"}
    assert of_groups([("never", tmp_path / "nowhere")]) == {}


def test_classes_stand_beside_those_of_the_teacher(sweep) -> None:
    study, frame = gather.read_sweep(sweep)
    grid = beside_teacher.classes(study, frame).grids[0]
    assert grid.head == ("class", "teacher", "loss=[ce]", "loss=[ce,kd]")
    assert len(grid.rows) == 10
    assert grid.rows[3] == ("3", "97.50", "94.20", "95.80")


def test_one_student_network_has_a_front_with_its_teacher(sweep) -> None:
    study, frame = gather.read_sweep(sweep)
    figure = cost.pareto(study, frame, measure_of(frame, "selected/test/acc1"))
    assert [text.get_text() for text in figure.axes[0].texts].count("teacher") == 1
    assert "Dark: the teacher" in cost.caption(figure, measure_of(frame, "selected/test/acc1"))
    without = frame.drop(columns=[c for c in frame if str(c).startswith("teacher/")])
    assert cost.pareto(study, without, measure_of(without, "selected/test/acc1")) is None


def test_several_teachers_are_told_apart(sweep) -> None:
    for seed in range(3):
        result = record.read(sweep / f"ce-{seed}")
        test = {**result["teacher"]["test"], "acc1": 0.9}
        record.write(
            sweep / f"ce-{seed}", {**result, "teacher": {**result["teacher"], "test": test, "checkpoint": "b/weak"}}
        )
    grid = section(sweep).grids[0]
    assert [row[:2] for row in grid.rows[:2]] == [("teacher teacher", "97.50"), ("teacher weak", "90.00")]
    assert next(row for row in grid.rows if row[0] == "loss=[ce]")[3].startswith("−4.20")  # it is better than that one


def test_runs_without_a_teacher_lose_nothing(write, tmp_path) -> None:
    for seed in (0, 1):
        write(tmp_path / "runs" / f"seed{seed}", seed, 0.9, name="plain", config_hash="1")
    study, frame = gather.study_of("runs", [gather.of_run_dir(tmp_path / "runs" / f"seed{s}") for s in (0, 1)],
                                   tmp_path / "runs")  # fmt: skip
    found = beside_teacher.section(study, frame, tmp_path / "runs")
    assert "lost to the teacher, points" not in found.grids[0].head
    assert found.title == "What so many samples show, and size"
    assert "against=TEACHER" in found.notes[-1]


def test_seeds_alone_are_called_by_the_name_of_the_experiment(write, tmp_path) -> None:
    def swept(folder: str, name: str) -> list[str]:
        jobs = {}
        for seed in (0, 1):
            jobs[f"{seed}"] = Job(f"{seed}", f"seed={seed}", (f"seed={seed}", "hardware=cpu", "recipe.epochs=5"))
            write(tmp_path / folder / f"{seed}", seed, 0.9, name=name)
        manifest.write(tmp_path / folder, Manifest("sweep", folder, jobs))
        return list(gather.read_sweep(tmp_path / folder)[0].rows)

    assert swept("a", "digits_kd") == ["digits_kd"]
    assert swept("b", "train") == ["all seeds"]


def test_runs_of_different_tasks_are_refused(kd, write, tmp_path) -> None:
    write(tmp_path / "runs" / "a", 0, 0.9, name="a", config_hash="1")
    regression = [{"name": "pearson", "title": "Pearson", "better": "max"}]
    result = record.read(write(tmp_path / "runs" / "b", 0, 0.8, name="b", config_hash="2"))
    for epoch in ("last", "selected"):
        for split in ("val", "test"):
            result["student"][epoch][split] = {"pearson": 0.8}
    record.write(tmp_path / "runs" / "b", {**result, "metrics": regression})
    said = kd("report", "runs")
    assert (said.code, said.out) == (1, "")
    assert said.err.count("\n") == 1
    assert "runs holds runs of different tasks: a is measured by acc1, b by pearson" in said.err


def test_the_rows_of_a_split_are_read_as_they_are_written() -> None:
    assert rows_of("Digits 4822: 808 (24 labelled)/270/719 train/val/test") == (270, 719)
    assert rows_of("data: 5/6/7 train/val/test") == (6, 7)
    assert rows_of("something else") is None
