"""The option ``--golden DIR``. A plugin, not part of conftest.py: pytest must know the option before it reads DIR."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        metavar="DIR",
        default=Path(__file__).parent / "golden",
        help="folder of reference cases (kd.npz, kd_2.npz, at-b.npz, …) for tests/losses/test_golden.py",
    )
