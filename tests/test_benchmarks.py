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


BARE, OURS = ("bare loop", "bare loop, memory kept"), ("kd", "kd, keep_memory=false")
KEPT = ("kd, live teacher", "kd, top 64 kept", "kd, hidden states kept")  # of 64 tokens 64 are all


@pytest.mark.parametrize(
    ("case", "same"),
    [
        ("all", [(*BARE, "transformers.Trainer", *OURS)]),
        ("on_policy", [BARE, OURS]),  # each draws its own text
        ("classification", [(*BARE, "transformers.Trainer", *OURS)]),
        ("kept", [("kd, labels alone",), KEPT]),
    ],
)
def test_a_step_on_text_is_compared_with_the_bare_loop(case: str, same: list[tuple[str, ...]]) -> None:
    """Tiny, a process a contender; TRL's trainers take part where TRL is there. ``same``: who does the same work."""
    said = printed("text_step.py", case, "rounds=1", "steps=2", "vocabulary=64", "tokens=8")
    row = r"  (\S.*\S) +\d+\.\d ms +\d+\.\d\d × +-?\d+ MiB  loss (\d\.\d+)"
    found = dict(match.groups() for line in said if (match := re.fullmatch(row, line)))
    assert [name for name in found if "TRL" not in name] == [name for names in same for name in names]
    # its figures, or that it is not there
    assert any("TRL" in line for line in said) == (case in ("all", "on_policy"))
    for names in same:
        losses = [float(found[name]) for name in names]
        close = 1e-3 if case == "kept" else 1e-4  # kept answers are in half precision
        assert losses == pytest.approx([losses[0]] * len(names), rel=close)


def test_ways_to_a_loss_over_a_large_vocabulary_are_compared() -> None:
    said = printed("vocabulary.py", "V=4096", "rounds=1", "tokens=256")
    row = r" +4096 (\S.*\S) +-?\d+ MiB  1/ *-?\d+\.\d +\d+\.\d\d s +\d+\.\d\d ×(?: +loss off by (\S+))?"
    found = dict(match.groups() for line in said if (match := re.fullmatch(row, line)))
    assert found.pop("fused, top-64") is None  # another loss
    assert list(found) == ["naive", "checkpointed", "fused, 128 rows", "fused, 32 rows"]
    assert all(float(off) < 1e-5 for off in found.values())


def printed(script: str, *arguments: str) -> list[str]:
    """The lines that a benchmark prints."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
