"""What a run directory holds, and when it is another run's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from kd.config.compose import checked
from kd.errors import KdError
from kd.records import inputs, record, weight_files
from kd.records.state import FAILED, FINISHED, INTERRUPTED, PRUNED, refuse_another, state_of


def test_the_same_experiment_of_another_teacher_seed_is_another_run(tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / f"teacher{seed}").mkdir()
        content = {"schema": 1, "status": "finished", "config_hash": "a" * 12, "seed": seed}
        (tmp_path / f"teacher{seed}" / "result.json").write_text(json.dumps(content))
    configs = [checked(["loss=[ce,kd]", f"teacher.checkpoint={tmp_path}/teacher{seed}"]) for seed in (0, 1)]
    assert record.config_hash(configs[0]) == record.config_hash(configs[1])
    refuse_another(tmp_path / "run", configs[0], configs[0])
    with pytest.raises(KdError, match="holds a run of another configuration"):
        refuse_another(tmp_path / "run", configs[0], configs[1])


def test_where_answers_are_kept_is_no_part_of_the_experiment() -> None:
    kept = "_target_: kd.distill.cache.CachedAnswers"

    def hashed(inside: str, *more: str) -> str:
        return record.config_hash(checked(["loss=[ce,kd]", f"teacher.answers={{{inside}}}", *more]))

    network = "model@teacher=mlp_teacher"
    places = ("folder: elsewhere", "path: elsewhere", "verify: true", "folder: a, path: b, verify: true")
    assert {hashed(f"{kept}, {place}", network) for place in places} == {hashed(kept, network)}
    for other in ("k: 8", "what: logits", "temperatures: [2]", "shard_samples: 9"):
        assert hashed(f"{kept}, {other}", network) != hashed(kept, network)
    alone = [hashed(f"{kept}, path: {place}, folder: {place}") for place in "ab"]  # what lies there is the teacher
    assert alone[0] != alone[1]
    assert hashed(f"{kept}, path: a, verify: true") == alone[0]
    own = checked(["loss=[ce,kd]", network])  # whatever its options mean
    own["teacher"]["answers"] = {"_target_": "own.Answers", "path": "a"}
    assert record.config_hash(own) != record.config_hash(
        {**own, "teacher": {**own["teacher"], "answers": {"_target_": "own.Answers", "path": "b"}}}
    )


def test_a_teacher_that_never_began(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"schema": 1, "status": "failed"}')
    with pytest.raises(KdError, match="that run never began"):
        record.config_hash(checked(["loss=[ce,kd]", f"teacher.checkpoint={tmp_path}"]))


def trained(run_dir: Path, config: dict[str, Any], status: str = FINISHED, weights: bytes = b"weights") -> Path:
    """A run directory with what :func:`look` reads of it."""
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    (run_dir / weight_files.SELECTED).write_bytes(weights)
    about = {"schema": 1, "status": status, "seed": 0, "config_hash": record.config_hash(config)}
    record.write(run_dir, {**about, **inputs.read_by(config)})
    return run_dir


@pytest.mark.parametrize("status", [FINISHED, INTERRUPTED])
def test_a_teacher_replaced_at_its_path_is_another_one(tmp_path: Path, status: str) -> None:
    """The same experiment with the same seed, by other code or on another machine: the config cannot tell."""
    teacher = trained(tmp_path / "teacher", checked(["loss=[ce]"]))
    config = checked(["loss=[ce,kd]", f"teacher.checkpoint={teacher}"])
    student = trained(tmp_path / "student", config, status)
    assert state_of(student, config).status == status
    (teacher / weight_files.SELECTED).write_bytes(b"others")
    sentence = rf"student: teacher.checkpoint = {teacher} holds other weights than when the run began: remove that run"
    with pytest.raises(KdError, match=sentence):
        state_of(student, config)
    assert state_of(student).status == status
    (teacher / weight_files.SELECTED).write_bytes(b"weights")
    assert state_of(student, config).status == status
    (teacher / weight_files.SELECTED).unlink()
    assert state_of(student, config).status == status, "a finished teacher may be made small"


OWN = ["loss=[ce]", "+loss.own={_target_: own_term.Own, weight: 1}"]


@pytest.mark.slow
@pytest.mark.parametrize("status", [FINISHED, INTERRUPTED, PRUNED])
def test_a_run_by_other_code_of_ones_own_is_another_one(tmp_path: Path, monkeypatch, status: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    term = Path("own_term.py")
    term.write_text("class Own:\n    def __init__(self): ...\n    def forward(self): return 1.0\n")
    teacher = trained(tmp_path / "teacher", checked(OWN), status)
    reads = checked(["loss=[ce,kd]", f"teacher.checkpoint={teacher}"])
    student = trained(tmp_path / "student", reads, status)
    assert state_of(teacher, checked(OWN)).status == status
    term.write_text(term.read_text().replace("return 1.0", "return 0.01 * 1.0"))
    sentence = (
        r"teacher: _target_ = own_term.Own is other code than when the run began \(changed: own_term.py\): remove"
    )
    with pytest.raises(KdError, match=sentence):
        state_of(teacher, checked(OWN))
    assert state_of(student, reads).status == status, "it has read the same weights"
    found = record.read(teacher)
    record.write(teacher, {**found, "status": FAILED})
    assert state_of(teacher, checked(OWN)).status == FAILED, "it is started anew anyway"
    record.write(teacher, {key: value for key, value in found.items() if key != "code_read"})
    assert state_of(teacher, checked(OWN)).status == status, "of a record of before this is not known"


def test_a_teacher_that_is_gone_is_said_to_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = trained(tmp_path / "teacher", checked(["loss=[ce]"]))
    student = trained(tmp_path / "student", checked(["loss=[ce,kd]", "teacher.checkpoint=teacher"]))
    shutil.rmtree(teacher)
    gone = r"^teacher.checkpoint = teacher does not exist: whether \S+student is a run of it"
    with pytest.raises(KdError, match=gone):
        state_of(student, checked(["loss=[ce,kd]", "teacher.checkpoint=teacher"]))


def test_weights_are_known_by_their_tensors(tmp_path: Path) -> None:
    """What a file says of itself, such as the name of the data, is not what a student learns from."""

    def read(metadata: dict[str, str], value: float) -> Any:
        save_file({"a": torch.full((3,), value)}, tmp_path / weight_files.SELECTED, metadata=metadata)
        return weight_files.read_by({"student": {"checkpoint": None}, "teacher": {"checkpoint": str(tmp_path)}})

    assert read({"kd": "MNIST"}, 1.0) == read({"kd": "Fashion-MNIST", "seed": "1"}, 1.0) != read({"kd": "MNIST"}, 2.0)
