"""The benchmarks of ``experiments/benchmarks`` run; what they measure is no test's business."""

from __future__ import annotations

import re
import runpy
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
