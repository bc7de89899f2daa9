"""What reaches the loggers: W&B offline is read back from its file; never a question, never a lost row."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from kd.app import checked
from kd.loggers import complete, csv_logger, has_wandb_key


def records(run_dir: Path) -> list:
    """The records of a W&B offline run, in order: protobufs in a LevelDB log (blocks of 32 KiB)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, parts, found = 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no room for a header: the rest of the block is padding
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of several fragments
            record = Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def test_wandb_offline_holds_run_config_curves_and_summary(kd, tmp_path) -> None:
    arguments = ["recipe.epochs=2", "hardware=cpu", "logger=wandb", "tags=[first,second]", "notes=why", "seed=3"]
    said = kd("train", *arguments, "hydra.run.dir=run")
    assert said.code == 0, said.err
    found = records(tmp_path / "run")
    run = next(r.run for r in found if r.WhichOneof("record_type") == "run")
    assert run.display_name == "train ce seed3"
    assert run.run_group == "train"
    assert run.job_type == "train"
    assert sorted(run.tags) == ["first", "second"]
    assert run.notes == "why"
    config = {}
    for part in [run.config, *(r.config for r in found if r.WhichOneof("record_type") == "config")]:
        config.update({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in part.update})
    assert any("recipe" in key for key in config)
    curves, summary = set(), {}
    for record in found:
        kind = record.WhichOneof("record_type")
        if kind == "history":
            curves |= {item.key or ".".join(item.nested_key) for item in record.history.item}
        if kind == "summary":
            summary.update({i.key or ".".join(i.nested_key): i.value_json for i in record.summary.update})
    assert {"train/ce", "val/acc1", "epoch", "lr"} <= curves
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    row = json.loads(summary["student.selected.test.acc1"])
    assert row == pytest.approx(result["student"]["selected"]["test"]["acc1"])
    assert any(r.WhichOneof("record_type") == "exit" for r in found)  # the run was closed


def test_without_a_key_wandb_is_offline(monkeypatch, tmp_path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = checked(["logger=wandb"])
    assert not has_wandb_key()
    assert complete("wandb", config["logger"]["wandb"], config, tmp_path)["offline"] is True
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert has_wandb_key()
    assert complete("wandb", config["logger"]["wandb"], config, tmp_path)["offline"] is False


def test_jobs_of_a_sweep_share_a_group_and_a_directory_keeps_its_run(tmp_path) -> None:
    config = checked(["logger=wandb"])
    one, two = (tmp_path / "sweep_now" / name for name in ("0", "1"))
    first, again, other = (complete("wandb", config["logger"]["wandb"], config, d) for d in (one, one, two))
    assert first["group"] == other["group"] == "sweep_now"
    assert first["id"] == again["id"] != other["id"]


def test_a_resumed_csv_keeps_the_rows_of_the_steps_that_count(tmp_path) -> None:
    logger = csv_logger(tmp_path)
    for step in (10, 20, 30):
        logger.log_metrics({"train/ce": float(step)}, step=step)
    logger.save()
    resumed = csv_logger(tmp_path, done=21)
    resumed.log_metrics({"train/ce": 25.0, "new": 1.0}, step=25)
    resumed.save()
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    column = rows[0].index("train/ce")
    assert [row[column] for row in rows[1:]] == ["10.0", "20.0", "25.0"]
