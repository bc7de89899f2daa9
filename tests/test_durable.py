"""Files that take their name when they are on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kd.errors import MachineFailure
from kd.records import record
from kd.records.durable import mark, replacing
from kd.run import finish, weights
from kd.run.callbacks import WholeCheckpoints


def answered() -> Any:
    """A module that has kept predictions."""
    return SimpleNamespace(predictions={name: [torch.zeros(2)] for name in ("index", "target", "logits")})


WRITERS: dict[str, Callable[[Path], Any]] = {
    "result.json": lambda file: record.write(file.parent, {"schema": 1, "status": "running"}),
    "student.safetensors": lambda file: weights.save(nn.Linear(1, 1), file, {}),
    "checkpoints/last.ckpt": lambda file: WholeCheckpoints().save_checkpoint({"epoch": 0}, file),
    "predictions_test.npz": lambda file: finish._save_predictions(file, answered()),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_and_its_name_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The content before the name is given, the directory after it; the content is whole when it is flushed."""
    file, done = tmp_path / name, []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append(("directory", path) if path.is_dir() else ("file", path.stat().st_size))
        fsync(descriptor)

    def replaced(old: Path, new: Path) -> None:
        done.append(("replace", Path(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", replaced)
    WRITERS[name](file)
    assert done == [("file", file.stat().st_size), ("replace", file), ("directory", file.parent)]
    assert list(file.parent.iterdir()) == [file]
    if file.suffix == ".npz":
        assert np.load(file)["logits"].shape == (2,)


def test_an_error_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")

    def fail(error: Exception) -> None:
        with replacing(file) as temporary:
            temporary.write_text("half")
            raise error

    for error, expected in ((OSError(28, "No space left on device"), MachineFailure), (ValueError("x"), ValueError)):
        with pytest.raises(expected) as failure:
            fail(error)
        assert [f.read_text() for f in tmp_path.iterdir()] == ["old"]
        if expected is MachineFailure:
            assert str(failure.value) == f"{file} cannot be written: No space left on device"
    with pytest.raises(MachineFailure, match=r"b.txt cannot be written: there is no directory \S+gone any more"):
        record.write_text(tmp_path / "gone" / "b.txt", "new")


def test_files_that_are_written_at_once_have_a_mark_each(tmp_path: Path) -> None:
    file, marks = tmp_path / "file", {mark() for _ in range(3)}
    with replacing(file, f".{mark()}") as first, replacing(file, f".{mark()}") as second:
        first.write_text("1")
        second.write_text("2")
    assert file.read_text() == "1"
    assert len(marks) == 3
    assert all(str(os.getpid()) in one for one in marks)
