"""Choose rate, smoothing and the weight of every method on validation, three settings an arm, and print the spreads.

``python experiments/methods_fashion/pilot.py`` prints the table of the README. Its seeds are not the study's, and it
does not read the test set. Networks, data, losses and recipe are those of ``study.yaml``, by :func:`kd.distill`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

import kd
from kd.config.compose import checked
from kd.config.instantiate import make
from kd.distill.schedules import Linear
from kd.models.cifar_resnet import resnet
from kd.models.vgg import vgg

SEEDS = (900, 901)
IMAGES, EPOCHS, RATE = 2000, 10, 0.05
TEACHER_EPOCHS = {"vgg": 3, "resnet": 2}
SHAPE: dict[str, Any] = {"num_classes": 10, "input_shape": (1, 28, 28)}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg": lambda: vgg(8, (16, 32, 64, 64, 64), **SHAPE),
    "resnet": lambda: resnet(8, (8, 8, 24, 80), **SHAPE),
    "thin vgg": lambda: vgg(8, (8, 16, 24, 24, 24), **SHAPE),
    "thin resnet": lambda: resnet(8, (4, 4, 8, 32), **SHAPE),
}
METHODS: dict[str, tuple[float, dict[str, Any]]] = {  # published weight; options of the term
    "kd": (0.9, {}),
    "dkd": (1, {"beta": 6, "schedule": Linear(0, 1, 1)}),
    "dist": (2, {}),
    "hint": (100, {"student_taps": [1], "teacher_taps": [1]}),
    "at": (1000, {}),
    "sp": (3000, {}),
    "pkt": (30000, {}),
    "rkd": (1, {}),
    "vid": (1, {}),
    "crd": (0.8, {"negatives": 512}),
}
STAGES = {"student_taps": [0, 1, 2], "teacher_taps": [0, 1, 2]}  # of networks with four stages and with three
LOSSES = Mapping[str, Any]


def data_of(seed: int, batch: int, images: int | None = None) -> Any:
    """The training images of a seed, and validation."""
    options = ["data=fashion_mnist", f"data.seed={seed}", f"data.split_seed={seed}", f"recipe.batch_size={batch}"]
    options += [f"data.train_size={images}"] if images else []
    data = make(checked(options)["data"], "data")
    data.setup()
    return data


def trained(
    data: Any, name: str, seed: int, loss: LOSSES, epochs: int, teacher: nn.Module | None = None, rate: float = RATE
) -> tuple[nn.Module, float]:
    """Train by SGD with a half-cosine; return the network, and its top-1 on validation after the last epoch."""
    torch.manual_seed(seed)
    result = kd.distill(
        *(NETWORKS[name](), teacher, data.train_dataloader(), data.val_dataloader()),
        epochs=epochs,
        val_every=epochs,
        scheduler_interval="step",
        loss=loss,
        optimizer=partial(torch.optim.SGD, lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True),
        seed=seed,
        accelerator="cpu",
        verbose=False,
        train_index=data.train_index,
        train_targets=data.train_targets,
    )
    return result.student, result.history[-1]["val/acc1"]


def losses(student: str, teacher: str, method: str, times: float) -> LOSSES:
    """A method at ``times`` its published weight, beside labels."""
    weight, options = METHODS[method]
    if method in ("at", "vid") and not student.endswith(teacher):
        options = {**options, **STAGES}
    return {"ce": 0.1 if method == "kd" else 1.0, method: {"weight": times * weight, **options}}


def table(arm: str, found: dict[str, list[float]], base: list[float] | None) -> list[float]:
    """Print an arm's settings and return the values of the best; the spread is of the differences from ``base``."""
    best = max(found, key=lambda setting: mean(found[setting]))
    for setting, values in found.items():
        paired = [] if base is None else [a - b for a, b in zip(values, base, strict=True)]
        change = f"{100 * mean(paired):+.2f} ± {100 * stdev(paired):.2f}" if paired else "–"
        mark = "**" if setting == best else ""
        value = f"{100 * mean(values):.2f} ± {100 * stdev(values):.2f}"
        print(f"| {arm} | {mark}{setting}{mark} | {value} | {change} |", flush=True)
    return found[best]


def pilot() -> None:
    """Run the three settings of each arm."""
    small = {seed: data_of(seed, 64, IMAGES) for seed in SEEDS}
    print("| arm | setting | val top-1, % | − labels, points |\n| :-- | :-- | --: | --: |", flush=True)
    teachers: dict[str, dict[int, nn.Module]] = {}
    for name, epochs in TEACHER_EPOCHS.items():
        made = {seed: trained(data_of(seed, 128), name, seed, {"ce": 1.0}, epochs) for seed in SEEDS}
        teachers[name] = {seed: network for seed, (network, _) in made.items()}
        table(f"teacher {name}", {f"{epochs} epochs": [accuracy for _, accuracy in made.values()]}, None)

    def over(student: str, loss: LOSSES, teacher: str | None = None, epochs: int = EPOCHS, rate: float = RATE) -> Any:
        taught = teachers[teacher] if teacher else {}
        return [trained(small[s], student, s, loss, epochs, taught.get(s), rate)[1] for s in SEEDS]

    def methods(student: str, teacher: str, names: tuple[str, ...], base: list[float]) -> list[list[float]]:
        changes = []
        for name in names:
            found = {f"× {t:g}": over(student, losses(student, teacher, name, t), teacher) for t in (0.25, 1, 4)}
            best = table(f"{teacher} → {student}: {name}", found, base)
            changes.append([a - b for a, b in zip(best, base, strict=True)])
        return changes

    base = over("thin vgg", {"ce": 1.0})
    table("thin vgg, labels", {f"rate {RATE}": base}, None)
    faster = {f"rate {r}": over("thin vgg", {"ce": 1.0}, rate=r) for r in (0.025, 0.1, 0.2)}
    table("thin vgg, labels, another rate", faster, base)
    smoothing = {f"smoothing {s}": over("thin vgg", {"ce": {"label_smoothing": s}}) for s in (0.05, 0.1, 0.2)}
    table("thin vgg, smoothed labels", smoothing, base)
    table("thin vgg, labels, longer", {"twice as long": over("thin vgg", {"ce": 1.0}, epochs=2 * EPOCHS)}, base)
    changes = methods("thin vgg", "vgg", tuple(METHODS), base) + methods("thin vgg", "resnet", tuple(METHODS), base)
    other = over("thin resnet", {"ce": 1.0})
    table("thin resnet, labels", {f"rate {RATE}": other}, None)
    changes += methods("thin resnet", "vgg", ("at",), other)
    pooled = mean(stdev(change) ** 2 for change in changes) ** 0.5
    print(f"| chosen settings, pooled |  |  | spread {100 * pooled:.2f} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    pilot()
