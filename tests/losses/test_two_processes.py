"""Every term that the package ships gives on two processes what it gives on one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.losses import two_ranks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """``1_0``, ``2_0``, ``2_1``: number of processes and process → what it found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.losses.two_ranks", str(folder)]
    environment = {**os.environ, **address}
    started = [subprocess.Popen([*command, str(rank), "2"], cwd=ROOT, env=environment) for rank in range(2)]
    two_ranks.run(folder, 0, 1)
    assert [process.wait(120) for process in started] == [0, 0]
    return {file.stem: torch.load(file) for file in folder.glob("*.pt")}


@pytest.mark.parametrize("name", two_ranks.names())
def test_a_term_gives_on_two_processes_what_it_gives_on_one(found: dict[str, Any], name: str) -> None:
    """Totals and gradients are means over the processes, as DDP makes them; what is kept is the same on all."""
    one, (first, second) = found["1_0"][name], (found[f"2_{rank}"][name] for rank in range(2))
    if one["draws"]:  # random numbers: the expectation is the same
        alone = torch.stack(one["draws"])
        together = (torch.stack(first["draws"]) + torch.stack(second["draws"])) / 2
        spread = (alone.var() / len(alone) + together.var() / len(together)).sqrt()
        assert (alone.mean() - together.mean()).abs() < 4 * spread
        return
    for alone, *parts in zip(one["steps"], first["steps"], second["steps"], strict=True):
        # the processes' shares of the batch are numbers of single precision
        torch.testing.assert_close(sum(p["total"] for p in parts) / 2, alone["total"], rtol=1e-6, atol=1e-9)
        for key, expected in alone["gradients"].items():
            mean = sum(p["gradients"][key] for p in parts) / 2
            small = 1e-8 * max(1.0, float(expected.abs().max()))  # where terms of that size cancel
            torch.testing.assert_close(mean, expected, rtol=1e-6, atol=small, msg=lambda m, k=key: f"{k}: {m}")
    for key, expected in one["buffers"].items():
        for part in (first, second):
            torch.testing.assert_close(part["buffers"][key], expected, rtol=1e-9, atol=1e-12)


def test_the_terms_are_compared_on_something(found: dict[str, Any]) -> None:
    """No term is zero on these tensors, and each has a gradient."""
    for name, term in found["1_0"].items():
        step = term["steps"][0]
        assert step["total"] != 0, name
        assert any((gradient != 0).any() for gradient in step["gradients"].values()), name
