"""How the Distiller steps: optimisers, schedules, warm-up, and where in a run a step is."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd.distill.evaluation import EvaluationModule
from kd.errors import KdError
from kd.parallel import group

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
"""Parameters, or parameter groups, to an optimiser."""
MakeScheduler = Callable[[torch.optim.Optimizer], Any]
MakeGroups = Callable[[Mapping[str, nn.Module]], list[dict[str, Any]]]
"""Networks by name to the groups of what is trained in them."""

EVERY_PEER = "*"  # in ``own_optimizers``: each of the further networks that a set-up is given
SCHEDULED = "scheduled_lr"  # in a parameter group during warm-up, and so in checkpoints: the rate of the schedule alone


def check_factory(key: str, given: Any) -> None:
    """``KdError`` where an optimiser, a schedule or its name is given in the place of the function that makes it."""
    if given is None or callable(given):
        return
    example = {
        "optimizer": "of the parameters, such as functools.partial(torch.optim.Adam, lr=0.01)",
        "scheduler": "of the optimiser, such as functools.partial(torch.optim.lr_scheduler.StepLR, step_size=10)",
    }
    shown = repr(given) if isinstance(given, str) else f"an object of {type(given).__name__}"
    raise KdError(f"{key} = {shown} is not allowed: it must be a function {example[key]}")


class WarmUp:
    """A linear rise of the rate, on top of the schedule, whose own clock begins with the run.

    ``length``: in epochs, or in steps of the optimiser (``in_steps``); ``start``: the share of the rate at step 0.
    """

    def __init__(self, length: float, in_steps: bool = False, start: float = 0.0) -> None:
        self.length, self.in_steps, self.start = length, in_steps, start

    def share(self, step: int, steps: int) -> float:
        """Return the share of the scheduled rate at a step (0, 1, …) of a rise over so many."""
        return self.start + (1 - self.start) * min(1.0, step / max(1, steps))


class OwnRecipe:
    """Optimiser and schedule of one network of a set-up, where they are not those of the others.

    ``scheduled``: whether ``scheduler`` counts, None being a constant rate.
    """

    def __init__(
        self,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = None,
        scheduled: bool = False,
    ) -> None:
        self.optimizer, self.scheduler, self.scheduled = optimizer, scheduler, scheduled


class OptimisationModule(EvaluationModule, ABC):
    """Makes and steps the optimisers of :meth:`networks`; knows how far the run is.

    ``own_optimizers``: names of :meth:`networks` that get an optimiser and a schedule of their own, made by the same
    recipe or by ``own_recipes``; with any of them the module steps all optimisers itself, after one backward pass.
    ``EVERY_PEER`` stands for all peers.
    """

    own_optimizers: Sequence[str] = ()

    _make_optimizer: MakeOptimizer
    _make_scheduler: MakeScheduler | None
    _interval: str
    gradient_clip: float | None
    accumulate: int
    warmup: WarmUp | None = None
    make_groups: MakeGroups | None = None
    own_recipes: Mapping[str, OwnRecipe] = {}
    _first_rows = 1  # of the first batch of the present step
    _weights = 0.0  # of the present step's batches so far, in such batches

    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """Return what is trained, by name."""

    # ------------------------------------------------------------------ making them

    def trainable(self) -> list[nn.Parameter]:
        """Return what the optimiser gets: the parameters of :meth:`networks` that want a gradient."""
        return [p for network in self.networks().values() for p in network.parameters() if p.requires_grad]

    def optimizer_names(self) -> list[str]:
        """Return the name of each optimiser that there is: "" is the common one."""
        networks = self.networks()
        apart = {id(p) for name in self.own_optimizers for p in networks[name].parameters()}
        common = any(id(p) not in apart for p in self.trainable())
        own = [name for name in self.own_optimizers if any(p.requires_grad for p in networks[name].parameters())]
        return [*([""] if common else []), *own]

    def configure_optimizers(self) -> Any:
        """Make the recipe's optimiser and schedule, or several of them: see ``own_optimizers``."""
        made = [self._optimizer(name) for name in self.optimizer_names()]
        return made[0] if len(made) == 1 else made

    def _optimizer(self, name: str) -> dict[str, Any]:
        """Make the common optimiser, or that of one network."""
        networks = self.networks()
        own = self.own_recipes.get(name, OwnRecipe())
        mine = {name: networks[name]} if name else {n: m for n, m in networks.items() if n not in self.own_optimizers}
        if self.make_groups is not None:
            given: Any = self.make_groups(mine)
        elif name:
            given = [p for p in networks[name].parameters() if p.requires_grad]
        else:
            apart = {id(p) for other in self.own_optimizers for p in networks[other].parameters()}
            given = [p for p in self.trainable() if id(p) not in apart]
        optimizer = (own.optimizer or self._make_optimizer)(given)
        make_scheduler = own.scheduler if own.scheduled else self._make_scheduler
        if make_scheduler is None:
            return {"optimizer": optimizer}
        scheduler = {"scheduler": make_scheduler(optimizer), "interval": self._interval}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    # ------------------------------------------------------------------ where the run is

    @property
    def steps_done(self) -> int:
        """Steps of the optimiser so far. Lightning counts those of several optimisers together."""
        return self.global_step // (1 if self.automatic_optimization else max(1, len(self.trainer.optimizers)))

    @property
    def steps(self) -> int | None:
        """The length of the run in steps of the optimiser, where it is given in steps."""
        most = self.trainer.max_steps
        if most is None or most < 0:
            return None
        return most // (1 if self.automatic_optimization else max(1, len(self.trainer.optimizers)))

    def steps_an_epoch(self) -> int | None:
        """Count the steps of the optimiser in an epoch; None for data without a length."""
        batches = self.trainer.num_training_batches
        if batches == math.inf:
            return None
        return math.ceil(batches / self.batches_a_step)

    def place(self, batch_idx: int | None = None) -> tuple[float, float]:
        """Tell how far the training is: (fractional) epoch, of so many; (0, 1) outside of a trainer or without end."""
        trainer = self._trainer
        if trainer is None:
            return 0.0, 1
        if batch_idx is None:
            batch_idx = trainer.fit_loop.epoch_loop.batch_idx
        batches = trainer.num_training_batches
        epoch = trainer.current_epoch + (batch_idx / max(1, batches) if batches != float("inf") else 0.0)
        if (trainer.max_epochs or -1) >= 1:
            return epoch, int(trainer.max_epochs or 1)
        whole, each = self.steps, self.steps_an_epoch()
        if whole is None:  # a run without an end: it is always at its beginning
            return 0.0, 1
        return (self.steps_done / whole, 1) if each is None else (epoch, whole / each)

    def closes_epoch(self, batch_idx: int) -> bool:
        """Tell whether no batch of this epoch follows: its data has ended, or the run ends with this step."""
        trainer = self.trainer
        if trainer.is_last_batch:
            return True
        stepped = (batch_idx + 1) % self.batches_a_step == 0
        return self.steps is not None and stepped and self.steps_done + 1 >= self.steps

    def validates_next(self) -> bool:
        """Tell whether a validation that is counted in batches follows the present one."""
        trainer = self.trainer
        every = trainer.val_check_batch
        if trainer.check_val_every_n_epoch is not None or not isinstance(every, int):
            return False
        return (trainer.fit_loop.total_batch_idx + 1) % every == 0

    def rates(self) -> dict[str, float]:
        """``lr`` of the common optimiser, and ``lr/NAME`` of a network's own: the highest of their groups."""
        names = self.optimizer_names() if self.own_optimizers else [""]
        found = zip(names, self.trainer.optimizers, strict=False)
        return {f"lr/{n}" if n else "lr": max(g["lr"] for g in made.param_groups) for n, made in found}

    # ------------------------------------------------------------------ stepping

    def on_train_start(self) -> None:
        """Begin the warm-up, or go on with it."""
        if self.warmup is not None:
            self._warm_up()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Set the rate of the next step."""
        if self.warmup is not None:
            self._warm_up()

    def _warm_up(self) -> None:
        """Set the rates to their share of what the schedules say."""
        assert self.warmup is not None
        length = self.warmup.length
        if not self.warmup.in_steps:
            each = self.steps_an_epoch()
            if each is None:
                raise KdError(
                    f"recipe.warmup = {length} counts epochs, and this data has no length: set recipe.steps, and the "
                    "warm-up in steps"
                )
            length *= each
        share = self.warmup.share(self.steps_done, round(length))
        for optimizer in self.trainer.optimizers:
            for rates in optimizer.param_groups:
                scheduled = rates.pop(SCHEDULED, rates["lr"])
                rates["lr"] = scheduled if share >= 1 else scheduled * share
                if share < 1:
                    rates[SCHEDULED] = scheduled

    @contextlib.contextmanager
    def _scheduled(self) -> Iterator[None]:
        """Let the rates within be those of the schedules alone: many schedulers make the next one from the present."""
        groups = [g for made in self.trainer.optimizers for g in made.param_groups if SCHEDULED in g]
        for rates in groups:
            rates["lr"] = rates.pop(SCHEDULED)
        yield
        if groups:
            self._warm_up()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a schedule (called by Lightning)."""
        with self._scheduled():
            super().lr_scheduler_step(scheduler, metric)

    @property
    def batches_a_step(self) -> int:
        """How many batches a step of the optimiser is made of."""
        return max(self.accumulate, self.trainer.accumulate_grad_batches)

    def weigh(self, total: Tensor, rows: int, batch_idx: int) -> Tensor:
        """Weigh the loss of a batch of a step of several by its ``rows``: their mean is that of one large batch.

        Batches of texts differ in their supervised tokens, and the last step of an epoch may be of fewer batches. A sum
        of gradients has one weight: beside terms over rows those over samples, positions or labelled rows have the
        rows', too. Weights are in units of the step's first batch, with which a loss in half precision does not
        overflow; :meth:`_divide` makes the mean once the last is known.
        """
        rows = group.summed(rows, self.device)
        if batch_idx % self.batches_a_step == 0:
            self._first_rows, self._weights = max(rows, 1), 0.0
        weight = rows / self._first_rows
        self._weights += weight
        return total if weight == 1 else total * weight

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Divide the gradient of a step of several batches by their weights (called by Lightning, before it clips)."""
        if self.automatic_optimization:
            self._divide(optimizer)

    def _divide(self, optimizer: Any) -> None:
        """Make the mean over all rows of a step, of the sum over its batches that Lightning divides by their number."""
        batches = self.batches_a_step
        if batches == 1 or self._weights in (0, batches):
            return
        for parameter in (p for parameters in optimizer.param_groups for p in parameters["params"]):
            if parameter.grad is not None:
                parameter.grad.mul_(batches / self._weights)

    def descend(self, total: Tensor, batch_idx: int) -> None:
        """Step all optimisers of a set-up with more than one: accumulate, clip, schedules by step and by epoch."""
        self.manual_backward(total / self.accumulate)
        last = self.trainer.is_last_batch
        stepped = last or (batch_idx + 1) % self.accumulate == 0
        for optimizer in _several(self.optimizers()) if stepped else ():
            self._divide(optimizer)
            if self.gradient_clip is not None:
                self.clip_gradients(optimizer, self.gradient_clip, "norm")
            optimizer.step()
            optimizer.zero_grad()
        if stepped and (last or self._interval == "step"):
            with self._scheduled():
                for scheduler in _several(self.lr_schedulers() or []):
                    scheduler.step()


def _several(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given]
