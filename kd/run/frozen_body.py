"""The student's body kept as it came, for the first epochs or for a whole run, and its batch norms' statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from kd.errors import KdError
from kd.losses.networks import classifiers


class FrozenBody(Callback):
    """Keeps all of the student but its classifier in eval mode and out of the optimiser's steps, at first.

    Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022, arXiv
    2202.10054: a classifier that is trained first leaves the body what it has learned.

    ``share``: of the run, in (0, 1]. Batch statistics do not move either. Of several
    processes gradients of the body are computed and dropped: DDP counts on those that were wanted at its start. A body
    that is frozen for the whole run has none, see :func:`freeze`.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._frozen = False
        self._trained: list[nn.Parameter] = []  # of the body, as the user left them

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Freeze before the first step, also of a run that goes on, and thaw before the step that is due."""
        epoch, epochs = module.place(batch_idx)
        frozen = epoch / epochs < self.share
        if frozen != self._frozen:
            self._frozen = frozen
            self._trained = self._trained or [p for p in body_parameters(module.student) if p.requires_grad]
            for parameter in self._trained if trainer.world_size == 1 else ():
                parameter.requires_grad_(not frozen)
            for part in body_modules(module.student):
                part.training = not frozen

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        """Drop the gradients of the body: an optimiser passes over parameters without one, weight decay as well."""
        if self._frozen:
            for parameter in self._trained:
                parameter.grad = None


class FrozenNorms(Callback):
    """Keeps the student's batch norms in eval mode: they normalise by the statistics that it began with.

    Those of a few batches of a new set are noise beside those of a large one; scales and shifts are trained.
    ``KdError`` where one of them has no statistics yet, as in a new decoder: it would never normalise.
    """

    def __init__(self) -> None:
        self._norms: list[nn.Module] = []

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        """Find the batch norms, once, and refuse a student without statistics."""
        norms = {name: part for name, part in module.student.named_modules() if isinstance(part, _NormBase)}
        self._norms = list(norms.values())
        new = [name for name, norm in norms.items() if norm.running_mean is not None and not norm.running_mean.any()]
        if new:
            which = "it has none" if len(new) == len(norms) else f"{new[0]} has none"
            raise KdError(
                f"recipe.frozen_norms = true keeps the batch statistics that the student came with, and {which}: "
                "give it weights (student.checkpoint=FILE, student.model.pretrained=true), or set "
                "recipe.frozen_norms=null recipe.frozen_body=null recipe.body_lr=null"
            )

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Freeze before each step: validation, and the end of ``frozen_body``, put them back into training mode."""
        for norm in self._norms:
            norm.training = False


def freeze(student: nn.Module) -> None:
    """Let no gradient reach the body. ``KdError`` where nothing says which layer is the classifier."""
    for parameter in body_parameters(student):
        parameter.requires_grad_(False)


def refuse_random(student: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Refuse ``recipe.frozen_body`` where the student's weights are random; ``student``: its section of a config.

    Networks of kd and timm say by ``pretrained`` whether they come with weights; of any other network it is not known.
    """
    if not recipe["frozen_body"]:
        return
    model = student["model"] or {}
    known = str(model.get("_target_", "")).startswith(("kd.models.", "timm."))
    fetched = model.get("pretrained") and not ("name" in model and model["name"] is None)  # of no name: a random one
    if known and not (student["checkpoint"] or student.get("surgery") or fetched or model.get("checkpoint_path")):
        without = " ".join(f"recipe.{key}=null" for key in ("frozen_body", "frozen_norms", "body_lr") if recipe[key])
        download = ", student.model.pretrained=true" if "pretrained" in model else ""
        raise KdError(
            f"recipe.frozen_body = {recipe['frozen_body']:g} would freeze random weights: give the student weights "
            f"(student.checkpoint=FILE{download}), or set {without}"
        )


def head_names(student: nn.Module, key: str) -> tuple[str, ...]:
    """Name the layers that are the classifier. ``KdError`` with the option ``key`` where there is none."""
    try:
        return tuple(head.name for head in classifiers(student))
    except ValueError as error:
        raise KdError(f"{key} tells a student's body from its classifier: {error}") from None


def body_parameters(student: nn.Module, key: str = "recipe.frozen_body") -> Iterator[nn.Parameter]:
    """Yield the parameters that do not belong to the classifier."""
    heads = {id(p) for name in head_names(student, key) for p in student.get_submodule(name).parameters()}
    return (p for p in student.parameters() if id(p) not in heads)


def body_modules(student: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that are neither the classifier nor around it: what is around may be dropout in front of it."""
    heads = head_names(student, "recipe.frozen_body")
    for name, module in student.named_modules():
        if not any(f"{head}.".startswith(f"{name}." if name else "") or name.startswith(f"{head}.") for head in heads):
            yield module
