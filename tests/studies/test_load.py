"""What the rows of a study may say: grids, several of them, seeds of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd.errors import KdError
from kd.studies import load
from kd.sweeps.study import plan


def study(folder: Path, rows: str) -> load.Study:
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(f"seeds: [0, 3]\noverrides: [data=fake]\nrows:\n{rows}")
    return load.load_study(folder)


PAIRS = """
  teacher_{net}: {grid: {net: [resnet56, vgg13]}, overrides: ["model@student={net}"]}
  alone: {}
  kd_{teacher}_{net}:
    grid:
      - {teacher: resnet56, net: [resnet20, resnet8], lr: 0.05}
      - {teacher: vgg13, net: mobilenetv2, lr: 0.01}
    values: {family: one, lr: 0}
    overrides: ["model@student={net}", "recipe.optimizer.lr={lr}", "teacher.checkpoint={teacher_{teacher}}"]
"""


def test_a_list_of_grids_is_one_after_another(tmp_path: Path) -> None:
    found = study(tmp_path / "pairs", PAIRS)
    assert list(found.rows)[3:] == ["kd_resnet56_resnet20", "kd_resnet56_resnet8", "kd_vgg13_mobilenetv2"]
    row = found.rows["kd_vgg13_mobilenetv2"]
    assert row.overrides[1:] == ("model@student=mobilenetv2", "recipe.optimizer.lr=0.01",
                                 "teacher.checkpoint={teacher_vgg13}")  # fmt: skip
    assert row.values == {"family": "one", "teacher": "vgg13", "net": "mobilenetv2", "lr": 0.01}, "the grid's lr wins"
    assert found.rows["alone"].overrides == ("data=fake",)


@pytest.mark.parametrize("grid", ["[]", "{}", "{width: []}", "3", "[{width: 3}, 4]"])
def test_a_grid_without_values_is_refused(tmp_path: Path, grid: str) -> None:
    with pytest.raises(KdError, match=r"the grid of w must give each variable a value or a list of values"):
        study(tmp_path / "pairs", f"  w: {{grid: {grid}, overrides: []}}")


def test_a_seed_of_its_own_comes_after_that_of_the_study(tmp_path: Path) -> None:
    rows = '  first: {}\n  again: {overrides: ["seed=100{seed}", "teacher.checkpoint={first}"]}'
    jobs = {job.name: job for job in plan(study(tmp_path / "ban", rows), tmp_path, (), None, ())}
    seeds = [o for o in jobs["again/seed3"].overrides if o.startswith("seed=")]
    assert seeds == ["seed=3", "seed=1003"], "the last one wins in Hydra"
    assert f"teacher.checkpoint='{tmp_path}/first/seed3'" in jobs["again/seed3"].overrides, "paired by the study's seed"


def test_the_line_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(KdError, match=r"study\.yaml cannot be read \(line 4\): not valid YAML \("):
        study(tmp_path / "broken", "  again: {overrides: [seed=100{seed}]}")
    with pytest.raises(KdError, match=r"study\.yaml cannot be read \(line 4\): a tab; YAML wants spaces$"):
        study(tmp_path / "tab", "\tagain: {}")


BOMB = "".join(f"  x{i}: &x{i} [{', '.join([f'*x{i - 1}' if i else 'lol'] * 10)}]\n" for i in range(12))


@pytest.mark.parametrize(
    "text",
    [
        "rows:\n  a:\n    grid: {n: [1, 2]}\n    values:\n" + BOMB.replace("  x", "      x"),
        f"notes:\n{BOMB}",
        "rows: &a {a: *a}",
        "rows: {a: &a {}, b: &b {<<: [*a, *a], k: 1}, "
        + ", ".join(f"c{i}: &c{i} {{<<: [{', '.join([f'*c{i - 1}' if i else '*b'] * 9)}]}}" for i in range(9))
        + "}",
    ],
    ids=["row with a grid", "elsewhere", "in itself", "merged"],
)
@pytest.mark.parametrize("file", ["study.yaml", "published.yaml"])
def test_aliases_that_stand_for_too_much_are_refused(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / "study.yaml").write_text("rows: {a: {}}\n")
    (tmp_path / file).write_text(text)
    with pytest.raises(KdError) as caught:
        load.load_study(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / file} cannot be read: it holds more than 100,000 values")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rows: " + "[" * 5000 + "]" * 5000, "cannot be read: its values are nested too deeply"),
        ("cost: 2024-13-45", "cannot be read: month must be in 1..12"),
    ],
)
def test_what_the_reader_itself_cannot_take_is_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(KdError) as caught:
        load.load_study(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'study.yaml'} {sentence}")


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ("  a: {}\n  b: {}\n  a: {label: other}", r"study\.yaml \(line 6\): the key a is listed twice"),
        ("  a:\n    label: x\n    overrides: []\n    label: y", r"\(line 7\): the key label is listed twice"),
        ('  1: {}\n  "1": {}', r"\(line 5\): the key 1 is listed twice"),
        ("  a: {}\nseeds: [1]", r"\(line 5\): the key seeds is listed twice"),
    ],
)
def test_a_key_listed_twice_is_refused(tmp_path: Path, rows: str, sentence: str) -> None:
    with pytest.raises(KdError, match=sentence):
        study(tmp_path / "twice", rows)


def test_a_merged_key_may_be_replaced(tmp_path: Path) -> None:
    found = study(tmp_path / "merged", "  a: &a {label: first, overrides: [x=1]}\n  b: {<<: *a, label: second}")
    assert (found.rows["b"].label, found.rows["b"].overrides) == ("second", ("data=fake", "x=1"))


def test_null_is_none(tmp_path: Path) -> None:
    empty = ("supported", "comparisons", "evaluations", "figures", "columns", "claim")
    found = study(tmp_path / "null", "  a:\n" + "".join(f"{key}:\n" for key in empty))
    assert (found.supported, found.comparisons, found.evaluations) == ((), {}, {})
    assert (found.figures, found.columns, found.claim, found.published) == ((), (), "", None)
    with pytest.raises(KdError, match=r"study\.yaml: rows is empty"):
        study(tmp_path / "null", "")


def test_figures_over_grid_variables_are_read(tmp_path: Path) -> None:
    lines = "{kind: lines, x: t, measure: m}, {kind: lines, x: t, group: w, measure: m}"
    figures = f"[{{kind: map, x: t, y: w, measure: m}}, {lines}]"
    found = study(tmp_path / "figures", f"  w{{w}}_T{{t}}: {{grid: {{w: [1, 2], t: [3, 4]}}}}\nfigures: {figures}")
    assert [(f.kind, f.x, f.y, f.group) for f in found.figures] == [
        ("map", "t", "w", None), ("lines", "t", None, None), ("lines", "t", None, "w")]  # fmt: skip


@pytest.mark.parametrize(
    ("published", "sentence"),
    [
        (
            "numbers: {techer: {test/acc1: {value: 1}}}",
            r"published\.yaml: numbers: there is no row techer \(near: teacher\)",
        ),
        ("numbers: {teacher: 0.9}", "numbers: teacher = 0.9 is not allowed: it must be a mapping"),
        ("numbers: {teacher: {test/acc1: 0.9}}", "teacher: test/acc1 = 0.9 is not allowed: it must be a mapping"),
        ("numbers: {teacher: {test/acc1: {n: 3}}}", "test/acc1 = {'n': 3} has no value, which it needs: a number"),
        (
            "numbers: {teacher: {test/acc1: {value: 90 %}}}",
            "test/acc1: value = 90 % is not allowed: it must be a number",
        ),
        ("numbers: {teacher: {test/acc1: {value: 1, std: null}}}", "std = None is not allowed: it must be a number"),
        ("numbers: {teacher: {test/acc1: {value: 1, sd: 2}}}", r"test/acc1 has no option sd \(near: std\)"),
        ("numbers: {}\nnumbers: {}", r"published\.yaml \(line 4\): the key numbers is listed twice"),
        ("numbers: [1]", r"published\.yaml: numbers = \[1\] is not allowed: it must be a mapping"),
        ("comparable: 1\nnumbers: {}", "comparable = 1 is not allowed: it must be true or false"),
        ("note: none", r"published\.yaml has no numbers, which it needs: a mapping"),
    ],
)
def test_what_is_wrong_in_the_published_numbers_is_said(tmp_path: Path, published: str, sentence: str) -> None:
    folder = tmp_path / "paper"
    folder.mkdir()
    (folder / "published.yaml").write_text(f"source: a paper\nprotocol: one run\n{published}")
    with pytest.raises(KdError, match=sentence):
        study(folder, "  teacher: {}")


@pytest.mark.parametrize("override", ["seed=7", "name=x", "hydra.run.dir=x"])
def test_what_the_study_sets_itself_is_refused(tmp_path: Path, override: str) -> None:
    (tmp_path / "study.yaml").write_text(f"rows: {{a: {{overrides: ['{override}']}}}}\n")
    with pytest.raises(KdError, match=f"rows: a: {override} is not allowed: the study sets"):
        load.load_study(tmp_path)
    (tmp_path / "study.yaml").write_text("rows: {a: {overrides: ['seed=10{seed}']}}\n")
    assert load.load_study(tmp_path).rows["a"].overrides == ("seed=10{seed}",)


# ---------------------------------------------------------------------- where studies are found


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's folder with ``both`` and ``theirs``; the working directory has ``both`` and ``own``."""
    folder = tmp_path / "package" / "experiments"
    for place, names in ((folder, ("both", "theirs")), (tmp_path / "experiments", ("both", "own"))):
        for name in names:
            (place / name).mkdir(parents=True)
            (place / name / "study.yaml").write_text("rows: {alone: {}}")
    monkeypatch.setattr(load, "SHIPPED", folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_studies_of_the_working_directory_come_before_those_of_the_package(shipped: Path) -> None:
    assert load.study_names() == ["both", "own", "theirs"]
    assert load.load_study("both").folder == Path("experiments/both")
    assert load.load_study("theirs").folder == shipped / "theirs"
    with pytest.raises(load.NoStudy, match=r"no study their \(near: theirs\): .*; studies: both, own, theirs$"):
        load.load_study("their")


def test_only_what_the_working_directory_does_not_hold_is_the_packages_alone(shipped: Path, monkeypatch) -> None:
    found = {name: load.is_only_shipped(load.load_study(name).folder) for name in load.study_names()}
    assert found == {"both": False, "own": False, "theirs": True}
    monkeypatch.chdir(shipped.parent)  # of a checkout
    assert not load.is_only_shipped(load.load_study("theirs").folder)
    assert not load.is_only_shipped(shipped / "theirs")
