"""What a kill must not leave half written: the checkpoint and the curves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from kd.config.compose import checked
from kd.models.transformers_model import transformers_model
from kd.records import record
from kd.records.weight_files import CHECKPOINT
from kd.run import library_files, weights
from kd.run.callbacks import WholeCheckpoints
from kd.run.train import train
from kd.tracking.loggers import MetricsFile
from tests.tiny_language import LLAMA


def test_a_checkpoint_that_is_cut_short_leaves_the_one_before(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "checkpoints" / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"epoch": 1}, file)

    def cut_short(checkpoint, file) -> None:
        file.write(b"PK")
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


def test_a_new_column_does_not_empty_the_curves_first(tmp_path: Path, monkeypatch) -> None:
    logger = MetricsFile(tmp_path)
    for step in range(3):
        logger.log_metrics({"train/loss": 1.0 - step}, step=step)
    before = (tmp_path / "metrics.csv").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(record.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            logger.log_metrics({"test/acc1": 0.5}, step=3)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    MetricsFile(tmp_path, done=3).log_metrics({"test/acc1": 0.5}, step=3)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert rows == ["step,test/acc1,train/loss", "0,,1.0", "1,,0.0", "2,,-1.0", "3,0.5,"]


def test_a_colleague_may_read_the_weights(tmp_path: Path) -> None:
    weights.write({"w": torch.zeros(2)}, tmp_path / "student.safetensors", {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "student.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_colleague_may_read_the_merged_weights_of_low_rank_matrices(tmp_path: Path) -> None:
    network = transformers_model(config=LLAMA, architecture="causal_lm", lora={"r": 2})
    library_files.open_folders(tmp_path, network, None, [])
    library_files.close_folder(tmp_path, "selected", network)
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "selected").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_weights_are_whole_on_a_file_system_without_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    weights.write({"w": torch.zeros(2)}, tmp_path / "student.safetensors", {})
    assert weights.read(tmp_path / "student.safetensors")[0].keys() == {"w"}
