"""A term that reads what it does not declare is refused before the first batch: tried with every term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from kd.config.compose import checked
from kd.distill.distiller import Distiller
from kd.distill.objective import Objective
from kd.errors import KdError
from kd.run import build

CONF = Path(__file__).parents[2] / "conf" / "loss"
DECLARED = ("needs_student_logits", "needs_teacher_logits", "needs_labels")
CLASSES = {f.stem: get_class(OmegaConf.load(f)[f.stem]["_target_"]) for f in sorted(CONF.glob("[!_]*.yaml"))}
TERMS = [name for name, term in CLASSES.items() if any(getattr(term, declared) for declared in DECLARED)]
TINY = ["data=fake", "data.train_images=8", "data.test_images=4", "recipe.batch_size=4", "hardware=cpu"]
TINY += ["model@student=resnet8", "model@teacher=resnet8", "teacher.allow_random=true"]


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Distiller]:
    """The module of one term, after the dry pass, in which the term does not declare ``without``."""

    def of(name: str, without: str | None = None) -> Distiller:
        make = build.objective

        def objective(config: Mapping[str, Any]) -> Objective:
            made = make(config)
            if without is not None:
                setattr(made.terms[name], without, False)
            return made

        with monkeypatch.context() as patched:
            patched.setattr(build, "objective", objective)
            config = checked([*TINY, f"loss=[{name}]"])
            return build.distiller(config, build.datamodule(config))

    return of


@pytest.mark.slow
@pytest.mark.parametrize("name", TERMS)
def test_what_a_term_reads_undeclared_is_refused(prepared, name: str) -> None:
    ((_, term),) = prepared(name).objective.items()
    for declared in DECLARED:
        if getattr(term, declared):
            with pytest.raises(KdError, match=rf"^loss\.{name}: .*without declaring it \(.*{declared}"):
                prepared(name, without=declared)
