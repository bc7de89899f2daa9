"""What a distillation step costs: the bare loop, ``kd``, and the usual Lightning set-up, in turn; ratios of medians.

    python experiments/benchmarks/train_step.py [SIZE …] [rounds=7] [compile=true] [keep_memory=true]

The bare loop is teacher forward without gradient, student forward and backward, SGD step, eager, on the same batches.
``kd`` runs its whole Trainer: a bar, CSV and W&B (offline), loss by term, top-1 and top-5; also with
``teacher.optimize=false hardware.channels_last=false`` (as it stands), and compiled where that is asked for. The usual
set-up is a LightningModule as tutorials write it: ``self.log`` of three losses and of torchmetrics' top-1 and top-5
in each step, a rich bar, the same loggers. ``keep_memory``: all of them with the allocator's setting of
``hardware.keep_memory``. Sizes: ``mlp`` (784-256-256-10 twice), where overhead shows as it does on a
GPU, ``small`` (resnet20 → resnet8) and ``big`` (resnet56 → resnet20) on 32×32 images; batches of 64, one thread.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L
import rich
import torch
import torchmetrics
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from rich.console import Console
from torch.nn import functional as F

from kd.config.compose import checked
from kd.run import allocator, build, callbacks, hardware, trainer
from kd.tracking import loggers, summary

MLP = ["model@student=mlp", "student.model.hidden=[256,256]", "model@teacher=mlp", "teacher.model.hidden=[256,256]"]
SIZES = {  # overrides, steps a round
    "mlp": (["data.shape=[1,28,28]", *MLP], 400),
    "small": (["data.shape=[3,32,32]", "model@student=resnet8", "model@teacher=resnet20"], 30),
    "big": (["data.shape=[3,32,32]", "model@student=resnet20", "model@teacher=resnet56"], 8),
}
AS_IT_STANDS = ["teacher.optimize=false", "hardware.channels_last=false"]
LR, MOMENTUM, DECAY, T = 0.1, 0.9, 5e-4, 4.0


def config(overrides: list[str], steps: int) -> dict:
    """A KD run on made images, ``steps`` batches of 64."""
    return checked(
        [
            *("data=fake", f"data.train_images={steps * 80}", "data.val_fraction=0.2", "data.mean=[0.5]"),
            *("data.std=[0.25]", "loss=[ce,kd]", "recipe=sgd_cosine", "recipe.epochs=1", "recipe.batch_size=64"),
            *("teacher.allow_random=true", "hardware=cpu", "hardware.threads=1", "logger=[wandb]", *overrides),
        ]
    )


class Clock(L.Callback):
    """Seconds a step between the first batch and the last one; ``skip`` first ones are not counted (compiling)."""

    observes_only = True

    def __init__(self, skip: int = 0) -> None:
        self.skip = skip

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch, batch_idx: int) -> None:
        """Start at the first batch that counts."""
        if batch_idx == self.skip:
            self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, out, batch, batch_idx: int) -> None:
        """The last call stands."""
        if batch_idx >= self.skip:
            self.seconds = (time.perf_counter() - self.start) / (batch_idx + 1 - self.skip)


def networks(values: dict):
    """Data, student and teacher of a config, as plain torch has them."""
    data = build.datamodule(values)
    module = build.distiller(values, data)
    return data, module.student.to(memory_format=torch.contiguous_format), module.teacher.networks[0].eval()


def optimizer(student: torch.nn.Module) -> torch.optim.SGD:
    """The optimiser of the recipe."""
    return torch.optim.SGD(student.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)


def bare(values: dict, folder: Path) -> float:
    """Seconds a step of the plain loop."""
    data, student, teacher = networks(values)
    descent, batches = optimizer(student), list(data.train_dataloader())
    student.train()
    start = time.perf_counter()
    for batch in batches:
        with torch.no_grad():
            soft = teacher(batch.inputs)
        logits = student(batch.inputs)
        kl = F.kl_div(F.log_softmax(logits / T, 1), F.log_softmax(soft / T, 1), reduction="batchmean", log_target=True)
        loss = F.cross_entropy(logits, batch.targets) + T**2 * kl
        descent.zero_grad()
        loss.backward()
        descent.step()
    return (time.perf_counter() - start) / len(batches)


def ours(values: dict, folder: Path) -> float:
    """Seconds a step of ``kd``, with all that ``kd train`` has in a terminal."""
    data = build.datamodule(values)
    module = build.distiller(values, data)
    hardware.compile_networks(values, module)
    clock = Clock(skip=3 if values["hardware"]["compile"] else 0)
    hooks = [*callbacks.standard(folder, trainer.selection(values["protocol"], module), {}), clock]
    bar = None if any(isinstance(h, callbacks.RunBar) for h in hooks) else callbacks.RunBar(refresh_rate=50)
    written = [loggers.MetricsFile(folder), *build.loggers(values, folder)]
    trainer.make_trainer(values, folder, written, [*hooks, *([bar] if bar else [])], module).fit(
        module, datamodule=data
    )
    summary.finish_loggers({"status": "finished", "overrides": []})
    return clock.seconds


class Usual(L.LightningModule):
    """Distillation as tutorials write it."""

    def __init__(self, student: torch.nn.Module, teacher: torch.nn.Module, classes: int) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.top1 = torchmetrics.classification.MulticlassAccuracy(classes, average="micro")
        self.top5 = torchmetrics.classification.MulticlassAccuracy(classes, average="micro", top_k=5)

    def training_step(self, batch, batch_idx: int) -> torch.Tensor:
        """One step, everything logged."""
        with torch.no_grad():
            soft = self.teacher(batch.inputs)
        logits = self.student(batch.inputs)
        ce = F.cross_entropy(logits, batch.targets)
        kl = F.kl_div(F.log_softmax(logits / T, 1), F.log_softmax(soft / T, 1), reduction="batchmean", log_target=True)
        loss = ce + T**2 * kl
        named = {"train/loss": loss, "train/ce": ce, "train/kd": kl}
        named |= {"train/acc1": self.top1(logits, batch.targets), "train/acc5": self.top5(logits, batch.targets)}
        self.log_dict(named, prog_bar=True, on_step=True, on_epoch=True, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> torch.optim.SGD:
        """The same as the other loops'."""
        return optimizer(self.student)


def usual(values: dict, folder: Path) -> float:
    """Seconds a step of the usual Lightning set-up."""
    data, student, teacher = networks(values)
    clock, wandb = Clock(), WandbLogger(save_dir=str(folder), offline=True)
    L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=[CSVLogger(str(folder)), wandb],
        callbacks=[RichProgressBar(), clock],
        limit_val_batches=0,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(Usual(student, teacher, data.num_classes), data.train_dataloader())
    wandb.experiment.finish()
    return clock.seconds


def compare(name: str, rounds: int, compiled: bool) -> None:
    """Print the lines of one size."""
    overrides, steps = SIZES[name]
    plain = config(overrides, steps)
    loops: dict[str, tuple[Callable[[dict, Path], float], dict]] = {
        "bare loop": (bare, plain),
        "kd": (ours, plain),
        "kd, networks as they stand": (ours, config([*overrides, *AS_IT_STANDS], steps)),
        "usual Lightning set-up": (usual, plain),
    }
    if compiled:
        loops["kd, compiled"] = (ours, config([*overrides, "hardware.compile=default"], steps))
    seconds: dict[str, list[float]] = {loop: [] for loop in loops}
    for turn in range(rounds + 1):
        for loop, (run, values) in loops.items():
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                torch.manual_seed(turn)
                seconds[loop].append(run(values, Path(folder)))
    middle = {loop: statistics.median(found[1:]) for loop, found in seconds.items()}  # the first round warms up
    for loop, value in middle.items():
        more = 1e6 * (value - middle["bare loop"])
        print(f"{name:6} {loop:28} {1e3 * value:8.2f} ms  {value / middle['bare loop']:5.2f} ×  {more:+8.0f} µs a step")


def main(arguments: list[str]) -> None:
    """Compare the sizes that are named, or all."""
    options = dict(argument.split("=") for argument in arguments if "=" in argument)
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    trainer.quieten()
    torch.set_num_threads(1)
    if options.get("keep_memory") == "true":
        allocator.keep_memory()
    with open(os.devnull, "w") as nowhere:  # rich draws its bars, as on a terminal, where nobody sees them
        rich.get_console().__dict__ = Console(file=nowhere, force_terminal=True, width=120).__dict__
        for name in [a for a in arguments if "=" not in a] or SIZES:
            compare(name, int(options.get("rounds", 7)), options.get("compile") == "true")


if __name__ == "__main__":
    main(sys.argv[1:])
