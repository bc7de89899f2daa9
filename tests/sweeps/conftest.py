"""An engine over kd's own configuration, in an empty working directory, and a launcher that only notes its jobs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from bare_records import write
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import HydraContext, RunMode

from kd.config.composition import CONF
from kd.sweeps.engine import Engine
from kd.sweeps.job import task


@dataclass
class Noted:
    """Writes the record of each job that it is given: finished, or what ``ends`` says of the job's name."""

    ends: dict[str, str] = field(default_factory=dict)
    launched: list[list[str]] = field(default_factory=list)

    def launch(self, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> None:
        """As a Hydra launcher."""
        paths = [tuple(o.partition("=")[2].strip("'") for o in overrides[-2:]) for overrides in jobs]
        self.launched.append([name for _, name in paths])
        for directory, name in paths:
            write(Path(directory) / name, self.ends.get(name, "finished"))


@pytest.fixture
def make_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """``make_engine("seed=0")``: the overrides are those of the command line; the directory is ``sweep``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)

    def make(*overrides: str) -> Engine:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            loader = hydra.config_loader
            given = [*overrides, "hydra.sweep.dir=sweep"]
            master = loader.load_configuration("train", given, run_mode=RunMode.MULTIRUN)
        HydraConfig.instance().set_config(master)
        return Engine(HydraContext(loader, Callbacks()), task, master)

    return make


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    """One whose launcher is :class:`Noted`."""
    made = make_engine()
    made.launcher = Noted()  # type: ignore[assignment]
    return made


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """Starts Python code in a process without torch's threads, in a session of its own."""

    def start(code: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(command, cwd=tmp_path, text=True, env=os.environ, start_new_session=True, **streams)  # type: ignore[call-overload]

    return start
