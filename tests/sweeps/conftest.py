"""A sweep without its processes: the engine on the real configuration, and a launcher that only pretends to train."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from kd import record
from kd.config import CONF
from kd.sweeps import engine as engines
from kd.sweeps.engine import Engine
from kd.sweeps.job import checked


@pytest.fixture
def context() -> Iterator[HydraContext]:
    """Hydra, set up on the configuration of ``kd train``."""
    before = HydraConfig.instance().cfg
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        yield HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
    HydraConfig.instance().cfg = before


class Pretender:
    """A launcher whose jobs are finished at once, apart from those that ``fails`` names."""

    def __init__(self, engine: Engine, fails: Sequence[str] = ()) -> None:
        self.engine, self.fails, self.launched = engine, fails, []  # type: ignore[var-annotated]

    def launch(self, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> None:
        """Write what a run writes: its config and its record."""
        self.launched.append([])
        for overrides in jobs:
            config = self.engine.context.config_loader.load_sweep_config(self.engine.master, list(overrides))
            run_dir = self.engine.directory / config.hydra.sweep.subdir
            self.launched[-1].append(config.hydra.sweep.subdir)
            failed = config.hydra.sweep.subdir in self.fails
            HydraConfig.instance().set_config(config)
            write_run(run_dir, checked(config), status="failed" if failed else "finished")


def write_run(run_dir: Path, config: dict[str, Any], **changed: Any) -> Path:
    """A run directory with config and record, and nothing in between."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    error = "it could not" if changed.get("status") == "failed" else None
    opening = {"schema": record.SCHEMA, "status": "finished", "error": error, "config_hash": record.config_hash(config)}
    record.write(run_dir, {**opening, **changed})
    return run_dir


def remembering(engine: Engine) -> Callable[..., DictConfig]:
    """Hydra's composition, once for each list of overrides: it is what these tests spend their time on."""
    compose, known = engine.context.config_loader.load_sweep_config, {}  # type: ignore[var-annotated]

    def composed(master: DictConfig, overrides: list[str]) -> DictConfig:
        key = tuple(overrides)
        if key not in known:
            known[key] = compose(master, overrides)
        return copy.deepcopy(known[key])

    return composed


@pytest.fixture
def pretend() -> Callable[..., Path]:
    """:func:`write_run`."""
    return write_run


@pytest.fixture
def make_engine(context: HydraContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """``make_engine(fails=["a"])``: an engine of the directory ``sweep`` with a :class:`Pretender`."""
    monkeypatch.setattr(engines, "refuse_unbuildable", lambda *_: None)  # it builds networks in a forked process

    def make(fails: Sequence[str] = (), directory: Path | None = None) -> Engine:
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        overrides = [f"hydra.sweep.dir='{directory or tmp_path / 'sweep'}'"]
        master = hydra.compose_config("train", overrides, RunMode.MULTIRUN, with_log_configuration=False)
        HydraConfig.instance().set_config(master)
        engine = Engine(context, lambda _: None, master)
        monkeypatch.setattr(context.config_loader, "load_sweep_config", remembering(engine))
        engine.launcher = Pretender(engine, fails)  # type: ignore[assignment]
        return engine

    return make
