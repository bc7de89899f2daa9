"""Choose rate, temperature and weight on validation, two settings an arm, and print the spreads.

``python experiments/pixel_stamps/pilot.py`` prints the tables of the README. Its seeds are not those of the study, and
it does not read the test set. Networks, data, losses and recipe are those of ``study.yaml``, in a bare loop.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd.config.compose import checked
from kd.config.instantiate import make
from kd.distill.evaluation import measure
from kd.losses.functional import channel_wise_divergence, kl_divergence
from kd.models.timm_unet import TimmUNet, timm_unet
from kd.tasks.base import Want
from kd.tasks.segmentation import Segmentation

SEEDS = (900, 901, 902)
EPOCHS, BATCH, IMAGES = 12, 8, 500
SIZES = {"teacher": (16, 12), "student": (4, 4)}  # channels of the encoder's first stage, of the decoder
TASK = Segmentation()
Parts = dict[str, Tensor]
"""``rows`` (pixels, classes), ``maps`` of logits, ``features`` before the classifier."""
Loss = Callable[[Parts, Parts], Tensor]


def network(size: str) -> TimmUNet:
    """A U-Net on a ResNet of ten layers."""
    first, width = SIZES[size]
    channels = tuple(first * 2**stage for stage in range(4))
    more: dict[str, Any] = {"channels": channels, "stem_width": first}
    return timm_unet("resnet10t", width, num_classes=9, input_shape=(3, 64, 64), **more)


def data_of(seed: int) -> Any:
    """The training images of a seed, and validation."""
    options = ["data=segmentation", "data.folder=stamps_seg", "data.augment.pad=4", "task=segmentation"]
    options += [f"data.seed={seed}", f"data.train_size={IMAGES}"]
    data = make(checked([*options, f"recipe.batch_size={BATCH}"])["data"], "data")
    data.setup()
    return data


def parts(net: TimmUNet, batch: Any) -> Parts:
    """What losses read of a network's answer to a batch."""
    found: Parts = {}
    hook = net.classifier.register_forward_pre_hook(lambda _, given: found.update(features=given[0]))
    output = TASK.answer(net, batch.inputs.contiguous(memory_format=torch.channels_last), batch, Want())
    hook.remove()
    found.update(rows=output.logits, maps=output.raw if output.raw is not None else output.logits)
    return found


def trained(
    data: Any,
    size: str,
    seed: int,
    lr: float,
    teacher: TimmUNet | None = None,
    loss: Loss | None = None,
    times: int = 1,
) -> float | TimmUNet:
    """Train by AdamW with a half-cosine; return the network of a teacher, of a student its mIoU on validation."""
    torch.manual_seed(seed)
    net = network(size).to(memory_format=torch.channels_last)
    adapter = nn.Conv2d(SIZES["student"][1], SIZES["teacher"][1], 1)
    learned = [*net.parameters(), *adapter.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * times)
    loader = data.train_dataloader()
    for epoch in range(EPOCHS * times):
        net.train()
        loader.set_epoch(epoch)
        for batch in loader:
            batch = TASK.rows(batch)
            own = parts(net, batch)
            total = F.cross_entropy(own["rows"], batch.targets)
            if teacher is not None and loss is not None:
                with torch.no_grad():
                    other = parts(teacher, batch)
                total = total + loss({**own, "adapted": adapter(own["features"])}, other)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        scheduler.step()
    net.eval()
    if size == "teacher" and teacher is None:
        return net
    return miou(net, data)


def miou(net: TimmUNet, data: Any) -> float:
    """MIoU on validation."""

    def answer(batch: Any) -> Any:
        return TASK.answer(net, batch.inputs, batch, Want())

    return measure(TASK, 9, answer, data.val_dataloader(), torch.device("cpu"))[0]["miou"]


def table(arm: str, found: dict[str, list[float]], base: list[float] | None) -> str:
    """Print an arm's settings and return the best; the spread is that of the paired difference from ``base``."""
    best = max(found, key=lambda setting: mean(found[setting]))
    squares = []
    for setting, values in found.items():
        paired = [] if base is None else [a - b for a, b in zip(values, base, strict=True)]
        squares += [stdev(paired) ** 2] if paired else []
        change = f"{100 * mean(paired):+.2f} ± {100 * stdev(paired):.2f}" if paired else "–"
        mark = "**" if setting == best else ""
        print(
            f"| {arm} | {mark}{setting}{mark} | {100 * mean(values):.2f} ± {100 * stdev(values):.2f} | {change} |",
            flush=True,
        )
    if len(squares) > 1:
        print(f"| {arm} | all settings pooled |  | spread {100 * mean(squares) ** 0.5:.2f} |", flush=True)
    return best


def pilot() -> None:
    """Run the settings of each arm."""
    data = {seed: data_of(seed) for seed in SEEDS}
    print("| arm | setting | val mIoU, % | − labels, points |\n| :-- | :-- | --: | --: |", flush=True)
    teachers: dict[str, dict[int, Any]] = {
        lr: {seed: trained(data[seed], "teacher", seed, float(lr)) for seed in SEEDS} for lr in ("0.005", "0.01")
    }
    rate = table(
        "teacher", {lr: [miou(net, data[s]) for s, net in nets.items()] for lr, nets in teachers.items()}, None
    )
    taught = teachers[rate]

    def over(lr: float, loss: Loss | None = None, times: int = 1) -> list[float]:
        return [float(trained(data[s], "student", s, lr, taught[s], loss, times)) for s in SEEDS]  # type: ignore[arg-type]

    plain = {lr: over(float(lr)) for lr in ("0.005", "0.01")}
    lr = float(best := table("student, labels", plain, None))
    base = plain[best]
    table("labels, twice as long", {"24 epochs": over(lr, times=2)}, base)

    def pixels(temperature: float) -> Loss:
        return lambda own, other: kl_divergence(own["rows"], other["rows"], temperature)

    def channels(name: str, temperature: float, weight: float) -> Loss:
        side = "adapted" if name == "features" else "maps"
        return lambda own, other: weight * channel_wise_divergence(own[side], other[name], temperature)

    table("pixel KD", {f"T = {t}": over(lr, pixels(t)) for t in (1, 2)}, base)
    for name, settings in {"maps": ((1, 5), (4, 3)), "features": ((1, 10), (4, 35))}.items():
        found = {f"T = {t}, weight {w}": over(lr, channels(name, t, w)) for t, w in settings}
        table(f"CWD, {'logits' if name == 'maps' else name}", found, base)


if __name__ == "__main__":
    torch.set_num_threads(1)
    pilot()
