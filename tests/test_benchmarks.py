"""The benchmarks of ``experiments/benchmarks`` run; what they measure is no test's business."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "experiments" / "benchmarks"


def test_a_training_step_is_compared_with_the_bare_loop(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(BENCHMARKS / "train_step.py"))["main"]
    sizes = main.__globals__["SIZES"]
    (name, (overrides, _)), *_ = sizes.items()
    sizes.clear()
    sizes[name] = (overrides, 3)
    main(["rounds=1"])
    lines = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(rf"{name} +(\S.*\S) +\d+\.\d\d ms +\d+\.\d\d × +[+-]\d+ µs a step", line) for line in lines]
    assert [match[1] for match in found if match] == [
        *("bare loop", "kd", "kd, networks as they stand", "usual Lightning set-up")
    ]


def test_a_step_on_text_is_compared_with_the_bare_loop() -> None:
    """Tiny, a process a contender; TRL's trainers take part where TRL is installed."""
    command = [
        sys.executable,
        str(BENCHMARKS / "text_step.py"),
        "all",
        "rounds=1",
        "steps=2",
        "vocabulary=64",
        "tokens=8",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    row = r"  (\S.*\S) +\d+\.\d ms +\d+\.\d\d × +-?\d+ MiB  loss (\d\.\d+)"
    found = dict(match.groups() for line in said if (match := re.fullmatch(row, line)))
    names = ["bare loop", "bare loop, memory kept", "transformers.Trainer", "kd", "kd, keep_memory=false"]
    assert [name for name in found if "TRL" not in name] == names
    assert any("TRL" in line for line in said)  # its figures, or that it is not there
    losses = [float(found[name]) for name in names]
    assert losses == pytest.approx([losses[0]] * len(names), rel=1e-4)  # the same work
