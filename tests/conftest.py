"""A quiet, offline environment, and the command line as a function."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.notebooks import Kernel

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    """The folder of reference cases."""
    return request.config.getoption("--golden")


@dataclass
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str


@pytest.fixture
def kd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """``kd("train", "seed=1")`` in an empty working directory; the answer has code, out and err."""
    from kd.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Said:
        capsys.readouterr()
        code = main(list(arguments))
        for handler in logging.getLogger().handlers[:]:  # Hydra leaves handlers that hold this test's streams
            if type(handler) is logging.StreamHandler:
                logging.getLogger().removeHandler(handler)
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a small digits teacher, trained once for all tests."""
    from kd.config.compose import checked
    from kd.run.train import train

    run_dir = tmp_path_factory.mktemp("teacher")
    overrides = ["model@student=mlp_teacher", "recipe.epochs=4", "hardware=cpu", "name=teacher"]
    train(checked(overrides), run_dir, overrides)
    return run_dir


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """The kernel that all notebooks of this worker run in, one after the other."""
    from tests.notebooks import Kernel

    started = Kernel(tmp_path_factory.getbasetemp())
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        yield started
    started.stop()
