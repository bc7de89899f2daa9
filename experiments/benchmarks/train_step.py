"""What the framework adds to a training step: the bare loop and ``kd`` in turn, ratio of medians.

    python experiments/benchmarks/train_step.py [rounds]

The bare loop is teacher forward without gradient, student forward and backward, SGD step, on the same batches. ``kd``
runs its whole Trainer: named losses, accuracy counts, CSV logging. Two sizes: an MLP pair (784-256-256-10, batch 64),
where overhead shows as it does on a GPU, and resnet20 → resnet8 on 32x32 images.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from kd.config.compose import checked
from kd.distill.distiller import Distiller
from kd.run import build, callbacks, trainer
from kd.tracking import loggers

SIZES = {
    "mlp": (
        [
            "data.shape=[1,28,28]",
            "student.model.hidden=[256,256]",
            "model@teacher=mlp",
            "teacher.model.hidden=[256,256]",
        ],
        400,
    ),
    "small": (["data.shape=[3,32,32]", "model@student=resnet8", "model@teacher=resnet20"], 40),
}


def config(overrides: list[str], steps: int) -> dict:
    """A KD run on made images, ``steps`` batches of 64."""
    return checked(
        [
            "data=fake",
            f"data.train_images={steps * 80}",
            "data.val_fraction=0.2",
            "data.mean=[0.5]",
            "data.std=[0.25]",
            "loss=[ce,kd]",
            "recipe=sgd_cosine",
            "recipe.epochs=1",
            "recipe.batch_size=64",
            "teacher.allow_random=true",
            "hardware=cpu",
            "hardware.threads=1",
            *overrides,
        ]
    )


def bare(module: Distiller, data) -> float:
    """Seconds a step of the plain loop."""
    optimizer = torch.optim.SGD(module.student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    batches = list(data.train_dataloader())
    teacher = module.teacher.networks[0]
    module.student.train()
    start = time.perf_counter()
    for batch in batches:
        with torch.no_grad():
            soft = teacher(batch.inputs)
        logits = module.student(batch.inputs)
        kl = F.kl_div(F.log_softmax(logits / 4, 1), F.log_softmax(soft / 4, 1), reduction="batchmean", log_target=True)
        loss = F.cross_entropy(logits, batch.targets) + 16 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - start) / len(batches)


class Clock(callbacks.Callback):
    """Seconds a step between the first and the last batch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx: int) -> None:
        """Start at the first batch."""
        if batch_idx == 0:
            self.start = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx: int) -> None:
        """The last call stands."""
        self.seconds = (time.perf_counter() - self.start) / (batch_idx + 1)


def ours(values: dict) -> tuple[float, Distiller, object]:
    """Seconds a step of the framework, with the module and data it used."""
    data = build.datamodule(values)
    module = build.distiller(values, data)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run_dir, clock = Path(folder), Clock()
        hooks = [*callbacks.standard(run_dir, values["protocol"], {}), clock]
        trainer.make_trainer(values, run_dir, [loggers.csv_logger(run_dir)], hooks, module).fit(module, datamodule=data)
    return clock.seconds, module, data


def main(rounds: int) -> None:
    """Print a line for each size."""
    trainer.quieten()
    torch.set_num_threads(1)
    for name, (overrides, steps) in SIZES.items():
        values = config(overrides, steps)
        pairs = []
        for _ in range(rounds + 1):
            seconds, module, data = ours(values)
            pairs.append((seconds, bare(module, data)))
        framework, loop = (statistics.median(p[i] for p in pairs[1:]) for i in (0, 1))  # the first round warms up
        print(f"{name}: {framework / loop:.2f} × the bare loop, {1e6 * (framework - loop):+.0f} µs a step")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
