"""One job of many: left alone when finished, gone on with when stopped, started anew when the run itself failed."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from kd.config.compose import checked
from kd.errors import KdError, MachineFailure, RunFailure
from kd.records import record
from kd.records.state import state_of
from kd.records.weight_files import CHECKPOINT
from kd.run import weights
from kd.sweeps import job
from kd.sweeps.job import work
from kd.tracking import wandb_run

OVERRIDES = ["recipe.epochs=4", "protocol.val_every=1", "hardware=cpu", "hardware.threads=1"]


@pytest.fixture
def config() -> dict:
    return checked(OVERRIDES)


@pytest.fixture
def stop_at(monkeypatch):
    """``stop_at(2, ValueError)``: the run ends so when epoch 2 (the third) begins; ``patch``: for how long."""
    from kd.distill.distiller import Distiller

    whole = Distiller.on_train_epoch_start

    def arm(epoch: int, error: Callable[[str], BaseException], patch: pytest.MonkeyPatch = monkeypatch) -> None:
        def start(self) -> None:
            if self.current_epoch == epoch:
                raise error("as arranged")
            whole(self)

        patch.setattr(Distiller, "on_train_epoch_start", start)

    return arm


@pytest.mark.slow
def test_stopped_goes_on_failed_begins_again_finished_stays(config, stop_at, tmp_path, monkeypatch) -> None:
    ends = {
        "whole": (None, "finished", None),
        "stopped": (KeyboardInterrupt, "interrupted", None),
        "full": (lambda _: OSError(errno.ENOSPC, "No space left", "x"), "failed", "machine"),
        "killed": (MachineFailure, "failed", "machine"),
        "broken": (ValueError, "failed", "unexpected"),
        "put right": (KdError, "failed", "input"),  # a folder that was not mounted, images that were changed
        "failed": (RunFailure, "failed", "run"),
    }
    for name, (error, *_) in ends.items():
        (tmp_path / name).mkdir()
        with monkeypatch.context() as patch:
            if error is None:
                assert work(config, tmp_path / name, OVERRIDES) == "finished"
                continue
            stop_at(2, error, patch)
            with pytest.raises((KeyboardInterrupt, Exception), match=r"as arranged|x: No space left|to go on"):
                work(config, tmp_path / name, OVERRIDES)
    for name, (_, status, failure) in ends.items():
        assert (state_of(tmp_path / name).status, record.read(tmp_path / name).get("failure")) == (status, failure)
    kept = (tmp_path / "whole" / "result.json").read_bytes()
    logs = {}
    for name in ends:
        before = (tmp_path / name / "train.log").read_text()
        assert work(config, tmp_path / name, OVERRIDES) == "finished"
        assert (tmp_path / name / "train.log").read_text().startswith(before)
        logs[name] = (tmp_path / name / "train.log").read_text().removeprefix(before)
    assert logs["whole"] == ""
    assert (tmp_path / "whole" / "result.json").read_bytes() == kept
    for name in ("stopped", "full", "killed", "broken", "put right"):
        assert "epoch 3/4" in logs[name]
        assert "epoch 2/4" not in logs[name]
    assert "epoch 1/4" in logs["failed"]
    assert not any("failure" in record.read(tmp_path / name) for name in ends)
    whole, *others = (load_file(tmp_path / n / "student_last.safetensors") for n in ends)
    for other in others:
        assert all(torch.equal(whole[key], other[key]) for key in whole)


def test_a_disk_that_is_full_while_the_weights_are_written(config, tmp_path, monkeypatch) -> None:
    """Of safetensors the sentence, and the file, with the weights of that epoch, from the checkpoint."""
    save_file, calls = weights.save_file, []

    def full(*arguments, **more) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(*arguments, **more)

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(KdError, match=r"student.safetensors cannot be written: .*No space left on device"):
        work(config, tmp_path, OVERRIDES)
    assert (state_of(tmp_path).status, record.read(tmp_path)["failure"]) == ("failed", "machine")
    before = (tmp_path / "train.log").read_text()
    assert work(config, tmp_path, OVERRIDES) == "finished"
    again = (tmp_path / "train.log").read_text().removeprefix(before)
    assert "student.safetensors of epoch 2 is written again, from the checkpoint" in again
    assert "epoch 2/4  " not in again


def test_a_job_that_cannot_go_on_says_why_and_keeps_all(config, stop_at, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(2, KeyboardInterrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            work(config, tmp_path, OVERRIDES)
    cut = (tmp_path / CHECKPOINT).read_bytes()[:3000]
    (tmp_path / CHECKPOINT).write_bytes(cut)
    for _ in range(2):
        with pytest.raises(KdError, match=r"last.ckpt cannot be read"):
            work(config, tmp_path, OVERRIDES)
        assert (state_of(tmp_path).status, "last.ckpt cannot be read" in state_of(tmp_path).reason) == (
            "interrupted",
            True,
        )
        assert (tmp_path / CHECKPOINT).read_bytes() == cut


def test_without_a_checkpoint_an_interrupted_job_begins_again(config, stop_at, tmp_path, monkeypatch) -> None:
    stop_at(0, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        work(config, tmp_path, OVERRIDES)
    monkeypatch.undo()
    assert state_of(tmp_path).status == "interrupted"
    assert work(config, tmp_path, OVERRIDES) == "finished"


def test_another_configuration_is_refused(config, tmp_path) -> None:
    assert work(config, tmp_path, OVERRIDES) == "finished"
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(KdError, match=r"holds a run of another configuration \(recipe.epochs = 4 there and 8 here; "):
        work(checked([*OVERRIDES, "recipe.epochs=8"]), tmp_path, OVERRIDES)
    assert (tmp_path / "result.json").read_bytes() == before


def test_clearing_removes_the_record_last_and_what_the_run_wrote_only(tmp_path, monkeypatch) -> None:
    """A process that is killed while it clears must find the record again: without it the rest would be a mystery."""
    (tmp_path / "checkpoints").mkdir()
    written = ["result.json", "student.safetensors", "config.yaml", "metrics.csv", "checkpoints/last.ckpt"]
    written += [".student.safetensors.tmp", ".result.json.77.tmp", "checkpoints/.last.ckpt.tmp"]
    for name in (*written, "train.log", "run.lock", "zebra"):
        (tmp_path / name).touch()
    removed: list[str] = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self: removed.append(self.name) or unlink(self))
    job.clear(tmp_path)
    assert removed[-1] == "result.json"
    assert sorted(removed) == sorted(Path(name).name for name in written)
    assert {f.name for f in tmp_path.iterdir()} == {"train.log", "run.lock", "zebra"}


def test_clearing_leaves_the_files_of_others(tmp_path) -> None:
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (run_dir / "checkpoints", run_dir / "notes", run_dir / "wandb" / "offline-run-1", elsewhere):
        folder.mkdir(parents=True)
    mine = ["checkpoints/best.ckpt", "notes/a.txt", "wandb/offline-run-1/run-x.wandb"]
    for file in (*(run_dir / name for name in mine), elsewhere / "result.json", elsewhere / "data"):
        file.write_text("mine")
    (run_dir / "metrics.csv").symlink_to(elsewhere / "data")
    (run_dir / "wandb_1").mkdir()
    (run_dir / "linked").symlink_to(elsewhere)
    record.write(run_dir, {"schema": 1, "status": "failed"})
    job.clear(run_dir)
    assert [(run_dir / name).read_text() for name in mine[:2]] == ["mine", "mine"]
    assert (run_dir / "wandb_2" / "offline-run-1" / "run-x.wandb").read_text() == "mine"  # the next one is a new run
    assert wandb_run.run_id(run_dir) != "x"
    assert {f.name for f in elsewhere.iterdir()} == {"result.json", "data"}
    assert not (run_dir / "result.json").exists()
    (run_dir / "checkpoints").rename(tmp_path / "scratch")
    (run_dir / "checkpoints").symlink_to(tmp_path / "scratch")
    (tmp_path / "scratch" / "last.ckpt").write_text("behind a link")
    with pytest.raises(KdError, match="checkpoints is a link, and nothing behind it is removed"):
        job.clear(run_dir)
    assert (tmp_path / "scratch" / "last.ckpt").exists()


def test_a_record_is_left_where_there_is_none_and_never_replaced(tmp_path) -> None:
    job.ensure_record(tmp_path / "a", ["seed=1"], "failed", "lost")
    found = record.read(tmp_path / "a")
    assert (found["status"], found["error"], found["overrides"], found["name"]) == ("failed", "lost", ["seed=1"], "a")
    record.write(tmp_path / "a", {**found, "status": "running", "seed": 7})
    job.ensure_record(tmp_path / "a", ["seed=1"], "interrupted", "killed")
    assert (record.read(tmp_path / "a")["status"], record.read(tmp_path / "a")["seed"]) == ("interrupted", 7)
    job.ensure_record(tmp_path / "a", ["seed=1"], "failed", "too late")
    assert record.read(tmp_path / "a")["error"] == "killed"
