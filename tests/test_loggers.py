"""What reaches the loggers: W&B offline is read back from its file; never a question, never a lost row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from wandb_disk import only, read_back

from kd.config.compose import checked
from kd.config.composition import flat
from kd.records import manifest
from kd.records.manifest import Job, Manifest
from kd.records.record import read, read_config
from kd.run.train import resume, train
from kd.tracking.loggers import MetricsFile, complete, describe
from kd.tracking.summary import report_row
from kd.tracking.wandb_run import run_files

QUICK = ["recipe.epochs=2", "hardware=cpu", "logger=wandb"]


def sweep(directory: Path, kind: str = "study") -> Path:
    jobs = [
        Job("big/seed3", "big, seed 3", ()),
        Job("kd/seed3", "soft targets, seed 3", (), after=("big/seed3",)),
        Job("alone/seed3", "alone, seed 3", ()),
    ]
    directory.mkdir()
    manifest.write(directory, Manifest(kind, "first_study", {job.name: job for job in jobs}))
    for job in jobs:
        (directory / job.name).mkdir(parents=True)
    return directory


@pytest.mark.slow
def test_a_job_of_a_study_is_kept_with_config_curves_and_report_row(tmp_path, teacher_run) -> None:
    run_dir = sweep(tmp_path / "s") / "kd" / "seed3"
    overrides = [*QUICK, "loss=[ce,kd]", f"teacher.checkpoint={teacher_run}", "tags=[mine]", "notes=why", "seed=3"]
    train(checked(overrides), run_dir, overrides)
    kept = only(run_dir)
    assert (kept.run.run_group, kept.run.display_name) == ("first_study", "soft targets, seed 3")
    assert (kept.run.job_type, kept.run.notes, kept.run.project) == ("distill", "why", "kd")
    assert list(kept.run.tags) == ["mine", "study/first_study", "digits", "ce", "kd"]
    config = {key: kept.config[key] for key in read_config(run_dir)}
    assert flat(config) == flat(json.loads(json.dumps(read_config(run_dir))))
    steps = [row["trainer/global_step"] for row in kept.history]
    assert steps == sorted(steps)
    assert steps[-1] == 26  # two epochs of 13 batches
    assert {"train/ce", "train/kd", "val/acc1", "epoch", "lr"} <= {key for row in kept.history for key in row}
    result = read(run_dir)
    row = report_row(result)
    assert {key: kept.summary[key] for key in row} == pytest.approx(row)
    selected, teacher = result["student"]["selected"]["test"]["acc1"], result["teacher"]["test"]["acc1"]
    assert kept.summary["retention.selected"] == pytest.approx(selected / teacher)
    assert (kept.summary["status"], kept.exit_code) == ("finished", 0)


def test_disk_holds_neither_artifacts_nor_code(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)  # inside of a git checkout
    train(checked(QUICK), tmp_path)
    (kept,) = run_files(tmp_path)
    assert {f.name for f in (kept.parent / "files").iterdir()} <= {"requirements.txt", "output.log"}
    kinds = read_back(kept).kinds
    assert not {"artifact", "use_artifact"} & kinds.keys()
    assert kinds["stats"] <= 1  # one sample of the machine a minute
    assert sum(f.stat().st_size for f in (tmp_path / "wandb").rglob("*")) < 100_000


def test_a_failed_run_says_so(tmp_path, monkeypatch) -> None:
    def stop(*_: object) -> None:
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr("kd.run.callbacks.EpochLine.on_train_epoch_end", stop)
    with pytest.raises(RuntimeError):
        train(checked(QUICK), tmp_path)
    kept = only(tmp_path)
    assert (kept.summary["status"], kept.summary["error"]) == ("failed", "out of memory, say")
    assert kept.exit_code == 1


def test_a_resumed_run_is_the_same_run_wherever_its_directory_is(tmp_path, monkeypatch) -> None:
    from kd.run.callbacks import EpochLine

    before = EpochLine.on_train_epoch_end

    def interrupt(self, trainer, module) -> None:
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt
        before(self, trainer, module)

    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    monkeypatch.setattr(EpochLine, "on_train_epoch_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(checked(QUICK), Path("here"))
    monkeypatch.undo()
    (tmp_path / "here").rename(tmp_path / "moved")
    resume(tmp_path / "moved")
    first, second = (read_back(f) for f in run_files(tmp_path / "moved"))
    assert first.run.run_id == second.run.run_id
    assert (first.summary["status"], second.summary["status"]) == ("interrupted", "finished")
    assert [f.name for f in (tmp_path / "moved" / "checkpoints").iterdir()] == ["last.ckpt"]
    assert first.run.start_time.ToNanoseconds() < second.run.start_time.ToNanoseconds()


def test_runs_of_one_directory_name_are_different_runs(tmp_path) -> None:
    config = checked(["logger=wandb"])
    assert describe(config, tmp_path)["id"] != describe(config, tmp_path)["id"]


def test_job_types_and_groups(tmp_path, teacher_run) -> None:
    alone, distilled = checked([]), checked([f"teacher.checkpoint={teacher_run}"])
    directory = sweep(tmp_path / "s", kind="optuna")
    assert describe(alone, directory / "big" / "seed3")["job_type"] == "teacher"
    assert describe(alone, directory / "alone" / "seed3")["job_type"] == "train"
    assert describe(distilled, directory / "kd" / "seed3")["job_type"] == "distill"
    assert "optuna/first_study" in describe(alone, directory / "alone" / "seed3")["tags"]
    own = describe(alone, tmp_path / "own")
    assert (own["group"], own["name"], own["job_type"]) == ("train", "train ce seed0", "train")


def test_what_the_user_sets_wins_and_long_names_are_cut(tmp_path) -> None:
    config = checked(["logger=wandb", "logger.wandb.group=mine", "logger.wandb.job_type=probe", f"tags=[{'t' * 70}]"])
    node = complete("wandb", config["logger"]["wandb"], {**config, "name": "n" * 200}, tmp_path)
    assert (node["group"], node["job_type"]) == ("mine", "probe")
    assert (len(node["tags"][0]), len(node["name"])) == (64, 128)


def test_a_resumed_csv_keeps_the_rows_of_the_steps_that_count(tmp_path) -> None:
    logger = MetricsFile(tmp_path)
    for step in (10, 20, 30):
        logger.log_metrics({"train/ce": float(step)}, step=step)
    resumed = MetricsFile(tmp_path, done=21)
    resumed.log_metrics({"train/ce": 25.0, "new": 1.0}, step=25)
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    column = rows[0].index("train/ce")
    assert [row[column] for row in rows[1:]] == ["10.0", "20.0", "25.0"]


def test_curves_survive_a_kill_between_opening_and_the_next_epoch(tmp_path) -> None:
    """Each resumed process opens the file, and may be killed before it logs anything."""
    logger = MetricsFile(tmp_path)
    for step in range(4):
        logger.log_metrics({"train/loss": 1.0 / (step + 1)}, step=step)
    whole = (tmp_path / "metrics.csv").read_text()
    for _ in range(2):
        MetricsFile(tmp_path, done=4)
        assert (tmp_path / "metrics.csv").read_text() == whole
    (tmp_path / "metrics.csv").write_text(f"{whole}4,")  # the machine lost power
    MetricsFile(tmp_path, done=3)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == whole.splitlines()[:-1]
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.csv"]
