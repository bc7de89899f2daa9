"""Evaluations of several runs at once: each has a GPU of its own, or its share of the cores."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from kd.records.manifest import Job
from kd.records.state import FINISHED, State
from kd.report.run_row import read_evaluations
from kd.studies import load
from kd.studies.study import Evaluation
from kd.sweeps import evaluations, local
from kd.sweeps.outcome import Outcome


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``given(hardware, n_jobs)``: the GPUs and torch threads that each of four runs' evaluations got."""
    study = {"question": "?", "seeds": [0, 1, 2, 3], "rows": {"a": {}}, "evaluations": {"moved": {"eval": ["x=1"]}}}
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "study.yaml").write_text(yaml.safe_dump(study))

    def note(*_):
        import torch

        return {"gpu": int(os.environ.get("CUDA_VISIBLE_DEVICES", "-1")), "threads": torch.get_num_threads()}

    monkeypatch.setattr(evaluations, "evaluate", note)
    monkeypatch.setattr(local, "cores", lambda: 4)

    def complete(hardware: dict, **launcher) -> tuple[set[int], list[int]]:
        outcomes = []
        for seed in range(4):
            run_dir = tmp_path / "runs" / "a" / f"seed{seed}"
            run_dir.mkdir(parents=True)
            (run_dir / "config.yaml").write_text(yaml.safe_dump({"hardware": hardware}))
            outcomes.append(Outcome(Job(f"a/seed{seed}", "", ()), run_dir, State(FINISHED)))
        assert evaluations.complete(load.load_study(str(folder)), outcomes, SimpleNamespace(**launcher)) == []
        found = [read_evaluations(o.run_dir)["moved"]["metrics"] for o in outcomes]
        return {f["gpu"] for f in found}, [f["threads"] for f in found]  # which takes more of them is chance

    return complete


def test_each_has_a_gpu(given, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert given({"accelerator": "gpu", "devices": 2}, n_jobs="auto", jobs_per_gpu=1) == ({4, 6}, [2] * 4)


def test_on_the_cpu_they_share_the_cores(given, monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert given({"accelerator": "cpu", "devices": 2}, n_jobs=2, jobs_per_gpu=1) == ({-1}, [2] * 4)


def test_beside_a_cluster_they_run_one_after_another(given, monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert given({"accelerator": "cpu", "devices": 1}) == ({-1}, [4] * 4)


def test_the_bias_is_chosen_on_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class whose logit is 5.5 too low on both splits is found again; one that only test would gain from is not."""
    import torch

    target = np.random.default_rng(0).integers(0, 10, 500)
    logits = 5.0 * np.eye(10)[target]
    low = logits - 5.5 * np.eye(10)[3]
    answers = {"val": low, "test": low}

    def answer(config, split, weights_file, keep, run) -> dict:
        keep |= {"logits": [torch.as_tensor(answers[split])], "target": [torch.as_tensor(target)]}
        return {}

    monkeypatch.setattr(evaluations, "run_config", lambda run_dir, changed: {})
    monkeypatch.setattr(evaluations, "measure", answer)
    fixed = Evaluation("fixed", bias=(3,))
    found = evaluations.evaluate(tmp_path, fixed, "last")
    assert (found["class_3"], found["acc1"]) == (1.0, 1.0)
    answers["val"] = logits
    assert evaluations.evaluate(tmp_path, fixed, "last")["class_3"] == 0.0
