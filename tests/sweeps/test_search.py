"""``kd search``: networks are measured before they are trained, those above a limit are not, and one is recommended."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from kd.config.compose import checked
from kd.deploy.candidates import ERROR, measure
from kd.errors import KdError
from kd.records import record
from kd.sweeps import architecture, limits, pool
from kd.sweeps.limits import Candidates, objective, recommended
from kd.sweeps.options import Settings, objectives
from kd.sweeps.space import space

pytestmark = pytest.mark.slow  # pages, figures, exports and processes take their time

DIGITS = 64  # pixels


def parameters(hidden: int, classes: int = 10) -> int:
    """Of an MLP of one hidden layer on digits."""
    return DIGITS * hidden + hidden + hidden * classes + classes


# ---------------------------------------------------------------------- what is measured


def test_networks_are_counted_and_timed_beside_the_teacher() -> None:
    teacher = ("model@teacher=mlp_teacher", "teacher.allow_random=true", "hardware=cpu")
    configs = {
        "small": checked(["student.model.hidden=[8]", *teacher]),
        "wrong": checked(["model@student=resnet8", "student.model.depth=9", *teacher]),
    }
    found = measure(configs, timed=True, batch_size=1, rounds=3)
    small = found["small"]
    assert small["parameters"] == parameters(8)
    assert small["macs"] == DIGITS * 8 + 8 * 10
    assert small["mb"] == pytest.approx(4e-6 * parameters(8), rel=0.1)  # beside it the normalisation
    assert 0 < small["latency_ratio"] < 5
    assert small["samples_per_second"] == pytest.approx(1000 / small["ms"])
    assert list(found["wrong"]) == [ERROR]
    assert "depth = 9 is not allowed" in found["wrong"][ERROR]
    assert "ms" not in measure({"small": configs["small"]}, timed=False, batch_size=1, rounds=3)["small"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say what one pass adds")
def test_memory_is_that_of_a_pass_and_not_of_the_weights_alone() -> None:
    """The first two layers hold input and output, 16 maps each, at once; weights are the same at both sizes."""
    sizes = (64, 128)
    configs = {
        str(edge): checked(["model@student=resnet8", "data=fake", f"data.shape=[3,{edge},{edge}]", "hardware=cpu"])
        for edge in sizes
    }
    found = measure(configs, timed=False, batch_size=1, rounds=3, memory=True)
    added = [found[str(edge)]["peak_mb"] - found[str(edge)]["mb"] for edge in sizes]
    for edge, beside in zip(sizes, added, strict=True):
        maps = 4e-6 * 16 * edge**2
        assert 2 * maps < beside < 20 * maps
    assert "peak_mb" not in measure({"64": configs["64"]}, timed=False, batch_size=1, rounds=3)["64"]


def test_a_network_that_takes_too_much_memory_is_above_the_limit(made) -> None:
    found = made({"peak_mb": 20})
    assert found.above({"a": config(16), "b": config(32)}) == {"b": "peak_mb 32.5 is above 20"}
    assert objective({"peak_mb": 20, "mb": 1}) == "peak_mb"


# ---------------------------------------------------------------------- limits


@pytest.fixture
def made(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Candidates whose networks are not measured but have so many parameters as their first hidden layer is wide."""
    asked: list[str] = []

    def instead(call: Any) -> dict[str, Any]:
        new = call.args[0]
        widths = {key: config["student"]["model"]["hidden"][0] for key, config in new.items()}
        asked.extend(map(str, widths.values()))
        numbers = {key: {"parameters": w, "macs": w, "samples_per_second": float(w)} for key, w in widths.items()}
        memory = call.args[4]
        numbers = {key: found | ({"peak_mb": found["macs"] + 0.5} if memory else {}) for key, found in numbers.items()}
        return {**numbers, **{key: {ERROR: "of no use"} for key, w in widths.items() if w == 3}}

    monkeypatch.setattr(pool, "run_in_subprocess", instead)
    monkeypatch.setattr(pool, "preload", lambda: None)

    def of(given: dict[str, float], prices: str | None = None) -> Candidates:
        return Candidates(tmp_path, given, prices, checked([]))

    of.asked = asked  # type: ignore[attr-defined]
    return of


def config(*widths: int, **changed: Any) -> dict[str, Any]:
    more = [f"{key}={value}" for key, value in changed.items()]
    return checked([f"student.model.hidden=[{','.join(map(str, widths))}]", *more])


def test_a_network_is_measured_once_whatever_its_recipe(made, tmp_path) -> None:
    found = made({"parameters": 20})
    some = {"a": config(16), "b": config(32), "c": config(16, seed=3), "d": config(32, **{"recipe.optimizer.lr": 0.5})}
    assert found.above(some) == {"b": "parameters 32 is above 20", "d": "parameters 32 is above 20"}
    assert made.asked == ["16", "32"]
    assert found.job(config(32)) == "b", "one stands for all of that network"
    assert found.job(config(16)) is None
    again = made({"parameters": 20})  # a search that goes on reads what was measured
    assert again.above({"e": config(32)}) == {"e": "parameters 32 is above 20"}
    assert made.asked == ["16", "32"]
    assert again.job(config(32)) == "b"
    assert (tmp_path / limits.FILE).is_file()


def test_no_network_within_the_limits_is_one_sentence_and_writes_nothing(made, tmp_path) -> None:
    with pytest.raises(KdError) as raised:
        made({"parameters": 5, "macs": 1}).survey([config(16), config(32), config(3)])
    assert str(raised.value) == (
        "no candidate is within parameters ≤ 5, macs ≤ 1: of 2 networks the smallest numbers are parameters 16, macs "
        "16; raise the limit, or search over smaller networks"
    )
    with pytest.raises(KdError, match="no candidate could be made: of no use"):
        made({"parameters": 5}).survey([config(3)])
    assert made({"parameters": 16}).survey([config(16), config(32)]) == "2 networks measured, 1 within parameters ≤ 16"
    assert list(tmp_path.iterdir()) == []


def test_money_a_month_follows_from_the_measured_speed(made) -> None:
    found = made({"cost_month": 1000.0}, "machine_hour")
    found.measure([config(16)])
    # 20 million images at 16 a second are 347.2 hours of 0.20, and 50 beside it
    assert found.of(config(16))["cost_month"] == pytest.approx(20e6 / 16 / 3600 * 0.20 + 50)
    assert made({"cost_month": 60.0}, "machine_hour").above({"a": config(16)})["a"].startswith("cost_month 119.4 is")


@pytest.mark.parametrize(
    ("given", "prices", "sentence"),
    [
        ({"parms": 1}, None, r"there is no limit parms \(near: .*\); limits: parameters, macs"),
        ({"ms": 0}, None, "hydra.sweeper.limits.ms = 0 is not allowed: it must be a finite number above 0"),
        ({"ms": "fast"}, None, "hydra.sweeper.limits.ms = fast is not allowed"),
        ([1], None, "it must be a mapping"),
        ({"cost_month": 5}, None, "cost_month and hydra.sweeper.cost go together"),
        ({"ms": 5}, "machine_hour", "go together"),
        ({"cost_month": 5}, "customer_service", "prices by the token"),
        ({"cost_month": 5}, "customer_servise", "near: customer_service"),
    ],
)
def test_limits_that_are_not_allowed(given: Any, prices: str | None, sentence: str) -> None:
    with pytest.raises(KdError, match=sentence):
        Settings(n_trials=1, limits=given, cost=prices)


def test_a_ratio_needs_a_teacher(tmp_path) -> None:
    with pytest.raises(KdError, match="latency_ratio needs a teacher"):
        Candidates(tmp_path, {"latency_ratio": 0.5}, None, checked([]))


def test_the_limited_cost_is_the_second_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"val/acc1": "maximize", "val/nll": "minimize", "parameters": "minimize"}
    of_limits = lambda base, limited: {**known, **dict.fromkeys(limited, "minimize")}  # noqa: E731
    monkeypatch.setattr("kd.sweeps.options._measures", of_limits)
    given = Settings(n_trials=1, limits={"parameters": 9, "latency_ratio": 0.5})
    assert objectives(given, checked([])) == {"val/acc1": "maximize", "latency_ratio": "minimize"}
    assert objectives(Settings(n_trials=1), checked([])) == {"val/acc1": "maximize"}
    assert objective({"mb": 1.0, "parameters": 2.0}) == "mb"


def test_the_cheapest_within_one_validation_row_is_recommended() -> None:
    found = [
        ("a", {"val/acc1": 0.95, "ms": 3.0}),
        ("b", {"val/acc1": 0.94, "ms": 1.0}),
        ("c", {"val/acc1": 0.9, "ms": 0.5}),
    ]
    assert recommended(found, {"val": 100}, share=True) == "b"
    assert recommended(found, {"val": 1000}, share=True) == "a"
    assert recommended(found, {"val": 10}, share=True) == "c"
    assert recommended(found, {"val": 10}, share=False) == "a"


# ---------------------------------------------------------------------- what is varied


def test_depth_width_and_recipe_are_varied_where_nothing_sets_them() -> None:
    found = architecture.axes(checked(["loss=[ce,kd]", "model@teacher=mlp_teacher", "teacher.allow_random=true"]), [])
    assert [line.partition("=")[0] for line in found] == [
        "student.model.hidden", "recipe.optimizer.lr", "loss.kd.temperature"
    ]  # fmt: skip
    assert found[1] == "recipe.optimizer.lr=tag(log,interval(0.002,0.05))"
    resnet = architecture.axes(checked(["model@student=resnet8"]), ["recipe.optimizer.lr=0.1"])
    assert [line.partition("=")[0] for line in resnet] == ["student.model.depth", "student.model.widths"]
    for line in (*found, *resnet):  # in the grammar of sweeps
        assert OverridesParser.create().parse_override(line).is_sweep_override()
    own = architecture.axes(checked([]), ["student.model.hidden=[4],[8]"])
    assert [line.partition("=")[0] for line in own] == ["recipe.optimizer.lr"]
    one = architecture.axes(checked(["student.model.dropout=0.5"]), ["student.model.dropout=0.5"])
    assert one[0].startswith("student.model.hidden="), "a value that is set varies nothing"
    with pytest.raises(KdError, match=r"sizes of kd.models.timm_model.timm_model .*model@student=NAME,NAME"):
        architecture.axes(checked(["model@student=timm"]), [])


def test_every_network_that_is_tried_can_be_made() -> None:
    for model in ("mlp", "resnet8", "wrn16_1"):
        lines = architecture.axes(checked([f"model@student={model}"]), ["recipe.optimizer.lr=1"])
        where = space(OverridesParser.create(), lines)
        ends = [where.overrides(params) for params in where.students(99)]
        configs = {str(o): checked([f"model@student={model}", "data=fake", *o]) for o in (ends[0], ends[-1])}
        for found in measure(configs, timed=False, batch_size=1, rounds=1).values():
            assert found["parameters"] > 0


def test_what_is_cut_from_a_teacher_follows_its_size(tmp_path) -> None:
    (tmp_path / "selected").mkdir()
    shape = {"num_hidden_layers": 6, "num_attention_heads": 12, "hidden_size": 384, "intermediate_size": 1536}
    (tmp_path / "selected" / "config.json").write_text(json.dumps(shape))
    given = {"student": {"model": None}, "teacher": {"checkpoint": str(tmp_path)}, "recipe": {}, "loss": {}}
    assert architecture.axes(given, []) == [
        "student.surgery.layers=2,3,4,6",
        "student.surgery.hidden=96,192,288,384",
        "student.surgery.intermediate=384,768,1152,1536",
    ]
    with pytest.raises(KdError, match=r"cannot read the size of teacher\.checkpoint = nowhere"):
        architecture.axes({**given, "teacher": {"checkpoint": "nowhere"}}, [])
    (tmp_path / "selected" / "config.json").write_text("{}")
    with pytest.raises(KdError, match="does not say how many layers"):
        architecture.axes(given, [])


def test_students_are_every_combination_of_their_axes() -> None:
    lines = ["student.model.depth=8,14", "+student.model.width=range(1,4)", "recipe.optimizer.lr=interval(0.1,1)"]
    found = space(OverridesParser.create(), lines).students(6)
    assert len(found) == 6
    assert {(p["student.model.depth"], p["+student.model.width"]) for p in found} == {
        (depth, width) for depth in ("8", "14") for width in (1, 2, 3)
    }
    assert {p["recipe.optimizer.lr"] for p in found} == {0.1}
    assert space(OverridesParser.create(), lines).students(5) == []
    assert space(OverridesParser.create(), ["student.model.dropout=interval(0,0.5)"]).students(50) == []


# ---------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["loss=[ce]"], "kd search needs a limit: --max-params"),
        (["--max-parms", "5"], r"--max-parms is not understood: .* \(near: --max-params"),
        (["--max-params", "5", "--trials", "0"], "--trials 0 is not allowed: it must be a whole number, 1 or more"),
        (["--max-params", "many"], "--max-params = many is not allowed: it must be a number above 0, such as"),
        (["--max-params"], "kd search does not understand this: .*expected one argument"),
        (["--max-ms", "3", "runs"], "runs is not understood"),
        (["--max-ms", "3", "student.model.hiden=[3]"], r"student.model.hiden .*\(near: hidden\)"),
        (["--max-ms", "3", "model@student=timm"], "sweep some of its keys yourself"),
        (["--max-ms", "3", "model@student=none"], "cannot read the size of teacher.checkpoint = None"),
    ],
)
def test_bad_arguments_are_one_sentence(kd, tmp_path, arguments: list[str], sentence: str) -> None:
    said = kd("search", *arguments)
    assert (said.code, said.out) == (1, "")
    assert re.search(sentence, said.err)
    assert len(said.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_search_on_digits(script, teacher_run, tmp_path) -> None:
    """Ended, gone on with, and hopeless: one process, as its children are forked from it before torch has threads."""
    common = [
        "hardware=cpu",
        f"teacher.checkpoint={teacher_run}",
        "loss=[ce,kd]",
        "recipe.epochs=1",
        "--max-params",
        "2.5k",
    ]
    shapes = "student.model.hidden=[4],[32],[64]"  # 310, 2,410 and 4,810 parameters
    commands = [
        [*common, shapes, "--trials", "3"],
        [*common, shapes, "--trials", "4"],
        [*common, "student.model.hidden=[64],[80]"],
    ]
    code = (
        "import contextlib, io, json, sys\n"
        "from kd.cli.main import main\n"
        "answers = []\n"
        "for command in json.load(sys.stdin):\n"
        "    text = io.StringIO()\n"
        "    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):\n"
        "        answers.append([main(['search', *command])])\n"
        "    answers[-1].append(text.getvalue())\n"
        "json.dump(answers, sys.stdout)\n"
    )
    process = script(code)
    out, err = process.communicate(json.dumps(commands), timeout=400)
    assert process.returncode == 0, err
    (first_code, first), (again_code, again), (hopeless_code, hopeless) = json.loads(out)
    assert first_code == again_code == 0, first + again
    (folder,) = (tmp_path / "runs").glob("search_*")  # the hopeless one has written nothing
    assert "3 networks measured, 2 within parameters ≤ 2,500" in first
    known = json.loads((folder / limits.FILE).read_text())
    assert sorted(found["parameters"] for found in known.values()) == [parameters(w) for w in (4, 32, 64)]
    records = {run.parent.name: record.read(run.parent) for run in folder.glob("trial-*/result.json")}
    finished = {name: found for name, found in records.items() if found["status"] == "finished"}
    above = [found for found in records.values() if found["status"] == "infeasible"]
    assert len(finished) == 4
    assert all(found["student"]["parameters"] <= 2500 and found["student"]["mb"] > 0 for found in finished.values())
    assert len(above) <= 1, "one trial stands for a network that is above a limit"
    assert all(found["error"] == f"parameters {parameters(64):,} is above 2,500" for found in above)
    assert re.findall(r"^  (./4)  .*val/acc1", again, re.MULTILINE) == ["4/4"], "the first three are kept"
    name = re.search(r"^recommended: (trial-\d+)  val/acc1 ([\d.]+)  parameters ([\d,]+)", again, re.MULTILINE)
    best = max(found["student"]["selected"]["val"]["acc1"] for found in finished.values())
    near = [f for f in finished.values() if f["student"]["selected"]["val"]["acc1"] >= best - 1 / 270 - 1e-9]
    assert finished[name[1]]["student"]["parameters"] == min(f["student"]["parameters"] for f in near)
    assert "Pareto front" in again
    assert hopeless_code == 1
    assert hopeless.splitlines()[-1].startswith(
        "kd: no candidate is within parameters ≤ 2,500: of 2 networks the smallest"
    )
