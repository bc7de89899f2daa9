"""``kd methods``, and that a new method is three files: nothing else knows of it, and everything finds it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kd.cli import methods

ROOT = Path(__file__).parents[1]
LOSS = '''"""Seventh: Nobody, A Method That Is Not One, NOWHERE 2031, arXiv 2101.00001."""

from __future__ import annotations

from torch import Tensor

from kd.losses.base import Batch, Output, Term

__all__ = ["seventh_loss"]


def seventh_loss(student_logits: Tensor, teacher_logits: Tensor, exponent: float = 1.0) -> Tensor:
    """Mean of |z_s − z_t|^``exponent``.

    The paper sums over the classes.
    """
    return (student_logits - teacher_logits).abs().pow(exponent).mean()


class Seventh(Term):
    """:func:`seventh_loss` of the logits."""

    def __init__(self, exponent: float = 1.0) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """The mean."""
        return seventh_loss(student.logits, teacher.logits, self.exponent)
'''
YAML = """# The seventh method (NOWHERE 2031). Never used
seventh:
  _target_: kd.losses.logits.seventh.Seventh
  weight: 0.5
  schedule: null
  exponent: 1.0
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the package and the golden test are made of."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("kd", "conf", "tests/golden", "tests/losses"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("pyproject.toml", "tests/conftest.py", "tests/golden_option.py"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=clean, capture_output=True, text=True)


def golden(folder: Path, name: str, **other: object) -> None:
    student, teacher = np.array([[1.0, 4.0], [2.0, 0.0]]), np.array([[0.0, 0.0], [0.0, 1.0]])
    case = {"student_logits": student, "teacher_logits": teacher, "exponent": 2.0}
    np.savez(folder / f"{name}.npz", **case, loss=22 / 4, grad_student_logits=(student - teacher) / 2, **other)


@pytest.mark.slow
def test_a_method_is_three_files(checkout: Path) -> None:
    (checkout / "kd" / "losses" / "logits" / "seventh.py").write_text(LOSS)
    (checkout / "conf" / "loss" / "seventh.yaml").write_text(YAML)
    golden(checkout / "tests" / "golden", "seventh", alt_loss__another=11.0, alt_factor__another=2.0)

    done = python(checkout, "-c", "from kd.losses.functional import seventh_loss; print(seventh_loss.__module__)")
    assert done.stdout == "kd.losses.logits.seventh\n", done.stderr

    table = python(checkout, "-m", "kd.cli.main", "methods").stdout.splitlines()
    line = next(line for line in table if line.startswith("seventh"))
    for part in ("The seventh method", "logits", "0.5", "yes", "Nobody, A Method That Is Not One, NOWHERE 2031"):
        assert part in line
    page = python(checkout, "-m", "kd.cli.main", "methods", "seventh").stdout
    formula, differences = page.index("Mean of |z_s − z_t|^exponent."), page.index("The paper sums over the classes.")
    assert formula < page.index("Paper and code") < differences < page.index("exponent: 1.0")

    run = ["-m", "pytest", "-p", "no:cacheprovider", "-rpf", "tests/losses/test_golden.py"]
    done = python(checkout, *run, "-k", "seventh")
    for test in ("test_function", "test_term", "test_alternatives"):
        assert f"PASSED tests/losses/test_golden.py::{test}[seventh]" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("spelling", [["--golden={}"], ["--golden", "{}"]])
def test_a_wrong_case_fails_and_a_file_of_no_method_is_named(tmp_path: Path, spelling: list[str]) -> None:
    """A number that is not ours, an alternative that nobody explains, a setting that no function takes."""
    whole = dict(np.load(ROOT / "tests" / "golden" / "kd.npz", allow_pickle=False))
    np.savez(tmp_path / "kd_2.npz", **{**whole, "loss": whole["loss"] * 1.001})
    np.savez(tmp_path / "kd_3.npz", **whole, alt_loss__nobody=whole["loss"])
    np.savez(tmp_path / "kd_4.npz", **whole, smoothing=0.1)
    np.savez(tmp_path / "unheard_of.npz", **whole)
    np.savez(tmp_path / "by_entry.npz", **whole, method="kd")
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-rpf", *(s.format(tmp_path) for s in spelling)]
    done = python(ROOT, *command, "tests/losses/test_golden.py", "-k", "kd or by_entry")
    failed = {line.split("::")[1].split(" ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert failed >= {"test_function[kd_2]", "test_term[kd_2]", "test_alternatives[kd_3]", "test_function[kd_4]"}
    assert not any("by_entry" in name or name in ("test_function[kd_3]", "test_term[kd_3]") for name in failed)
    assert "PASSED tests/losses/test_golden.py::test_function[by_entry]" in done.stdout
    assert "1 of 5 files" in done.stdout
    assert "\nunheard_of\n" in done.stdout
    assert "does not take ['smoothing']" in done.stdout


@pytest.mark.slow
def test_two_functions_of_one_name_are_an_error(checkout: Path) -> None:
    (checkout / "kd" / "losses" / "features" / "other.py").write_text(LOSS.replace("seventh_loss", "kl_divergence"))
    done = python(checkout, "-c", "import kd.losses.functional")
    assert "kd.losses.logits.kd both define kl_divergence" in done.stderr


def test_every_method_has_a_line_and_a_page(kd) -> None:
    said = kd("methods")
    names = [line.split()[0] for line in said.out.splitlines()[1:]]
    assert said.code == 0
    assert names == sorted(f.stem for f in (ROOT / "conf" / "loss").glob("*.yaml"))
    for name in names:
        page = kd("methods", name).out
        assert page.startswith(f"{name}: ")
        assert page.endswith((ROOT / "conf" / "loss" / f"{name}.yaml").read_text())
        assert "Paper and code" in page


def test_what_is_read_comes_from_the_source() -> None:
    read = {m.name: m.reads for m in methods.collect()}
    assert read["ce"] == "the student's logits, labels"
    assert read["kd"] == "logits"
    assert read["at"] == "features"
    assert read["cwtm"] == "logits, labels"


def test_what_a_term_inherits_and_what_it_looks_up_are_read(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "basis.py").write_text("from kd.losses.base import Term\nclass Basis(Term):\n    needs_labels = True\n")
    (tmp_path / "mine.py").write_text(
        "from basis import Basis\nclass Mine(Basis):\n    needs_teacher_logits = False\n"
        "    needs_views: tuple = ('strong',)\n    student_taps, over = ('1',), 'batch'\n"
        "    def forward(self, student, teacher, batch):\n        return self.bank[batch.index].sum()\n"
    )
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text("mine:\n  _target_: mine.Mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (mine,) = (m for m in methods.collect(str(tmp_path)) if m.name == "mine")
    assert mine.reads == "the student's logits, features, labels, view strong, index"
    assert (mine.weight, mine.paper, mine.what) == (1.0, "", "")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["hnit"], ["hnit", "(near: hint)"]),
        (["kd", "at"], ["at is not understood"]),
        (["--markdwon"], ["--markdwon is not understood"]),
        (["--config-dir", "nowhere"], ["--config-dir nowhere"]),
        (["--write", "nowhere.md"], ["--write nowhere.md", "<!-- kd methods"]),
    ],
)
def test_bad_input_is_one_sentence(kd, arguments: list[str], parts: list[str]) -> None:
    said = kd("methods", *arguments)
    assert said.code == 1
    assert len(said.err.splitlines()) == 1
    assert all(part in said.err for part in parts)


def test_the_table_is_written_between_its_marks(kd, tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(f"before\n{methods.MARKS[0]}old\n{methods.MARKS[1]}\nafter\n")
    for _ in range(2):
        assert kd("methods", "--write", str(file)).code == 0
        table = kd("methods", "--markdown").out
        assert file.read_text() == f"before\n{methods.MARKS[0]}\n{table}\n{methods.MARKS[1]}\nafter\n"


@pytest.mark.parametrize(
    ("citation", "year"),
    [("ICLR 2017, arXiv 1612.03928", "2017"), ("CVPR 2022, arXiv 2012.02911", "2022"), ("arXiv 2006.05525", "")],
)
def test_the_year_of_a_paper_is_not_its_number(citation: str, year: str) -> None:
    assert methods.year(citation) == year


def test_it_needs_neither_torch_nor_hydra() -> None:
    code = "import sys; from kd.cli.main import main; main(['methods', 'at']); print(); "
    code += "print({'torch', 'hydra', 'numpy'} & set(sys.modules))"
    assert python(ROOT, "-c", code).stdout.splitlines()[-1] == "set()"
