"""A study is read, planned, run, gone on with, and written down; what is wrong in it costs one sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from kd.cli import study as verb
from kd.cli.main import main
from kd.errors import KdError
from kd.report import frame, power, vocabulary
from kd.studies import load, references
from kd.studies.study import Study
from kd.sweeps import evaluations
from kd.sweeps.evaluations import best_bias
from kd.sweeps.study import _refuse_swept, _same_experiments, plan

pytestmark = pytest.mark.slow

TINY = ["data=fake", "data.train_images=64", "recipe.epochs=2", "protocol.val_every=1", "hardware=cpu"]
ROWS: dict[str, Any] = {
    "teacher": {"overrides": ["student.model.hidden=[32]"], "seeds": [0]},
    "alone": {"overrides": ["student.model.hidden=[8]"]},
    "T{temperature}": {
        "grid": {"temperature": [1, 4]},
        "label": "soft targets, T = {temperature}",
        "teacher": "teacher",
        "alone": "alone",
        "overrides": [
            "student.model.hidden=[8]",
            "loss=[ce,kd]",
            "teacher.checkpoint={teacher}",
            "loss.kd.temperature={temperature}",
        ],
    },
}


def write(folder: Path, **changed: Any) -> Path:
    """A study folder; ``changed`` keys replace those of the tiny one, None takes one away."""
    content = {
        "question": "Does it run?",
        "seeds": [0, 1],
        "overrides": TINY,
        "rows": ROWS,
        "evaluations": {"seen": {"eval": ["data.eval_batch_size=8"], "rows": ["alone"]}, "fixed": {"bias": [3]}},
        "comparisons": {"helps": {"row": "T4", "than": "alone", "measure": "test/acc1"}},
        "claim": "It helps.",
        "supported": [{"comparison": "helps", "above": 0}],
        "exploratory": True,
        **changed,
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False)
    (folder / "study.yaml").write_text(text)
    return folder


def names(jobs: list[Any]) -> list[str]:
    return [job.name for job in jobs]


# ---------------------------------------------------------------------- read


def test_a_grid_becomes_a_row_for_each_combination(tmp_path: Path) -> None:
    study = load.load_study(write(tmp_path / "tiny"))
    assert list(study.rows) == ["teacher", "alone", "T1", "T4"]
    row = study.rows["T4"]
    assert (row.label, row.values) == ("soft targets, T = 4", {"temperature": 4})
    assert row.overrides[-1] == "loss.kd.temperature=4"
    assert row.overrides[: len(TINY)] == tuple(TINY)
    assert (row.seeds, study.rows["teacher"].seeds) == ((0, 1), (0,))


def test_other_seeds_leave_fixed_ones_alone(tmp_path: Path) -> None:
    study = load.load_study(write(tmp_path / "tiny"), seeds=[7, 8])
    assert (study.rows["alone"].seeds, study.rows["teacher"].seeds) == ((7, 8), (0,))


def test_placeholders_become_quoted_run_directories(tmp_path: Path) -> None:
    overrides = ["teacher.checkpoint=[{a},{a@1}]", "data.split_seed={seed}", "recipe.batch_size=${oc.env:N,{x: 1}}"]
    rows = {"a": {"overrides": []}, "b": {"overrides": overrides}}
    study = load.load_study(
        write(tmp_path / "tiny", rows=rows, overrides=[], comparisons=None, supported=None, evaluations=None)
    )
    found = references.resolve_overrides(study, study.rows["b"], 0, Path("/runs/it's"))
    first, second = (rf"'/runs/it\'s/a/seed{n}'" for n in (0, 1))
    own = (f"teacher.checkpoint=[{first},{second}]", "data.split_seed=0", overrides[2])
    assert found == (*own, "teacher.epoch=last"), "what is reported teaches"
    selected = replace(study, epoch="selected")
    assert references.resolve_overrides(selected, study.rows["b"], 0, Path("/runs/it's")) == own
    chosen = replace(study.rows["b"], overrides=("teacher.epoch=selected", *overrides))
    assert references.resolve_overrides(study, chosen, 0, Path("/runs/it's"))[0] == "teacher.epoch=selected"
    assert len(references.resolve_overrides(study, chosen, 0, Path("/runs/it's"))) == 4
    assert list(references.runs_read(study, study.rows["b"], 0)) == [("a", 0), ("a", 1)]
    inside = replace(study.rows["b"], overrides=("student.model.name={a}/last", "data.train=s{seed}/train.csv"))
    texts = references.resolve_overrides(study, inside, 0, Path("/runs/its"))
    assert texts == ("student.model.name='/runs/its/a/seed0/last'", "data.train=s0/train.csv")
    name = OverridesParser.create().parse_override(texts[0]).value()
    assert str(getattr(name, "text", name)) == "/runs/its/a/seed0/last", "Hydra reads it as one path"


MAP = {"kind": "map", "x": "temperature", "measure": "test/acc1"}
LINES = {**MAP, "kind": "lines"}


def when(**bounds: Any) -> list[dict[str, Any]]:
    return [{"comparison": "helps", **bounds}]


def helps(**keys: Any) -> dict[str, Any]:
    return {"helps": {"row": "T4", "than": "alone", "measure": "test/acc1", **keys}}


def reads(row: str) -> dict[str, Any]:
    return {"overrides": [f"teacher.checkpoint={{{row}}}"]}


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"rows": {"a": reads("techer"), "teacher": {}}}, r"there is no row techer.*teacher"),
        ({"rows": {"a": {"teacher": "b"}}}, "there is no row b"),
        ({"rows": {"a": reads("b"), "b": reads("c"), "c": reads("a")}}, "wait for one another: a → b → c → a"),
        ({"rows": {"a": reads("a")}}, "wait for one another: a → a"),
        ({"rows": {"a": reads("b"), "b": {"seeds": [4, 5]}}}, r"reads b of seed 0, which has the seeds \[4, 5\] only"),
        ({"rows": {"a": reads("b@3"), "b": {}}}, "reads b of seed 3"),
        ({"rows": {}}, "rows is empty"),
        ({"rows": {"a": {"override": []}}}, r"row a has no option override.*overrides"),
        ({"rows": {"a": {"sedes": [1]}}}, r"row a has no option sedes.*seeds"),
        ({"rows": {"a": {"name": "b"}}}, "row a has no option name"),
        ({"rows": {"a b": {}}}, "a b cannot be the name of a row"),
        ({"rows": {"seed": {}}}, "seed cannot be the name of a row"),
        ({"rows": {"a{t}": {"grid": {"t": []}}}}, "must give each variable a value or a list"),
        ({"rows": {"a": {"grid": {"t": [1, 2]}}}}, "two rows a"),
        ({"seeds": [0, 0]}, "lists one twice"),
        ({"seeds": "all"}, "whole numbers"),
        ({"epoch": "best"}, "epoch = best is not allowed"),
        ({"sedes": [1]}, "no option sedes.*seeds"),
        ({"supported": [{"comparison": "help", "above": 0}]}, "no comparison help.*helps"),
        ({"evaluations": {"x": {}}}, "x needs either eval or bias"),
        ({"evaluations": {"x": {"bias": [3], "rows": ["nobody"]}}}, "no row nobody"),
        # conditions
        ({"supported": when()}, r"number 1 \(helps\) needs one of above, below and inside, given: none"),
        ({"supported": when(above=None)}, "needs one of above, below and inside, given: none"),
        ({"supported": when(above=0, inside=[0, 1])}, r"given: above = 0 and inside = \(0, 1\)"),
        ({"supported": when(above="zero")}, r"study\.yaml: supported: number 1: above = zero .* it must be a number"),
        ({"supported": when(below=True)}, "below = True is not allowed: it must be a number"),
        ({"supported": when(above=float("inf"))}, "above = inf is not allowed: it must be a number"),
        (
            {"supported": when(inside=[1])},
            r"inside = \[1\] is not allowed: it must be a list of two numbers, the smaller",
        ),
        ({"supported": when(inside=[2, 1])}, r"inside = \[2, 1\] is not allowed"),
        ({"supported": when(above=0, claim_of="theirs")}, "claim_of = theirs is not allowed: it must be paper or ours"),
        ({"claim_of": "theirs"}, r"study\.yaml: claim_of = theirs is not allowed: it must be paper or ours"),
        ({"claim_off": "paper"}, r"no option claim_off \(near: claim_of"),
        ({"exploratory": "yes"}, "exploratory = yes is not allowed: it must be true or false"),
        # effects
        ({"comparisons": helps(sesoi=0)}, "comparisons: helps: sesoi = 0 is not allowed: it must be more than 0"),
        ({"comparisons": helps(sesoi=-0.01)}, "sesoi = -0.01 is not allowed"),
        ({"comparisons": helps(sesoi="a point")}, "sesoi = a point is not allowed: it must be a number"),
        ({"comparisons": helps(pilot=-1)}, "helps: pilot = -1 is not allowed: it must be 0 or more"),
        ({"comparisons": helps(pilots=1)}, r"helps has no option pilots \(near: pilot\)"),
        ({"supported": [{"above": 0}]}, "supported: number 1 has no comparison, which it needs: a text"),
        # figures
        (
            {"figures": [{**MAP, "kind": "pie"}]},
            "figures: number 1: kind = pie is not allowed: it must be map or lines",
        ),
        ({"figures": [MAP]}, "number 1 has no y, which a map needs"),
        ({"figures": [{**MAP, "y": "temperature", "group": "temperature"}]}, "group = temperature .* map has x and y"),
        ({"figures": [{**LINES, "y": "temperature"}]}, "y = temperature .* kind = lines has x and group"),
        ({"figures": [LINES, {"kind": "lines", "measure": "test/acc1"}]}, "number 2 has no x, which it needs: a text"),
        ({"figures": [{"kind": "lines", "x": "temperature"}]}, "number 1 has no measure, which it needs"),
        ({"figures": [{**LINES, "x": "temperatur"}]}, "x = temperatur is not allowed: .*grid: temperature"),
        ({"figures": [{**LINES, "group": "width"}]}, "group = width is not allowed"),
        ({"figures": [{**MAP, "y": "width"}]}, "y = width is not allowed"),
        ({"figures": LINES}, "figures = .* is not allowed: it must be a list"),
        # types
        ({"supported": {"comparison": "helps", "above": 0}}, "supported = .* is not allowed: it must be a list"),
        ({"supported": ["helps"]}, "supported: number 1 = helps is not allowed: it must be a mapping"),
        ({"comparisons": [{"row": "T4"}], "supported": None}, "comparisons = .* it must be a mapping"),
        ({"comparisons": {"c": {"row": "T4", "than": "alone"}}, "supported": None}, "c has no measure, which it needs"),
        ({"rows": ["a"]}, r"rows = \['a'\] is not allowed: it must be a mapping"),
        ({"rows": {"a": "x=1"}}, "row a = x=1 is not allowed: it must be a mapping"),
        ({"rows": {"a": {"overrides": "x=1"}}}, "row a: overrides = x=1 is not allowed: it must be a list of texts"),
        ({"rows": {"a": {"values": 3}}}, "row a: values = 3 is not allowed: it must be a mapping"),
        ({"rows": {"a{t}": {"grid": {"t": 1}, "values": 3}}}, r"row a\{t\}: values = 3 is not allowed"),
        ({"rows": {"a": {"label": ["x"]}}}, r"row a: label = \['x'\] is not allowed: it must be a text"),
        ({"rows": {"a": {"seeds": "one"}}}, "row a: seeds = one is not allowed"),
        ({"overrides": "recipe.epochs=1"}, r"study\.yaml: overrides = recipe\.epochs=1 .* it must be a list of texts"),
        ({"overrides": [None]}, r"overrides = \[None\] is not allowed: it must be a list of texts"),
        (
            {"evaluations": {"e": {"eval": "data.test_shift=2"}}},
            "evaluations: e: eval = data.test_shift=2 .* a list of",
        ),
        ({"evaluations": {"e": {"bias": 3}}}, "evaluations: e: bias = 3 is not allowed: it must be a list of whole"),
        ({"evaluations": {"e": {"bias": [-1]}}}, r"bias = \[-1\] is not allowed: .*0 or more"),
        ({"evaluations": {"e": {"bias": [3], "rows": "alone"}}}, "e: rows = alone is not allowed: it must be a list"),
        ({"columns": "test/acc1"}, "columns = test/acc1 is not allowed: it must be a list of texts"),
        ({"measure": ["test/acc1"]}, "measure = .* is not allowed: it must be a text"),
        ({"claim": ["It helps."]}, "claim = .* is not allowed: it must be a text"),
    ],
)
def test_what_is_wrong_in_a_study_is_said(tmp_path: Path, changed: dict[str, Any], sentence: str) -> None:
    if "rows" in changed:
        changed = {"comparisons": None, "supported": None, "evaluations": None, **changed}
    with pytest.raises(KdError, match=sentence):
        load.load_study(write(tmp_path / "tiny", **changed))


@pytest.mark.parametrize(
    ("measure", "share_of", "bound", "sentence"),
    [
        ("test/acc1", None, {"below": 20}, r"tiny/study\.yaml: supported: number 1 \(helps\): below = 20 is not "
         r"allowed: it must be a difference of test/acc1 as a fraction, -1 to 1: 0\.01 is one point"),
        ("test/ece", None, {"above": -5.0}, "above = -5.0 is not allowed: it must be a difference of test/ece"),
        ("test/class_3", None, {"inside": [-0.5, 1.5]}, r"inside = \[-0.5, 1.5\] is not allowed"),
        ("test/errors", "teacher", {"above": 50}, "above = 50 is not allowed: it must be the share of a gap, -2 to 2"),
        ("test/acc1", None, {"above": 1}, None),
        ("test/acc1", "teacher", {"above": 1.5}, None),
        ("test/errors", None, {"below": -20}, None),
        ("test/nll", None, {"inside": [-3, 3]}, None),
    ],
)  # fmt: skip
def test_the_bound_of_a_share_is_a_fraction(tmp_path: Path, measure, share_of, bound, sentence) -> None:
    given = helps(measure=measure, share_of=share_of)
    study = load.load_study(write(tmp_path / "tiny", comparisons=given, supported=when(**bound)))
    with pytest.raises(KdError, match=sentence) if sentence else nullcontext():
        vocabulary.check(study)


@pytest.mark.parametrize("key", ["sesoi", "pilot"])
def test_the_effects_of_a_share_are_fractions(tmp_path: Path, key: str) -> None:
    study = load.load_study(write(tmp_path / "tiny", comparisons=helps(**{key: 5})))
    with pytest.raises(KdError, match=rf"comparisons: helps: {key} = 5 is not allowed: .* 0\.01 is one point"):
        vocabulary.check(study)
    vocabulary.check(load.load_study(write(tmp_path / "tiny", comparisons=helps(measure="test/errors", **{key: 5}))))


# ---------------------------------------------------------------------- what the design can show


def design(tmp_path: Path, **keys: Any) -> tuple[Study, dict[str, power.Design]]:
    more = {key: keys.pop(key) for key in ("seeds", "exploratory", "rows") if key in keys}
    study = load.load_study(write(tmp_path / "tiny", **{"exploratory": False, **more}, comparisons=helps(**keys)))
    return study, power.designs(study)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({}, "helps: it has no sesoi"),
        ({"sesoi": 0.01}, "helps: no pilot gives the spread, of which 5 seeds detect 1.68 times"),
        (
            {"sesoi": 0.01, "pilot": 0.01},
            "sesoi 1.00 points, detectable 1.68 points with 5 seeds of spread 1.00 points",
        ),
        ({"sesoi": 0.01, "pilot": 0.001, "seeds": [0]}, "helps: with one seed a row nothing is detectable"),
        ({"sesoi": 0.01, "pilot": 0.005}, None),
        ({"sesoi": 0.01, "pilot": 0.01, "seeds": list(range(12))}, None),
        ({"exploratory": True}, None),
    ],
)
def test_a_design_that_cannot_show_its_effect_is_refused(tmp_path: Path, keys, sentence) -> None:
    study, found = design(tmp_path, **{"seeds": [0, 1, 2, 3, 4], **keys})
    if sentence is None:
        power.refuse_blind(study, found)
        return
    with pytest.raises(KdError, match=re.escape(sentence)) as caught:
        power.refuse_blind(study, found)
    assert str(caught.value).startswith(f"{tmp_path / 'tiny' / 'study.yaml'}: the design is not known to show")
    assert str(caught.value).endswith("or say exploratory: true")


def test_only_the_comparisons_of_conditions_must_be_detectable(tmp_path: Path) -> None:
    study = load.load_study(write(tmp_path / "tiny", exploratory=False, supported=None))
    power.refuse_blind(study, power.designs(study))


def test_a_row_of_one_seed_stands_beside_every_seed_of_the_design(tmp_path: Path) -> None:
    rows = {**ROWS, "alone": {**ROWS["alone"], "seeds": [0, 1, 2]}}
    assert design(tmp_path, rows=rows, seeds=[1, 2, 3])[1]["helps"].n == 2
    assert design(tmp_path, rows=rows, seeds=[1, 2, 3], share_of="teacher")[1]["helps"].n == 2
    assert design(tmp_path, rows=rows, than="teacher", seeds=[1, 2, 3])[1]["helps"].n == 3


def test_results_that_are_there_give_the_spread(tmp_path: Path) -> None:
    """They win over the pilot, and a measure that they lack leaves the pilot."""
    study, _ = design(tmp_path, sesoi=0.01, pilot=0.5)
    measured = {("alone", 0): 0.90, ("alone", 1): 0.91, ("T4", 0): 0.95, ("T4", 1): 0.92}
    lines = [
        {"row": row, "seed": seed, "status": "finished", "last/test/acc1": accuracy}
        for (row, seed), accuracy in measured.items()
    ]
    found = power.designs(study, frame.table(lines))["helps"]
    assert found.spread == pytest.approx(np.std([0.05, 0.01], ddof=1))
    study, _ = design(tmp_path, sesoi=0.01, pilot=0.5, measure="test/nll")
    assert power.designs(study, frame.table(lines))["helps"].spread == 0.5


def test_the_table_of_what_the_design_can_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    power.show(*design(tmp_path, sesoi=0.02, pilot=0.01, seeds=[0, 1, 2, 3, 4]))
    said = capsys.readouterr().out
    assert "tiny: what the design can show" in said
    line = next(line for line in said.splitlines() if line.startswith("│ helps"))
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells == ["helps", "2.00 points", "1.00 points", "–", "5", "1.68 points", "yes"]
    assert "two-sided paired t-test at 5 %, power 80 %" in said
    power.show(*design(tmp_path, seeds=[0, 1, 2, 3, 4], exploratory=True))
    said = capsys.readouterr().out
    assert "1.68 ×" in said
    assert "(exploratory)" in said


# ---------------------------------------------------------------------- planned


def test_rows_come_with_the_runs_that_they_read(tmp_path: Path) -> None:
    study = load.load_study(write(tmp_path / "tiny"))
    jobs = plan(study, tmp_path, ["T*"], None, ["recipe.epochs=1"])
    assert names(jobs) == ["teacher/seed0", "T1/seed0", "T1/seed1", "T4/seed0", "T4/seed1"]
    assert jobs[2].after == ("teacher/seed0",)
    assert jobs[2].overrides[0] == "seed=1"
    assert jobs[2].overrides[-2:] == ("recipe.epochs=1", "name=T1")
    assert f"teacher.checkpoint='{tmp_path}/teacher/seed0'" in jobs[2].overrides


def test_seeds_choose_among_those_of_a_row_that_fixes_them(tmp_path: Path) -> None:
    study = load.load_study(write(tmp_path / "tiny"), seeds=[1])
    assert names(plan(study, tmp_path, [], [1], [])) == ["alone/seed1", "teacher/seed0", "T1/seed1", "T4/seed1"]
    with pytest.raises(KdError, match="no row has the seeds 1"):
        plan(study, tmp_path, ["teacher"], [1], [])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the name of one study, given: none"),
        (["a", "b"], "given: a, b"),
        (["nowhere"], "there is no study nowhere"),
        (["a", "--sed", "1"], "--sed is not understood"),
        (["a", "--seeds", "1-"], "--seeds 1- is not understood"),
        (["a", "--seeds"], "--seeds: expected one argument"),
    ],
)
def test_arguments_that_are_not_understood(arguments: list[str], sentence: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KdError, match=sentence):
        verb.main(arguments)


def test_ranges_of_seeds() -> None:
    assert verb._numbers("0,3,5-7") == [0, 3, 5, 6, 7]
    assert verb._numbers(None) is None


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--help"]) == 0
    assert "--dry-run" in capsys.readouterr().out


# ---------------------------------------------------------------------- the bias


def test_the_bias_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for classes in ([3], [7, 8]):
        logits, target = rng.normal(size=(400, 10)), rng.integers(0, 10, 400)
        logits[np.arange(400), target] += 1.5
        logits[:, classes] -= 4

        def right(bias: float, logits=logits, target=target, classes=classes) -> float:
            moved = logits.copy()
            moved[:, classes] += bias
            return float((moved.argmax(1) == target).mean())

        found = best_bias(logits, target, classes)
        assert 2 < found < 6
        assert right(found) == max(right(b) for b in np.linspace(-10, 10, 4001))
        assert right(found) > right(0) + 0.02


def test_a_bias_of_all_classes_is_refused() -> None:
    with pytest.raises(KdError, match="some of the 3 classes, not all"):
        best_bias(np.zeros((2, 3)), np.zeros(2), [0, 1, 2])


# ---------------------------------------------------------------------- run


def kd(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KD_RUNS": str(folder / "runs"), "WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "kd.cli.main", "study", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def inside(kd: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """As the function ``kd`` in this process, for what trains nothing; ``inside("study", …)`` has code, out and err."""
    monkeypatch.setenv("KD_RUNS", str(tmp_path / "runs"))
    return kd


def test_a_study_from_nothing_to_its_report(
    tmp_path: Path, inside: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {**ROWS, "T{temperature}": {**ROWS["T{temperature}"], "grid": {"temperature": [4]}}}
    looks = {
        "seen": {"eval": ["data.eval_batch_size=8"], "rows": ["alone"]},
        "fixed": {"bias": [3], "rows": ["teacher"]},
    }
    folder = write(tmp_path / "experiments" / "tiny", rows=few, evaluations=looks, exploratory=False)
    runs = tmp_path / "runs" / "study_tiny"

    sentence = "the design is not known to show the smallest effect of interest"
    planned = kd(tmp_path, "tiny", "--dry-run")
    assert planned.returncode == 1
    assert sentence in planned.stderr
    assert "tiny: what the design can show\n" in planned.stdout
    assert "tiny: 5 of 5 runs are missing" in planned.stdout
    assert "ms each" in planned.stdout
    assert not runs.exists()
    refused = inside("study", "tiny")
    assert (refused.code, refused.out) == (1, "")
    assert sentence in refused.err
    assert not runs.exists()

    write(folder, rows=few, evaluations=looks)
    part = kd(tmp_path, "tiny", "--only", "T4", "--seeds", "0")
    assert part.returncode == 0, part.stderr
    assert "2 runs in" in part.stdout
    assert (runs / "results.csv").is_file()
    assert not (folder / "results.csv").exists()

    whole = kd(tmp_path, "tiny", "logger=[wandb]")
    assert whole.returncode == 0, whole.stderr
    assert f"study tiny: 5 runs in {runs}: 2 finished, 3 to run" in whole.stdout
    # alone, whose teacher was there, and then T4 of seed 1
    assert re.findall(r"^  (./.)  (.*): val/acc1", whole.stdout, re.MULTILINE)[2] == ("3/3", "T4 seed=1")
    assert "T4 seed=0" not in whole.stdout
    assert "It helps." in whole.stdout
    assert (runs / "report.html").is_file()
    assert list((runs / "wandb").glob("offline-run-*")), "the report is a W&B run as well"
    text = (folder / "results.csv").read_text().splitlines()
    assert len(text) == 1 + 5
    head = text[0].split(",")
    assert {"schema", "study", "row", "seed", "seen/acc1", "fixed/bias", "fixed/class_3"} <= set(head)
    made = json.loads((runs / "teacher/seed0/evaluations.json").read_text())
    assert set(made) == {"fixed"}  # "seen" is of the row alone

    before = (runs / "T4/seed1/result.json").stat().st_mtime_ns
    again = kd(tmp_path, "tiny")
    assert again.returncode == 0, again.stderr
    assert "/1" not in again.stdout
    assert (runs / "T4/seed1/result.json").stat().st_mtime_ns == before
    assert (folder / "results.csv").read_text().splitlines() == text

    monkeypatch.delenv("KD_RUNS")  # from results.csv
    reported = inside("report", "tiny", "out=page")
    assert reported.code == 0, reported.err
    monkeypatch.setenv("KD_RUNS", str(tmp_path / "runs"))

    # what must not be overwritten
    corrupt = runs / "T4/seed1/result.json"
    good = corrupt.read_bytes()
    for content, sentence in ((b"{", "not valid JSON"), (b'{"schema": 99}', "newer version of kd")):
        corrupt.write_bytes(content)
        refused = inside("study", "tiny")
        assert refused.code == 1
        assert sentence in refused.err
        assert len(refused.err.splitlines()) == 1
        assert corrupt.read_bytes() == content
    corrupt.write_bytes(good)

    other = write(tmp_path / "experiments" / "other", claim=None, supported=None)
    refused = inside("study", "other", f"hydra.sweep.dir={runs}")
    assert refused.code == 1
    assert "belongs to the study tiny, not to the study other" in refused.err
    assert not (other / "results.csv").exists()

    (other / "results.csv").write_text("\n".join(text) + "\n")
    refused = inside("study", "other")
    assert refused.code == 1
    assert "holds the results of the study tiny, not of other" in refused.err
    assert not (tmp_path / "runs" / "study_other").exists()


def test_a_row_that_fails_stops_those_that_read_it_alone(tmp_path: Path) -> None:
    rows = {**ROWS, "teacher": {"overrides": ["recipe.optimizer.lr=1e30"], "seeds": [0]}}
    write(tmp_path / "experiments" / "tiny", rows=rows, evaluations=None)
    done = kd(tmp_path, "tiny")
    assert done.returncode == 1
    assert "5 of 7 jobs have no result" in done.stderr
    assert "kd: teacher seed=0: failed: the answer of the student" in done.stderr
    assert "kd: T4 seed=1: missing: not started: teacher seed=0 did not finish" in done.stderr
    assert re.search(
        r"alone seed=1: val/acc1 0\.\d{4}  test top-1 \d+\.\d\d % \(epoch \d, which val selected", done.stdout
    )
    assert done.stdout.count("teacher seed=0: failed") == done.stderr.count("teacher seed=0: failed") == 1
    assert not (tmp_path / "experiments" / "tiny" / "results.csv").exists()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["loss=[ce,kd]"], "alone/seed0: loss.kd needs a teacher"),
        (["loss=[ce,kd]", "teacher.checkpoint=nowhere"], "teacher.checkpoint = nowhere does not exist"),
    ],
)
def test_a_row_that_cannot_be_built_starts_nothing(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    rows = {"teacher": {}, "alone": {"overrides": overrides}}
    write(tmp_path / "experiments" / "tiny", rows=rows, evaluations=None, comparisons=None, supported=None)
    done = kd(tmp_path, "tiny")
    assert done.returncode == 1
    assert sentence in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("argument", ["seed=1", "name=x", "recipe.epochs=1,2"])
def test_what_the_study_sets_is_not_given(argument: str) -> None:
    with pytest.raises(KdError, match=argument):
        _refuse_swept(["recipe.epochs=1", argument])


def test_other_recipes_and_changed_rows_do_not_reach_the_kept_results(tmp_path: Path) -> None:
    rows = {"a": {"overrides": ["student.model.hidden=[8]"]}, "b": {"overrides": ["student.model.hidden=[4]"]}}
    plain = {"evaluations": None, "comparisons": None, "claim": None, "supported": None, "seeds": [0]}
    folder = write(tmp_path / "experiments" / "tiny", rows=rows, **plain)
    other = kd(tmp_path, "tiny", "recipe.epochs=1", "paths.runs=elsewhere")
    assert other.returncode == 0, other.stderr
    assert (tmp_path / "elsewhere" / "study_tiny" / "results.csv").is_file()
    assert not (folder / "results.csv").exists()

    assert kd(tmp_path, "tiny", "--only", "a").returncode == 0
    write(folder, rows={**rows, "a": {"overrides": ["student.model.hidden=[16]"]}}, **plain)
    refused = kd(tmp_path, "tiny", "--only", "b")
    assert refused.returncode == 1
    assert "a/seed0 holds a run of another configuration" in refused.stderr
    assert not (tmp_path / "runs" / "study_tiny" / "b").exists()


def test_a_study_of_the_package_leaves_its_results_in_the_working_directory(tmp_path, inside, monkeypatch) -> None:
    plain = {"evaluations": None, "comparisons": None, "claim": None, "supported": None, "seeds": [0]}
    folder = write(tmp_path / "package" / "tiny", rows={"alone": {}}, **plain)
    monkeypatch.setattr(load, "SHIPPED", folder.parent)
    said = inside("study", "tiny")
    assert said.code == 0, said.err
    assert (tmp_path / "runs" / "study_tiny" / "results.csv").is_file()
    assert os.listdir(folder) == ["study.yaml"]
    assert f"from {tmp_path / 'runs' / 'study_tiny'}\n" in inside("report", "tiny").out


@pytest.mark.parametrize(
    ("argument", "same"),
    [
        ("recipe.epochs=3", False),  # of the second row alone: the first has it already
        ("data.split_seed=7", False),  # is in no hash
        ("hydra.launcher.n_jobs=2", True),
        ("hardware.threads=1", True),
    ],
)
def test_every_row_says_whether_the_study_is_still_itself(make_engine, tmp_path: Path, argument, same) -> None:
    rows = {"a": {"overrides": ["recipe.epochs=3"]}, "b": {"overrides": ["recipe.epochs=2"]}}
    study = load.load_study(
        write(tmp_path / "tiny", rows=rows, evaluations=None, comparisons=None, claim=None, supported=None)
    )
    engine = make_engine()
    jobs = plan(study, engine.directory, (), None, [argument])
    assert _same_experiments(study, engine, jobs, [argument]) is same


@pytest.mark.parametrize(
    ("evaluation", "sentence"),
    [
        (
            {"eval": ["data.test_shfit=1"]},
            r"evaluations: x \(row teacher\): data\.test_shfit=1: .* no key .*data\.test_shift",
        ),
        ({"eval": ["data.test_shift=-1"]}, r"evaluations: x: .*test_shift = -1 is not allowed"),
        ({"bias": [12]}, r"evaluations: x: bias = \[12\] is not allowed: some of the classes 0 to 9"),
    ],
)
def test_an_evaluation_that_cannot_work_is_refused_before_the_first_run(make_engine, tmp_path, evaluation, sentence):
    folder = write(tmp_path / "tiny", evaluations={"x": evaluation})
    study, engine = load.load_study(folder), make_engine()
    with pytest.raises(KdError, match=sentence):
        evaluations.check(study, engine, plan(study, engine.directory, (), None, ()))


def test_two_studies_of_one_name(tmp_path: Path) -> None:
    here, there = write(tmp_path / "here" / "tiny"), write(tmp_path / "there" / "tiny")
    assert not load.is_other_study(there, here), "checked out twice"
    write(there, question="Another?")
    assert load.is_other_study(there, here)
    assert not load.is_other_study(tmp_path / "gone" / "tiny", here), "moved"
