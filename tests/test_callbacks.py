"""A checkpoint is written whole, beside the one that it replaces."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from kd.app import checked
from kd.callbacks import WholeCheckpoints
from kd.train import train
from kd.weights import CHECKPOINT


def test_a_checkpoint_that_is_cut_short_leaves_the_one_before(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "checkpoints" / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"epoch": 1}, file)

    def cut_short(checkpoint, path) -> None:
        Path(path).write_bytes(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut_short)
        with pytest.raises(KeyboardInterrupt):
            WholeCheckpoints().save_checkpoint({"epoch": 2}, file)
    assert torch.load(file) == {"epoch": 1}
    WholeCheckpoints().save_checkpoint({"epoch": 3}, file)  # over what was left
    assert torch.load(file) == {"epoch": 3}
    assert list(file.parent.iterdir()) == [file]


def test_no_checkpoint_of_a_run_is_copied_from_another_disk(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a copy can be cut short")

    monkeypatch.setattr(shutil, "move", refuse)
    overrides = ["data=fake", "data.shape=[1,4,4]", "data.train_images=40", "recipe.epochs=2", "hardware=cpu"]
    train(checked(overrides), tmp_path, overrides)
    assert torch.load(tmp_path / CHECKPOINT)["epoch"] == 1
    assert [f.name for f in (tmp_path / CHECKPOINT).parent.iterdir()] == [CHECKPOINT.name]
