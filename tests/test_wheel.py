"""The wheel, built and installed offline into an environment of its own, works from any directory."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STUDY_FILES = {
    file.relative_to(ROOT).as_posix()
    for name in ("study.yaml", "published.yaml", "results.csv")
    for file in (ROOT / "experiments").glob(f"*/{name}")
}
CONF_FILES = {file.relative_to(ROOT).as_posix() for file in (ROOT / "conf").rglob("*.yaml")}


def shell(*command: str | Path, cwd: Path) -> str:
    """The standard output of a command that must succeed, with no PYTHONPATH in its environment."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_leftovers() -> set[Path]:
    return {path for name in ("build", "dist", "*.egg-info") for path in ROOT.glob(name)}


@dataclass
class Installed:
    """An environment that holds the wheel alone; ``elsewhere`` is an empty directory to run it from."""

    wheel: Path
    bin: Path
    site: Path
    elsewhere: Path


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build, install, and lend the environment the third-party packages of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    before = build_leftovers()
    shell(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=ROOT)
    assert build_leftovers() == before
    (wheel,) = folder.glob("kd-*.whl")

    home = folder / "env"
    venv.create(home, symlinks=os.name != "nt", with_pip=True)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    shell(scripts / "python", "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=folder)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(shell(scripts / "python", "-c", ask, cwd=folder).strip())
    # a .pth file adds folders to the end of sys.path, and .pth files inside of those (an editable kd) are not read
    lent = dict.fromkeys(sysconfig.get_path(scheme) for scheme in ("purelib", "platlib"))
    (site / "lent.pth").write_text("\n".join(lent) + "\n")

    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    return Installed(wheel, scripts, site, elsewhere)


def test_the_wheel_holds_every_conf_file_and_study(installed) -> None:
    names = set(ZipFile(installed.wheel).namelist())
    assert {f"kd/{file}" for file in CONF_FILES | STUDY_FILES} <= names
    assert not [n for n in names if n.startswith("kd/experiments/benchmarks/") or n.endswith(".png")]
    assert {"kd/report/report.html.j2", "kd/report/report.md.j2", "kd/sweeps/plugins.py"} <= names
    assert not [
        n for n in names if n.startswith(("tests/", "conf/", "experiments/", "hydra_plugins/")) or n.endswith(".pyc")
    ]


def test_the_package_and_its_configuration_are_the_installed_ones(installed) -> None:
    code = "import kd, kd.config.composition; print(kd.__file__); print(kd.config.composition.CONF)"
    file, conf = map(Path, shell(installed.bin / "python", "-c", code, cwd=installed.elsewhere).splitlines())
    assert file == installed.site / "kd" / "__init__.py"
    assert conf == installed.site / "kd" / "conf"


def test_the_command_helps_and_composes_from_another_directory(installed) -> None:
    assert "kd VERB" in shell(installed.bin / "kd", "--help", cwd=installed.elsewhere)
    printed = shell(installed.bin / "kd", "train", "--cfg", "job", "loss=[ce,kd]", cwd=installed.elsewhere)
    assert "_target_: kd.losses.logits.kd.KnowledgeDistillation" in printed
    assert "epochs: 30" in printed
    assert not list(installed.elsewhere.iterdir())


def test_a_sweep_from_another_directory(installed, tmp_path) -> None:
    tiny = ["data=fake", "data.train_images=64", "recipe.epochs=1", "hardware=cpu", f"hydra.sweep.dir={tmp_path}/sweep"]
    said = shell(installed.bin / "kd", "train", "-m", "seed=0,1", *tiny, cwd=installed.elsewhere)
    assert "2 jobs, best first" in said
    assert not list(installed.elsewhere.iterdir())


def test_a_study_of_the_package_from_another_directory(installed, tmp_path) -> None:
    """Found by its name, run there, and reported with the published numbers that the package holds."""
    shipped = sorted((installed.site / "kd" / "experiments").rglob("*"))
    code = "from kd.studies import load; print(*load.study_names())"
    names = shell(installed.bin / "python", "-c", code, cwd=installed.elsewhere).split()
    assert {"demo", "hinton_mnist"} <= set(names)
    said = shell(
        installed.bin / "kd", "study", "demo", "--only", "teacher", "--seeds", "0", "recipe.epochs=1", cwd=tmp_path
    )
    runs = tmp_path / "runs" / "study_demo"
    assert f"study demo: 1 run in {runs}: 0 finished, 1 to run" in said
    assert "99.33" in (runs / "report.md").read_text(encoding="utf-8")
    said = shell(installed.bin / "kd", "report", "hinton_mnist", "out=page", cwd=tmp_path)
    assert f"from {installed.site / 'kd' / 'experiments' / 'hinton_mnist' / 'results.csv'}" in said
    assert sorted((installed.site / "kd" / "experiments").rglob("*")) == shipped
    assert not list(installed.elsewhere.iterdir())
