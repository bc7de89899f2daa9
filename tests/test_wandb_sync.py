"""``kd wandb sync``: what is on disk arrives once, whole, and a failure is never taken for success."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from wandb_server import WandbServer, serving

from kd.records import lock
from kd.tracking import wandb_run
from kd.tracking.wandb_sync import sync

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """``one``: a run in two parts, as after a resume; ``study/kd/seed0``: one run; the ids are their names."""
    runs = tmp_path_factory.mktemp("written")
    for name, part in (("one", 0), ("one", 1), ("study/kd/seed0", 0)):
        (runs / name).mkdir(parents=True, exist_ok=True)
        about = {"id": Path(name).name, "project": "kd", "resume": "allow"}
        run = wandb_run.open_run(runs / name, 5, offline=True, **about)
        for step in range(3):
            run.log({"train/loss": 10 * part + step})
        wandb_run.close_run(run, runs / name, {"status": f"part {part}"})
    return runs


@pytest.fixture
def runs(written: Path, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "runs", symlinks=True)


@pytest.fixture
def server(monkeypatch):
    with serving() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        for name in ("HTTP_TIMEOUT", "X_FILE_STREAM_TIMEOUT_SECONDS", "X_GRAPHQL_RETRY_MAX", "X_FILE_STREAM_RETRY_MAX"):
            monkeypatch.setenv(f"WANDB_{name}", "1")
        yield running


def marks(runs: Path) -> list[Path]:
    return list(runs.rglob("*.synced"))


def test_all_runs_arrive_once(kd, server: WandbServer, runs: Path) -> None:
    said = kd("wandb", "sync")
    assert said.code == 0, said.err
    assert sorted(said.out.splitlines()) == ["2 sent", "runs/one: sent", "runs/study/kd/seed0: sent"]
    assert server.runs.keys() == {"one", "seed0"}
    rows = [row["train/loss"] for _, row in sorted(server.runs["one"]["history"].items())]
    assert rows == [0, 1, 2, 10, 11, 12]
    assert server.runs["one"]["summary"]["status"] == "part 1"
    assert server.runs["one"]["complete"]
    server.runs.clear()
    again = kd("wandb", "sync", "runs/one", "runs/study")
    assert (again.code, again.out.strip()) == (0, "2 already there")
    assert not server.runs


def test_a_run_that_is_training_waits(kd, server: WandbServer, runs: Path) -> None:
    with lock.held(runs / "study/kd/seed0" / lock.RUN):
        said = kd("wandb", "sync", "runs/study")
    assert said.out.strip() == "1 still training"
    assert not server.runs


@pytest.mark.parametrize("mode", [401, "hang"])
def test_what_the_server_refuses_stays_to_be_sent(server: WandbServer, runs: Path, capsys, mode) -> None:
    server.mode, server.fails = mode, "uploads"  # it takes the run, and then not its rows
    assert sync([runs / "study"], timeout=5) == 1
    assert ": failed: " in capsys.readouterr().out
    assert not marks(runs)
    server.mode = "ok"
    assert sync([runs / "study"]) == 0
    assert len(server.runs["seed0"]["history"]) == 3


def test_a_file_cut_in_half_stops_no_other(server: WandbServer, runs: Path, capsys) -> None:
    (file,) = wandb_run.run_files(runs / "study")
    file.write_bytes(file.read_bytes()[:7])
    assert sync([runs]) == 1
    said = capsys.readouterr().out
    assert "seed0: failed: " in said
    assert "1 sent, 1 failed" in said


def test_bad_input_is_one_sentence(kd, server: WandbServer, runs: Path, monkeypatch, tmp_path) -> None:
    assert kd("wandb", "snc").err.strip().startswith("kd: there is no kd wandb snc (near: sync)")
    assert "--all" in kd("wandb", "sync", "--all").err
    assert kd("wandb", "sync", "nowhere").err.strip() == "kd: there is no directory nowhere"
    server.shutdown()  # first: of a server that still listens a connection may be reset and not refused
    server.server_close()
    away = kd("wandb", "sync")
    assert away.code == 1
    assert away.err.strip() == f"kd: W&B at {server.url} cannot be reached (connection refused): nothing was sent"
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert "no W&B key is found" in kd("wandb", "sync").err
    assert not marks(runs)


def test_help_and_nothing_to_send(kd, tmp_path) -> None:
    assert "kd wandb sync [DIR ...]" in kd("wandb", "--help").out
    assert kd("wandb").code == 1
    (tmp_path / "runs").mkdir()
    assert kd("wandb", "sync").out.strip() == "no W&B runs found"
