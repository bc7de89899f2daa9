"""kd: knowledge distillation with PyTorch Lightning and Hydra.

``kd.distill(student, teacher, train, val, test, loss=…, epochs=…)`` trains any network on any loaders;
``kd.Distiller``, ``kd.Teacher`` and ``kd.Objective`` are its parts, for a trainer of one's own; ``kd.functional`` has
the losses for any loop; ``kd.load(RUN).predict(…)`` is a run's network on new inputs. All of them are imported when
they are first used: ``import kd`` alone imports no torch.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

from kd import distill as _package  # empty: kd.distill is a package, and a function as well

__version__ = "0.1.0"

LAZY = {
    "Distiller": "kd.distill.distiller",
    "Objective": "kd.distill.objective",
    "Teacher": "kd.distill.teacher",
    "functional": "kd.losses",
    "load": "kd.deploy.predict",
}


class _CallablePackage(ModuleType):
    """``kd.distill(…)`` is :func:`kd.run.distill.distill`, whatever of the package was imported before."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from kd.run.distill import distill  # start-up: torch

        return distill(*args, **kwargs)


_package.__class__ = _CallablePackage


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module 'kd' has no attribute {name!r}")
    module = import_module(LAZY[name])
    return import_module(f"{LAZY[name]}.{name}") if name == "functional" else getattr(module, name)


def __dir__() -> list[str]:
    return [*LAZY, "distill", "__version__"]
