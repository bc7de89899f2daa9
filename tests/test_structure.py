"""The rooms of ``kd/`` import one way, without circles, and nothing heavy where an answer must come at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kd"
GROUND = ("errors", "config", "records")  # imported by all rooms but losses; each of them imports those before it
# a room → the rooms directly below it; what is below those is below it as well
BELOW = {
    "cli": ("sweeps", "report", "deploy", "generate", "tracking"),
    "sweeps": ("run", "setups", "report", "tracking", "deploy"),
    "report": ("studies",),
    "studies": ("tasks",),  # of the tasks the descriptions of metrics, without torch
    "deploy": ("run", "report"),
    "generate": ("tasks", "data", "models"),
    "run": ("setups", "distill", "tracking", "parallel"),
    "setups": ("distill",),
    "distill": ("tasks", "data", "models", "parallel"),
    "tasks": ("losses",),
    "data": ("losses",),
    "models": ("losses",),
    "losses": (),
    "tracking": (),
    "parallel": (),
}
NO_TORCH = ("errors", "config", "records", "cli", "studies", "report", "parallel", "sweeps")
BUT_TORCH = {"kd.parallel.group"}  # what is done once torch is there
NO_TORCH_EITHER = ("kd.run.train", "kd.run.log", "kd.run.evaluate", "kd.run.resume", "kd.tracking.summary")
NO_TORCH_EITHER += ("kd.deploy.decision", "kd.deploy.sources", "kd.deploy.plan", "kd.deploy.cost_file")
NO_TORCH_EITHER += ("kd.deploy.page.write",)
NO_TORCH_EITHER += ("kd.tracking.wandb_run", "kd.tracking.wandb_sync", "kd.tracking.wandb_report")
HEAVY = {"torch", "lightning", "torchvision", "timm", "transformers", "wandb", "torchmetrics", "optuna"}
HYDRA = ("cli", "sweeps", "deploy", "run", "config")  # the rooms that may import hydra and omegaconf
WANDB = ("tracking",)
START_UP = "# start-up"  # on the line of every import of kd inside a function, with the reason where it is not torch
ENTRIES = 20


@dataclass(frozen=True)
class Import:
    """One import of ``kd``: from which module, of which, on which line; ``lazy``: inside a function."""

    module: str
    name: str
    line: str
    lazy: bool
    typing: bool

    def rooms(self) -> tuple[str, str]:
        """Whose it is, and of whom."""
        return room(self.module), room(self.name)


def room(module: str) -> str:
    """``kd.run.train`` is in the room ``run``; the package itself is ``kd``."""
    return module.split(".")[1] if "." in module else "kd"


def path_of(module: str) -> Path | None:
    """The file of a module of the package, if it is one."""
    place = PACKAGE.parent / module.replace(".", "/")
    found = [f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()]
    return found[0] if found else None


@cache
def modules() -> dict[str, Path]:
    """Every module of the package."""
    parts = {file.relative_to(PACKAGE.parent).with_suffix("").parts: file for file in sorted(PACKAGE.rglob("*.py"))}
    return {".".join(p).removesuffix(".__init__"): file for p, file in parts.items()}


@cache
def everything_imported(file: Path) -> list[tuple[int, str, bool, bool]]:
    """Line, dotted name, whether inside a function, whether for types only."""
    found = []
    tree = ast.parse(file.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(n) for f in functions for n in ast.walk(f)}
    ifs = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    typing = {id(n) for i in ifs for n in ast.walk(i)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.append((node.lineno, alias.name, id(node) in inside, id(node) in typing))
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{file}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                name = whole if node.module.split(".")[0] == "kd" and path_of(whole) else node.module
                found.append((node.lineno, name, id(node) in inside, id(node) in typing))
    return found


def imports_of_kd() -> list[Import]:
    """Every import of a module of the package by another one."""
    found = []
    for module, file in modules().items():
        lines = file.read_text().splitlines()
        for number, name, lazy, typing in everything_imported(file):
            if name.split(".")[0] == "kd" and name != module:
                found.append(Import(module, name, lines[number - 1], lazy, typing))
    return found


IMPORTS = imports_of_kd()


def allowed(name: str) -> set[str]:
    """The rooms that a room may import."""
    if name == "losses":
        return set()
    if name in GROUND:
        return set(GROUND[: GROUND.index(name)])
    if name == "kd":  # the Python API
        return {*BELOW, *GROUND}
    found = {*BELOW[name]}
    for lower in BELOW[name]:
        found |= allowed(lower)
    return found | ({"errors", "config"} if name == "parallel" else {*GROUND})


ROOMS = sorted({room(module) for module in modules()} - {"kd"})


def test_the_house_has_few_rooms() -> None:
    assert {*ROOMS} <= {*BELOW, *GROUND}
    assert len([p for p in PACKAGE.iterdir() if p.name != "__pycache__"]) <= ENTRIES


@pytest.mark.parametrize("name", ROOMS)
def test_imports_go_down(name: str) -> None:
    up = {f"{i.module} imports {i.name}" for i in IMPORTS if i.rooms()[0] == name}
    up -= {f"{i.module} imports {i.name}" for i in IMPORTS if i.rooms()[1] in {name, "kd", *allowed(name)}}
    assert not up
    assert name not in allowed(name)


def test_rooms_make_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for found in IMPORTS:
        here, there = found.rooms()
        if here != there and "kd" not in (here, there):
            graph.setdefault(here, set()).add(there)
    TopologicalSorter(graph).prepare()


def test_modules_make_no_circle_when_they_are_imported() -> None:
    graph: dict[str, set[str]] = {}
    for found in IMPORTS:
        if not found.lazy and not found.typing:
            graph.setdefault(found.module, set()).add(found.name)
    TopologicalSorter(graph).prepare()


def test_an_import_inside_a_function_says_that_it_keeps_start_up_light() -> None:
    silent = [f"{i.module}: {i.line.strip()}" for i in IMPORTS if i.lazy and START_UP not in i.line]
    assert not silent


@pytest.mark.parametrize("name", [r for r in ROOMS if r not in HYDRA])
def test_hydra_ends_at_the_run(name: str) -> None:
    for module, file in modules().items():
        if room(module) == name:
            found = {n.split(".")[0] for _, n, *_ in everything_imported(file)}
            assert not found & ({"hydra", "omegaconf"} | ({"wandb"} if name not in WANDB else set())), module


def test_wandb_is_imported_by_the_room_that_tracks() -> None:
    for module, file in modules().items():
        if room(module) not in WANDB:
            assert "wandb" not in {n.split(".")[0] for _, n, *_ in everything_imported(file)}, module


def test_losses_import_torch_alone() -> None:
    for module, file in modules().items():
        if room(module) == "losses":
            outside = {n.split(".")[0] for _, n, *_ in everything_imported(file)} - set(sys.stdlib_module_names)
            kernels = {"liger_kernel"} if module == "kd.losses.tokens._liger" else set()  # where it is installed
            assert outside <= {"torch", "kd", *kernels}, module


def light() -> list[str]:
    """The modules that promise to import no torch."""
    found = [m for m in modules() if room(m) in NO_TORCH and m not in BUT_TORCH]
    return [*found, *NO_TORCH_EITHER]


@pytest.mark.parametrize("module", light())
def test_no_torch_at_import(module: str) -> None:
    """Neither itself nor by what it imports of the package."""
    todo, seen = [module], set()
    while todo:
        name = todo.pop()
        file = modules().get(name)
        if file is None or name in seen:
            continue
        seen.add(name)
        for _, imported, lazy, typing in everything_imported(file):
            if lazy or typing:
                continue
            assert imported.split(".")[0] not in HEAVY, f"{name} imports {imported}"
            if imported.split(".")[0] == "kd":
                todo.append(imported)


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("from kd.cli.main import main; main(['--help'])", {"torch", "hydra"}),
        ("from kd.config.compose import checked; checked(['loss=[ce]'])", {"torch"}),
        ("import kd.cli.report, kd.report.curves", {"torch", "hydra"}),
        ("from kd.cli.main import main; main(['decide', '--help'])", {"torch", "hydra", "numpy"}),
        ("from kd.cli.main import main; main(['decide', 'examples=200'])", {"torch", "hydra"}),
        ("from kd.cli.main import main; main(['cost', 'machine_hour'])", {"torch", "hydra", "numpy"}),
        ("import kd.sweeps.plugins; kd.sweeps.plugins.register()", {"torch"}),
        ("import kd.cli.train, kd.cli.evaluate, kd.cli.study, kd.cli.wandb", {"torch", "wandb"}),
    ],
)
def test_start_up_is_light(code: str, heavy: set[str]) -> None:
    code = f"import sys; {code}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
