"""The option ``--golden DIR``, which method each file of it belongs to, and what is said of the rest.

A plugin, not part of conftest.py: pytest must know the option before it reads DIR.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASE = r"\d+|[-_][A-Za-z]?\d*"  # what may follow a method's name: kd2, kd_2, kd_T2, at-b; kd_logits is another method
# reference files that bear another name than the method of ours which they are cases of
OTHER_NAMES = {"fitnet": "hint", "kd_hard": "ce", "kd_deit_soft": "kd"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        metavar="DIR",
        default=Path(__file__).parent / "golden",
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


def cases(folder: Path) -> dict[str, str | None]:
    """The files of a folder, without the ending → the method of each."""
    import numpy as np

    found = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            found[path.stem] = method_of(path.stem, str(file["method"]) if "method" in file.files else None)
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name the files that belong to no method of the package, whenever the golden tests ran."""
    reports = (r for kind in ("passed", "failed", "error") for r in terminalreporter.stats.get(kind, ()))
    if not any("test_golden.py" in report.nodeid for report in reports):
        return
    folder = config.getoption("--golden")
    found = cases(folder)
    without = [name for name, method in found.items() if method is None]
    if without:
        terminalreporter.section(f"golden: {len(without)} of {len(found)} files of {folder} have no method yet")
        terminalreporter.write_line(", ".join(without))
