"""The option ``--golden DIR``, what each file of it is checked by, and what is said of the rest.

A plugin, not part of conftest.py: pytest must know the option before it reads DIR.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
OWN = ROOT / "tests" / "golden"
CASE = r"\d+|[-_][A-Za-z]?\d*"  # what may follow a method's name: kd2, kd_2, kd_T2, at-b; kd_logits is another method
# reference files that bear another name than the method of ours which they are cases of
OTHER_NAMES = {"fitnet": "hint", "kd_hard": "hard_label", "kd_deit_soft": "kd"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        metavar="DIR",
        default=OWN,
        help="folder of reference cases (kd.npz, kd_2.npz, at-b.npz, …) for tests/losses/test_golden.py",
    )


def methods() -> dict[str, str]:
    """The method files of the package: name → module."""
    files = sorted(f for f in (ROOT / "kd" / "losses").glob("*/*.py") if not f.stem.startswith("_"))
    return {f.stem: f"kd.losses.{f.parent.name}.{f.stem}" for f in files}


def is_case(stem: str, name: str) -> bool:
    """Whether a file is one of this name, perhaps with a number or a letter behind it."""
    return re.fullmatch(f"{re.escape(name)}({CASE})?", stem) is not None


def method_of(stem: str, entry: str | None = None) -> str | None:
    """The method that a file is a case of, by its entry ``method`` or by its name; None if the package has none."""
    known = {**{method: method for method in methods()}, **OTHER_NAMES}
    own = methods()
    if entry is not None:
        return entry if entry in own else None
    names = [name for name in sorted(known, key=lambda n: (n not in own, n)) if is_case(stem, name)]
    return known[names[0]] if names else None


class Found(NamedTuple):
    """What a file is checked by: a method of the package, or a pattern of ``references``; or why it is left out."""

    method: str | None = None
    pattern: str | None = None
    left_out: str | None = None

    @property
    def checked(self) -> bool:
        """Whether the tests read it."""
        return self.left_out is None and (self.method is not None or self.pattern is not None)


def belongs(file: Path, entry: str | None = None, reference: str | None = None) -> Found:
    """What a file is checked by: its entry ``method``, the method of its name, or the closest pattern of references.

    ``reference``: the pattern that it names itself, in an entry of that name, where its method's functions do not take
    what is in it: weights of a network, say. In the folder of somebody else a pattern that is the very name of the file
    goes before the method of that name: it may be another method.
    """
    from tests.losses import references

    stem = file.stem
    method = method_of(stem, entry)
    if reference is not None and reference in references.functions():
        return Found(method, reference)
    if entry is not None:
        return Found(method)
    pattern = references.closest(stem)
    named = any(is_case(stem, name) for name in methods())
    if pattern is None or (named and (pattern != stem or file.parent.resolve() == OWN)):
        return Found(method)
    return Found(method, pattern, references.left_out().get(pattern))


def cases(folder: Path) -> dict[str, Found]:
    """The files of a folder, without the ending → what each is checked by."""
    import numpy as np

    found = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            said = [str(file[name]) if name in file.files else None for name in ("method", "reference")]
            found[path.stem] = belongs(path, *said)
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how many files were checked, whenever the golden tests ran, and name the others, with the reason."""
    reports = [r for kind in ("passed", "failed", "error") for r in terminalreporter.stats.get(kind, ())]
    ran = {found[1] for r in reports if (found := re.search(r"test_golden\.py::test_function\[(.+)\]$", r.nodeid))}
    if not any("test_golden.py" in report.nodeid for report in reports):
        return
    folder = config.getoption("--golden")
    found = cases(folder)
    terminalreporter.section(f"golden: {len(ran & found.keys())} of {len(found)} files checked")
    left_out = {name: of.left_out for name, of in found.items() if of.left_out is not None}
    if left_out:
        terminalreporter.section(f"golden: {len(left_out)} of {len(found)} files of {folder} are left out")
        for name, why in left_out.items():
            terminalreporter.write_line(f"{name}: {why}")
    without = [name for name, of in found.items() if not of.checked and of.left_out is None]
    if without:
        terminalreporter.section(f"golden: {len(without)} of {len(found)} files of {folder} have no method yet")
        terminalreporter.write_line(", ".join(without))
