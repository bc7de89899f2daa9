"""Imports go one way, and nothing heavy is imported where an answer must come at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kd"

# what each part may import of the package; everything below the verbs also leaves hydra and wandb alone
ALLOWED = {
    "losses": {"losses"},
    "models": {"models", "errors"},
    "data": {"data", "losses", "errors"},
    "tasks": {"tasks", "losses", "errors"},
    "taps": {"taps", "models", "errors"},
    "teacher": {"teacher", "taps", "losses", "errors"},
    "distributed": {"distributed", "errors"},
    "objective": {"objective", "distributed", "losses", "errors"},
    "bookkeeping": {"bookkeeping"},
    "weights": {"weights", "weight_files", "distributed", "durable", "errors"},
    "weight_files": {"record", "errors"},
    "sources": {"keys", "record", "signature"},
    "inputs": {"sources", "weight_files"},
    "measure": {"measure", "losses", "errors"},
    "evaluated": {"evaluated", "measure", "teacher", "losses", "distributed", "errors"},
    "distiller": {
        *(
            "distiller",
            "evaluated",
            "measure",
            "objective",
            "teacher",
            "taps",
            "tasks",
            "losses",
            "bookkeeping",
            "distributed",
        ),
        "errors",
    },
    "fits": {"fits", "distiller", "distributed", "errors"},
    "config": {"config", "keys", "values", "composition", "hardware", "errors"},
    "keys": {"schema", "signature", "composition", "timm_source", "errors"},
    "composition": {"signature"},
    "timm_source": {"signature"},
    "values": set(),
    "yaml_text": {"errors"},
    "schema": set(),
    "signature": {"signature", "errors"},
    "record": {"record", "durable", "yaml_text", "errors"},
    "durable": {"errors"},
    "lock": set(),
    "resume": {"record", "inputs", "sources", "weights", "weight_files", "errors"},
    "manifest": {"record", "errors"},
    "pruning": {"pruning", "manifest", "sweeps", "distributed"},  # of the sweeps the next one alone
    "sweeps/storage": {"record", "build", "errors"},
    "studies": {"studies", "yaml_text", "errors"},
    "report": {"report", "studies", "manifest", "record", "inputs", "sources", "weight_files", "errors"},
    "errors": set(),
}
COMPOSING = ("config", "schema", "composition", "keys")  # read what Hydra composed
NO_TORCH = (
    "config.py",
    "keys.py",
    "composition.py",
    "timm_source.py",
    "values.py",
    "yaml_text.py",
    "schema.py",
    "record.py",
    "durable.py",
    "lock.py",
    "resume.py",
    "signature.py",
    "errors.py",
    "cli.py",
    "explain.py",
    "app.py",
    "launch.py",
    "cluster.py",
    "hardware.py",
    "manifest.py",
    "weight_files.py",
    "sources.py",
    "inputs.py",
    "wandb_run.py",
    "wandb_sync.py",
)
REPORT = tuple(
    f"{part}/{file.name}" for part in ("report", "studies") for file in sorted((PACKAGE / part).glob("*.py"))
)


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(part: str) -> list[Path]:
    return sorted((PACKAGE / part).rglob("*.py")) if (PACKAGE / part).is_dir() else [PACKAGE / f"{part}.py"]


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_go_one_way(part: str) -> None:
    for path in files(part):
        parts = {name.split(".")[1] for name in imports(path) if name.startswith("kd.")}
        known = {p.stem for p in PACKAGE.iterdir()}
        assert parts & known <= ALLOWED[part], f"{path.name} imports {parts & known - ALLOWED[part]}"


@pytest.mark.parametrize("part", [p for p in ALLOWED if p not in COMPOSING])
def test_nothing_below_the_verbs_imports_hydra_or_wandb(part: str) -> None:
    for path in files(part):
        assert not {n.split(".")[0] for n in imports(path)} & {"hydra", "omegaconf", "wandb"}, path


def test_losses_import_torch_alone() -> None:
    for path in files("losses"):
        outside = {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names) - {"torch", "kd"}
        assert not outside, f"{path.name} imports {outside}"


@pytest.mark.parametrize("name", NO_TORCH + REPORT)
def test_no_torch_at_import(name: str) -> None:
    heavy = {"torch", "lightning", "torchvision", "timm", "transformers", "wandb", "torchmetrics"}
    assert not {n.split(".")[0] for n in imports(PACKAGE / name, top_level_only=True)} & heavy


def test_help_loads_neither_torch_nor_hydra() -> None:
    code = "import sys; from kd.cli.main import main; main(['--help']); print({'torch', 'hydra'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_composing_and_checking_loads_no_torch() -> None:
    code = "import sys; from kd.config.compose import checked; checked(['loss=[ce]']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_reporting_loads_no_torch() -> None:
    code = "import sys; import kd.cli.report, kd.report.curves; print({'torch', 'hydra'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
