"""A job that is killed just before it puts a file in place goes on to the numbers that it would have had."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

SCRIPT = """
import functools, json, os, shutil, signal, sys
from pathlib import Path
from kd.config.compose import checked
from kd.sweeps.job import work
from kd.sweeps.pool import forked, preload

OVERRIDES = ["data=fake", "data.shape=[1,4,4]", "data.train_images=40", "data.test_images=16", "recipe.epochs=2"]
OVERRIDES += ["protocol.monitor=val/nll", "protocol.val_every=1"]
OVERRIDES += ["hardware=cpu", "hardware.threads=1", "protocol.keep_predictions=true"]

def job(run_dir, kill_at, slot):
    '''Train; SIGKILL before the write number kill_at below the run directory. Notes every write.'''
    seen = []
    def hook(event, arguments):
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event == "os.rename") or run_dir not in os.path.abspath(str(arguments[0])):
            return
        seen.append(os.path.basename(str(arguments[event == "os.rename"])))
        if len(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    run_dir = os.path.abspath(run_dir)
    os.makedirs(run_dir, exist_ok=True)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.addaudithook(hook)
    work(checked(OVERRIDES), Path(run_dir), OVERRIDES)
    Path(run_dir + ".json").write_text(json.dumps(seen))

preload()
print([code for _, code in forked([functools.partial(job, "whole", 0)], 1)])
seen = json.loads(Path("whole.json").read_text())
last = {name: len(seen) - seen[::-1].index(name) for name in KILLED_AT}
for kill_at in (None, 0):  # once to be killed, once to go on
    calls = [functools.partial(job, f"at_{name}", at if kill_at is None else 0) for name, at in last.items()]
    print([code for _, code in forked(calls, 2)], flush=True)
    for name in last if kill_at is None else ():
        shutil.copytree(f"at_{name}", f"left_{name}")
"""
KILLED_AT = [
    "student.safetensors",
    "last.ckpt",
    "student_last.safetensors",
    "metrics.csv",
    "predictions_test.npz",
    "result.json",
]


def timeless(value: Any) -> Any:
    return {k: timeless(v) for k, v in value.items() if k != "latency_ms"} if isinstance(value, dict) else value


def outcome(run_dir: Path) -> list[Any]:
    """Everything that a run leaves and no clock measured."""
    record = json.loads((run_dir / "result.json").read_text())
    with (run_dir / "metrics.csv").open() as file:
        curves = list(csv.reader(file))
    kept = [np.load(run_dir / f"predictions_{split}.npz")["logits"].tolist() for split in ("val", "test")]
    states = [load_file(run_dir / f"student{which}.safetensors") for which in ("", "_last")]
    weights = [{name: tensor.tolist() for name, tensor in state.items()} for state in states]
    return [timeless({k: record[k] for k in ("status", "error", "student", "data")}), curves, kept, weights]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    code = f"KILLED_AT = {KILLED_AT}\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    whole, killed, again = (set(json.loads(line)) for line in done.stdout.splitlines())
    assert (whole, killed, again) == ({0}, {-9}, {0})
    return folder


@pytest.mark.parametrize("name", KILLED_AT)
def test_the_selected_weights_are_those_of_the_checkpoint(runs: Path, name: str) -> None:
    """In the file, or else, where it could not be written any more, in the checkpoint itself."""
    assert json.loads((runs / "whole" / "result.json").read_text())["student"]["selected"]["epoch"] == 1
    left = runs / f"left_{name}"
    checkpoint = torch.load(left / "checkpoints" / "last.ckpt")
    best = checkpoint["callbacks"]["SelectedWeights"]["epoch"]
    with safe_open(left / "student.safetensors", "pt") as handle:
        there = json.loads(handle.metadata()["kd"])["epoch"]
    assert (there, best, checkpoint["epoch"]) in {
        "student.safetensors": [(0, 1, 1)],
        "last.ckpt": [(0, 0, 0)],
    }.get(name, [(1, 1, 1)])


@pytest.mark.parametrize("name", KILLED_AT)
def test_it_ends_as_if_nothing_had_happened(runs: Path, name: str) -> None:
    assert outcome(runs / f"at_{name}") == outcome(runs / "whole")
