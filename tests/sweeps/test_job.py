"""One job of many: left alone when finished, gone on with when interrupted, started anew when it failed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kd import record
from kd.app import checked
from kd.errors import KdError
from kd.sweeps import job
from kd.sweeps.job import work
from kd.sweeps.state import look

OVERRIDES = ["recipe.epochs=4", "protocol.val_every=1", "hardware=cpu", "hardware.threads=1"]


@pytest.fixture
def config() -> dict:
    return checked(OVERRIDES)


@pytest.fixture
def stop_at(monkeypatch):
    """``stop_at(2, ValueError)``: the run ends so when epoch 2 (the third) begins."""
    from kd.distiller import Distiller

    whole = Distiller.on_train_epoch_start

    def arm(epoch: int, error: type[BaseException]) -> None:
        def start(self) -> None:
            if self.current_epoch == epoch:
                raise error("as arranged")
            whole(self)

        monkeypatch.setattr(Distiller, "on_train_epoch_start", start)

    return arm


def test_interrupted_goes_on_failed_begins_again_finished_stays(config, stop_at, tmp_path, monkeypatch) -> None:
    for name in ("whole", "stopped", "failed"):
        (tmp_path / name).mkdir()
    assert work(config, tmp_path / "whole", OVERRIDES) == "finished"
    with monkeypatch.context():
        stop_at(2, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            work(config, tmp_path / "stopped", OVERRIDES)
        stop_at(2, ValueError)
        with pytest.raises(ValueError, match="as arranged"):
            work(config, tmp_path / "failed", OVERRIDES)
    monkeypatch.undo()
    assert [look(tmp_path / n).status for n in ("whole", "stopped", "failed")] == ["finished", "interrupted", "failed"]
    kept = (tmp_path / "whole" / "result.json").read_bytes()
    logs = {}
    for name in ("whole", "stopped", "failed"):
        before = (tmp_path / name / "train.log").read_text()
        assert work(config, tmp_path / name, OVERRIDES) == "finished"
        assert (tmp_path / name / "train.log").read_text().startswith(before)
        logs[name] = (tmp_path / name / "train.log").read_text().removeprefix(before)
    assert logs["whole"] == ""
    assert (tmp_path / "whole" / "result.json").read_bytes() == kept
    assert "epoch 3/4" in logs["stopped"]
    assert "epoch 2/4" not in logs["stopped"]
    assert "epoch 1/4" in logs["failed"]
    weights = [load_file(tmp_path / n / "student_last.safetensors") for n in ("whole", "stopped", "failed")]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][key], other[key]) for key in weights[0])


def test_without_a_checkpoint_an_interrupted_job_begins_again(config, stop_at, tmp_path, monkeypatch) -> None:
    stop_at(0, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        work(config, tmp_path, OVERRIDES)
    monkeypatch.undo()
    assert look(tmp_path).status == "interrupted"
    assert work(config, tmp_path, OVERRIDES) == "finished"


def test_another_configuration_is_refused(config, tmp_path) -> None:
    assert work(config, tmp_path, OVERRIDES) == "finished"
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(KdError, match=r"holds a run of another configuration \(recipe.epochs = 4 there and 8 here; "):
        work(checked([*OVERRIDES, "recipe.epochs=8"]), tmp_path, OVERRIDES)
    assert (tmp_path / "result.json").read_bytes() == before


def test_clearing_removes_the_record_last(tmp_path, monkeypatch) -> None:
    """A process that is killed while it clears must find the record again: without it the rest would be a mystery."""
    (tmp_path / "checkpoints").mkdir()
    for name in ("result.json", "student.safetensors", "config.yaml", "train.log", "zebra"):
        (tmp_path / name).touch()
    removed: list[str] = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self: removed.append(self.name) or unlink(self))
    job.clear(tmp_path)
    assert removed[-1] == "result.json"
    assert [f.name for f in tmp_path.iterdir()] == ["train.log"]


def test_a_record_is_left_where_there_is_none_and_never_replaced(tmp_path) -> None:
    job.leave_a_record(tmp_path / "a", ["seed=1"], "failed", "lost")
    found = record.read(tmp_path / "a")
    assert (found["status"], found["error"], found["overrides"], found["name"]) == ("failed", "lost", ["seed=1"], "a")
    record.write(tmp_path / "a", {**found, "status": "running", "seed": 7})
    job.leave_a_record(tmp_path / "a", ["seed=1"], "interrupted", "killed")
    assert (record.read(tmp_path / "a")["status"], record.read(tmp_path / "a")["seed"]) == ("interrupted", 7)
    job.leave_a_record(tmp_path / "a", ["seed=1"], "failed", "too late")
    assert record.read(tmp_path / "a")["error"] == "killed"
