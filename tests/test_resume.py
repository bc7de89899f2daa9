"""What a run must find as it has left it: config, checkpoint, selected weights; one process in its directory."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from kd.config.compose import checked
from kd.distill.distiller import Distiller
from kd.errors import KdError
from kd.records import lock, record, state
from kd.records.weight_files import CHECKPOINT, LAST, SELECTED
from kd.run import finish, resume, train, trainer, weights

OVERRIDES = ["recipe.epochs=3", "protocol.val_every=1", "hardware=cpu", "hardware.threads=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``whole``, and ``stopped`` when its third epoch began."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("whole", "stopped"):
        (folder / name).mkdir()
    train.train(checked(OVERRIDES), folder / "whole", OVERRIDES)
    begin = Distiller.on_train_epoch_start

    def stop(self: Distiller) -> None:
        if self.current_epoch == 2:
            raise KeyboardInterrupt
        begin(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distiller, "on_train_epoch_start", stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(checked(OVERRIDES), folder / "stopped", OVERRIDES)
    return folder


@pytest.fixture
def stopped(runs: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run; the checkpoint is of its selected epoch."""
    run_dir = Path(shutil.copytree(runs / "stopped", tmp_path / "run"))
    best = torch.load(run_dir / CHECKPOINT)["callbacks"]["SelectedWeights"]
    assert (best["epoch"], epoch_of(run_dir / SELECTED)) == (1, 1)
    return run_dir


def epoch_of(file: Path) -> int:
    with safe_open(file, "pt") as handle:
        return json.loads(handle.metadata()["kd"])["epoch"]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("recipe.optimizer.lr", 0.5, "config_hash"),
        ("loss.ce.weight", 2.0, "config_hash"),
        ("seed", 7, "seed = 7, 0 in result.json"),
        ("data.split_seed", 7, "data_seeds"),
    ],
)
def test_an_edited_config_is_refused(stopped: Path, key: str, value: Any, said: str) -> None:
    config = record.read_config(stopped)
    *sections, last = key.split(".")
    node = config
    for section in sections:
        node = node[section]
    node[last] = value
    (stopped / "config.yaml").write_text(yaml.safe_dump(config))
    before = (stopped / "result.json").read_bytes()
    with pytest.raises(KdError, match=f"config.yaml was changed since the run began .{said}.* kd train KEY=VALUE"):
        train.resume(stopped)
    assert (stopped / "result.json").read_bytes() == before


def test_weights_that_are_gone_are_named_by_what_was_read(stopped: Path) -> None:
    config, before = record.read_config(stopped), record.read(stopped)
    config["teacher"]["checkpoint"] = [str(stopped.parent / "here"), str(stopped), "gone.safetensors"]
    (stopped.parent / "here").touch()
    known = {"teacher.checkpoint": [None, None, "b" * 12]}
    sentence = "teacher.checkpoint = gone.safetensors{} does not exist: put the weights that the run has read back at"
    for read, marked in ((known, r" .fingerprint bbbbbbbbbbbb."), ({}, "")):
        with pytest.raises(KdError, match=sentence.format(marked)):
            resume.check_config(stopped, config, {**before, "weights_read": read})


def test_what_does_not_change_the_result_may_be_edited(stopped: Path) -> None:
    config = record.read_config(stopped)
    config["hardware"]["timeout_s"], config["notes"] = 60, "on another machine"
    resume.check_config(stopped, config, record.read(stopped))


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_one_byte_of_the_checkpoint(stopped: Path, place: float) -> None:
    content = bytearray((stopped / CHECKPOINT).read_bytes())
    content[int(place * len(content))] ^= 1
    (stopped / CHECKPOINT).write_bytes(content)
    before = (stopped / "result.json").read_bytes()
    with pytest.raises(KdError, match=r"last.ckpt cannot be read: .* remove \S+run to train the run anew"):
        train.resume(stopped)
    assert (stopped / "result.json").read_bytes() == before


def test_no_byte_that_counts_can_be_flipped(tmp_path: Path) -> None:
    """Refused, or read as what was written; torch takes an entry with this bit in its attributes for a directory."""
    kept = {"a": torch.arange(30.0), "b": {"epoch": 5}}
    torch.save(kept, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    accepted = 0
    entries = whole.index(b"PK\1\2")
    for place in (*range(0, entries, 7), *range(entries, len(whole))):
        (tmp_path / "file").write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        if resume.intact(tmp_path / "file"):
            accepted += 1
            try:
                read = weights.read_pickle(tmp_path / "file")
            except KdError:
                continue
            assert torch.equal(read["a"], kept["a"]), place
            assert read["b"] == kept["b"], place
    assert resume.intact(tmp_path / "whole")
    assert accepted < len(whole)  # padding


@pytest.mark.parametrize("damage", ["gone", "another", "earlier"])
def test_selected_weights_that_the_checkpoint_has_are_written_again(runs: Path, stopped: Path, damage: str) -> None:
    """A kill between the two writes leaves the file of an earlier epoch; the same result comes."""
    if damage == "gone":
        (stopped / SELECTED).unlink()
    elif damage == "another":
        shutil.copy(runs / "whole" / LAST, stopped / SELECTED)
    else:
        state = {name: tensor + 1 for name, tensor in load_file(stopped / SELECTED).items()}
        weights.write(state, stopped / SELECTED, {"epoch": 0})
    resume.check_files(stopped)
    assert epoch_of(stopped / SELECTED) == 1
    found = torch.load(stopped / CHECKPOINT)["state_dict"]
    assert all(torch.equal(found[f"student.{k}"], v) for k, v in load_file(stopped / SELECTED).items())
    if damage == "earlier":
        assert train.resume(stopped)["status"] == "finished"
        for name in (SELECTED, LAST):
            a, b = load_file(runs / "whole" / name), load_file(stopped / name)
            assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("damage", "what"), [("gone", "is missing"), ("another", "holds other"), ("epoch", "holds")])
def test_selected_weights_of_an_earlier_epoch_must_be_there(stopped: Path, damage: str, what: str) -> None:
    """The checkpoint of epoch 2 says that the first epoch was the best."""
    kept = torch.load(stopped / CHECKPOINT)
    state = {name: tensor + 1 for name, tensor in load_file(stopped / SELECTED).items()}
    kept["callbacks"]["SelectedWeights"].update(epoch=0, digest=weights.digest(state))
    torch.save(kept, stopped / CHECKPOINT)
    weights.write(state, stopped / SELECTED, {"epoch": 0})
    assert resume.check_files(stopped).epochs == 2
    if damage == "gone":
        (stopped / SELECTED).unlink()
    elif damage == "another":
        weights.write({name: tensor + 1 for name, tensor in state.items()}, stopped / SELECTED, {"epoch": 0})
    else:
        weights.write(state, stopped / SELECTED, {"epoch": 1})
    with pytest.raises(KdError, match=rf"student.safetensors {what}.* selected epoch 1, .*remove \S+run"):
        train.resume(stopped)
    assert record.read(stopped)["status"] == "interrupted"


def test_a_checkpoint_from_before_digests(stopped: Path) -> None:
    kept = torch.load(stopped / CHECKPOINT)
    del kept["callbacks"]["SelectedWeights"]["digest"]
    torch.save(kept, stopped / CHECKPOINT)
    assert resume.check_files(stopped).epochs == 2
    weights.write(load_file(stopped / SELECTED), stopped / SELECTED, {"epoch": 0})
    with pytest.raises(KdError, match="holds other weights"):
        resume.check_files(stopped)


def test_selected_weights_that_are_replaced_while_the_run_trains(tmp_path: Path, monkeypatch) -> None:
    close = finish.close

    def replaced(config: Any, run_dir: Path, *rest: Any) -> Any:
        weights.write({k: v + 1 for k, v in load_file(run_dir / SELECTED).items()}, run_dir / SELECTED, {"epoch": 0})
        return close(config, run_dir, *rest)

    monkeypatch.setattr(finish, "close", replaced)
    overrides = ["recipe.epochs=1", "hardware=cpu"]
    with pytest.raises(KdError, match=r"student.safetensors was replaced while the run trained"):
        train.train(checked(overrides), tmp_path, overrides)


# ---------------------------------------------------------------------- one process in a directory


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run that is over at once."""
    monkeypatch.setattr(trainer, "fit", lambda *_: {"student": {}})
    monkeypatch.setattr(lock, "PATIENCE", 0.5)
    return ["hardware=cpu"]


@pytest.mark.skipif(not lock.QUERIED, reason="readers take the lock for a moment where it cannot be queried")
def test_a_reader_takes_nothing_that_a_run_could_trip_over(tmp_path: Path) -> None:
    """Three readers in a loop, and a starter that does not try twice."""
    file, over, seen = tmp_path / lock.RUN, threading.Event(), []
    file.touch()

    def read() -> None:
        while not over.is_set():
            seen.append(lock.busy(file))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(3000):
        with lock.held(file):
            pass
    with lock.held(file):
        assert lock.busy(file)
        with pytest.raises(BlockingIOError), lock.held(file):
            pass
    over.set()
    for reader in readers:
        reader.join()
    assert not lock.busy(file)
    assert {True, False} == set(seen)


def test_a_reader_does_not_keep_a_run_from_starting_where_it_takes_the_lock(
    tmp_path: Path, monkeypatch, short: list[str]
) -> None:
    """One that has the lock for a moment has it until the run has tried to take it."""
    flock, taken, tried = fcntl.flock, threading.Event(), threading.Event()

    def slow(handle: Any, operation: int) -> None:
        try:
            flock(handle, operation)
        except BlockingIOError:
            tried.set()
            raise
        if operation & fcntl.LOCK_SH:
            taken.set()
            tried.wait(10)

    (tmp_path / lock.RUN).touch()
    monkeypatch.setattr(lock, "QUERIED", False)
    monkeypatch.setattr(fcntl, "flock", slow)
    monkeypatch.setattr(lock, "PATIENCE", 10.0)
    reader = threading.Thread(target=state.busy, args=(tmp_path,))
    reader.start()
    assert taken.wait(10)
    assert train.train(checked(short), tmp_path, short)["status"] == "finished"
    reader.join()


def test_a_log_that_is_replaced_lets_no_second_process_in(tmp_path: Path, monkeypatch, short: list[str]) -> None:
    config = checked(short)

    def meddled(*_: Any) -> dict[str, Any]:
        (tmp_path / "train.log").rename(tmp_path / "elsewhere.log")
        (tmp_path / "train.log").touch()
        (tmp_path / "result.json").unlink()
        with pytest.raises(KdError, match="is in use: another process trains in it"):
            train.train(config, tmp_path, short)
        return {"student": {}}

    monkeypatch.setattr(trainer, "fit", meddled)
    assert train.train(config, tmp_path, short)["status"] == "finished"
    assert record.read(tmp_path)["status"] == "finished"


def test_a_lock_that_is_deleted_lets_no_second_process_in(tmp_path: Path, monkeypatch, short: list[str]) -> None:
    """As another process sees it: the record of this one's run, while it trains, with the number of a living one."""
    config, other = checked(short), subprocess.Popen(["sleep", "60"])

    def meddled(*_: Any) -> dict[str, Any]:
        (tmp_path / lock.RUN).unlink()
        about = record.read(tmp_path)
        assert about["process"] == lock.this_process()
        theirs = {**about["process"], "pid": other.pid, "began": lock._began(other.pid)}
        record.write(tmp_path, {**about, "process": theirs})
        with pytest.raises(KdError, match=f"is in use: process {other.pid} trains in it"):
            train.train(config, tmp_path, short)
        assert state.state_of(tmp_path).status == state.RUNNING
        for change in ({"began": theirs["began"] - 1}, {"host": "elsewhere"}, {"began": None}, {"pid": "x"}):
            assert not lock.alive({**theirs, **change})
        other.kill()
        while lock.alive(theirs):
            time.sleep(0.01)
        assert state.state_of(tmp_path).status == state.INTERRUPTED, "it waits to be reaped"
        other.wait()
        return {"student": {}}

    monkeypatch.setattr(trainer, "fit", meddled)
    assert "process" not in train.train(config, tmp_path, short)
    assert "process" not in record.read(tmp_path)
