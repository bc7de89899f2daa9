"""One run in two processes (gloo): equal to the same run in one, whoever starts them, and nothing left when it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kd import launch
from kd.app import checked
from kd.errors import KdError
from tests import ranks

ROOT = Path(__file__).parents[1]
SGD = ["recipe=sgd_cosine", "recipe.optimizer.lr=0.05"]
# 101 images in batches of 32: the last one has 5, on two processes 3 and 2; 719 test images
MLP = ["data.train_size=101", "recipe.batch_size=32", "recipe.epochs=2", "data.eval_batch_size=64", *SGD]
MAPS = ["data=fake", "data.shape=[1,8,8]", "data.num_classes=3", "data.train_images=85", "data.test_images=33"]
MAPS += ["recipe.epochs=2", "recipe.batch_size=32", "data.eval_batch_size=4", *SGD]
PLAIN = ["model@student=none", "student.model={_target_:tests.ranks.Plain}"]
MAPS += ["model@teacher=resnet8", "teacher.allow_random=true"]
TAPS = ["loss.at.student_taps=[stage1]", "loss.at.teacher_taps=[layer1]", "loss.hint.adapter=conv"]
TAPS += ["loss.hint.student_taps=[stage2]", "loss.hint.teacher_taps=[layer2]", "loss.at.weight=10"]


def cases(teacher_run: Path) -> dict[str, list[str]]:
    """Name → overrides; the same for one process and for two."""
    teacher = f"teacher.checkpoint={teacher_run}"
    few = [*MLP, teacher, "loss=[ce,kd]", "data.label_fraction=0.3", "protocol.keep_predictions=true"]
    maps = [*MAPS, *PLAIN, *TAPS, "loss=[ce,at,hint]", "loss.hint.weight=1", "recipe.gradient_clip=1"]
    return {
        "mlp": few,
        "maps": maps,
        "off": [*MAPS, *PLAIN, *TAPS, "loss=[at,hint]", "loss.hint.weight=0"],  # and nothing reaches the classifier
        "accumulated": [*MLP, teacher, "loss=[kd]", "recipe.accumulate=2"],
        "batch_norm": [*MAPS, "model@student=resnet8", "loss=[ce]"],
        "mlp_sharded": [*few, "hardware.strategy=fsdp"],
        "maps_sharded": [*maps, "hardware.strategy=fsdp"],
    }


def variables(rank: int, port: int, **more: str) -> dict[str, str]:
    """The environment of one of two processes."""
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    own = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": path}
    return {**os.environ, **{k: str(v) for k, v in known.items()}, **own, **more}


def free_port() -> int:
    return int(next(iter(launch._environments({}, 1)))["MASTER_PORT"])


def finish(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[str]:
    """What they printed; they are gone afterwards."""
    try:
        return [p.communicate(timeout=timeout)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()


def popen(command: list[str], cwd: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, teacher_run: Path) -> Path:
    """``1/NAME`` and ``2/NAME``: each case in one process (this one) and in two."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["hardware=cpu", "hardware.threads=1"]
    two = {name: [*common, *o, "hardware.devices=2"] for name, o in cases(teacher_run).items()}
    port, command = free_port(), [sys.executable, "-m", "tests.ranks", str(folder / "2"), json.dumps(two)]
    started = [popen(command, folder, variables(r, port, KD_WORKER="-1")) for r in range(2)]
    one = {n: [*common, *o] for n, o in cases(teacher_run).items() if not n.endswith("sharded")}
    from kd import build

    original = build.distiller
    try:
        ranks.run(folder / "1", one)
    finally:
        build.distiller = original
        said = finish(started)
    assert [p.returncode for p in started] == [0, 0], "\n".join(said)
    return folder


def outcome(run: Path) -> dict[str, Any]:
    return json.loads((run / "outcome.json").read_text())


def curves(run: Path) -> list[dict[str, float]]:
    header, *rows = (run / "metrics.csv").read_text().splitlines()
    return [{k: float(v) for k, v in zip(header.split(","), r.split(","), strict=True) if v} for r in rows]


@pytest.mark.parametrize("name", ["mlp", "maps", "off", "accumulated", "mlp_sharded", "maps_sharded"])
def test_two_processes_train_like_one(runs: Path, name: str) -> None:
    """Curves of training (windows and epochs) and validation, test metrics, weights; also when FSDP shards them."""
    one, two = runs / "1" / name.removesuffix("_sharded"), runs / "2" / name
    rows = curves(one), curves(two)
    assert len(rows[0]) == len(rows[1]) >= 4
    for a, b in zip(*rows, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    assert outcome(one)["student"]["last"]["test"] == pytest.approx(outcome(two)["student"]["last"]["test"], abs=1e-5)
    if "teacher" in outcome(one):
        for split in ("val", "test"):
            assert outcome(one)["teacher"][split] == pytest.approx(outcome(two)["teacher"][split], abs=1e-5)
    weights = load_file(one / "student_last.safetensors"), load_file(two / "student_last.safetensors")
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    assert (outcome(one)["processes"], outcome(two)["processes"]) == (1, 2)
