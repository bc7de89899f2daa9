"""The option ``--golden DIR`` and a quiet, offline environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        metavar="DIR",
        default=Path(__file__).parent / "golden",
        help="folder of reference cases (kd.npz, kd_2.npz, at-b.npz, …) for tests/losses/test_golden.py",
    )


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    """The folder of reference cases."""
    return request.config.getoption("--golden")
