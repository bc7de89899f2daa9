"""Choose rate, smoothing, temperature and share of labels on validation, eight settings an arm, and print the spreads.

``python experiments/many_classes/pilot.py DATA FOLDER_OF_THE_ENCODER`` prints a table of the README; DATA is
``clinc150`` or ``banking77``. Its seeds are not those of the study, and it does not read the test set. Networks, data,
losses and recipe are those of ``study.yaml``, in a bare loop.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd.config.compose import checked
from kd.config.instantiate import make
from kd.losses.functional import kl_divergence
from kd.models.mlp import mlp

SEEDS = range(900, 905)
TEACHER, ASSISTANT, STUDENT = 256, 64, 16
EPOCHS, BATCH = 30, 250
ROWS = {"clinc150": 1500, "banking77": 770}
"""Ten training texts a class."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits, targets, rows of the training set) → scalar."""


@dataclass
class Splits:
    """Vectors and classes of the training texts of one seed, and of validation."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, name: str, encoder: str, seed: int) -> Splits:
        """Read the data as the study does."""
        rows = f"data.train_size={ROWS[name]}"
        options = [f"data={name}_features", f"data.encoder={encoder}", f"data.seed={seed}", rows]
        data = make(checked(options)["data"], "data")
        data.setup()
        return cls(*((data.parts[split].inputs, data.parts[split].targets) for split in ("train", "val")))


def trained(splits: Splits, units: int, seed: int, loss: Loss, lr: float, epochs: int = EPOCHS) -> nn.Module:
    """Train an MLP by Adam with a half-cosine, as ``recipe=digits``."""
    torch.manual_seed(seed)
    inputs, targets = splits.train
    network = mlp([units], num_classes=int(targets.max()) + 1, input_shape=(inputs.shape[1],))  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            loss(network(inputs[rows]), targets[rows], rows).backward()
            optimizer.step()
        scheduler.step()
    return network.eval()


def accuracy(splits: Splits, network: nn.Module) -> float:
    """Top-1 on validation."""
    inputs, targets = splits.val
    with torch.inference_mode():
        return float((network(inputs).argmax(1) == targets).double().mean())


def labels(smoothing: float = 0.0) -> Loss:
    """Cross-entropy with the labels."""
    return lambda logits, targets, _: F.cross_entropy(logits, targets, label_smoothing=smoothing)


def soft(splits: Splits, teacher: nn.Module, temperature: float, share: float) -> Loss:
    """Soft targets of a teacher, beside a ``share`` of the labels."""
    with torch.inference_mode():
        known = teacher(splits.train[0])
    known = known.clone()

    def loss(logits: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        found = (1 - share) * kl_divergence(logits, known[rows], temperature)
        return found + share * F.cross_entropy(logits, targets) if share else found

    return loss


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
    if squares:
        print(f"| {arm} | all settings pooled |  | spread {100 * mean(squares) ** 0.5:.2f} |", flush=True)
    return best


def over(
    settings: Iterable[str], run: Callable[[str, int], nn.Module], splits: dict[int, Splits]
) -> dict[str, list[float]]:
    """Return the accuracy of each setting for each seed."""
    return {s: [accuracy(splits[seed], run(s, seed)) for seed in splits] for s in settings}


def pilot(name: str, encoder: str) -> None:
    """Run the eight settings of each arm."""
    splits = {seed: Splits.of(name, encoder, seed) for seed in SEEDS}
    print("| arm | setting | val top-1, % | − labels, points |\n| :-- | :-- | --: | --: |")
    rates = ["0.002", "0.005", "0.007", "0.01", "0.015", "0.02", "0.03", "0.05"]

    def by_rate(units: int) -> Callable[[str, int], nn.Module]:
        return lambda lr, seed: trained(splits[seed], units, seed, labels(), float(lr))

    rate_t = float(table("teacher", over(rates, by_rate(TEACHER), splits), None))
    rate = table("student, labels", plain := over(rates, by_rate(STUDENT), splits), None)
    base, lr = plain[rate], float(rate)
    smoothing = over(
        ["0.02", "0.05", "0.1", "0.15", "0.2", "0.3", "0.4", "0.5"],
        lambda s, seed: trained(splits[seed], STUDENT, seed, labels(float(s)), lr),
        splits,
    )
    table("smoothing", smoothing, base)
    longer = over(
        ["3 times as long"], lambda _, seed: trained(splits[seed], STUDENT, seed, labels(), lr, 3 * EPOCHS), splits
    )
    table("longer", longer, base)
    teachers = {seed: trained(splits[seed], TEACHER, seed, labels(), rate_t) for seed in splits}
    firsts = {seed: trained(splits[seed], STUDENT, seed, labels(), lr) for seed in splits}
    grid = [f"T = {t}, labels {share}" for t in (1, 2, 4, 8) for share in (0.1, 0.5)]

    def of(teacher: dict[int, nn.Module], units: int, shift: int = 0) -> Callable[[str, int], nn.Module]:
        def run(setting: str, seed: int) -> nn.Module:
            t, share = setting.removeprefix("T = ").split(", labels ")
            return trained(
                splits[seed], units, seed + shift, soft(splits[seed], teacher[seed], float(t), float(share)), lr
            )

        return run

    kd = table("soft targets", distilled := over(grid, of(teachers, STUDENT), splits), base)
    table("born again", over(grid, of(firsts, STUDENT, 1000), splits), base)
    assistants = {seed: of(teachers, ASSISTANT)(kd, seed) for seed in splits}
    print(
        f"assistant: {100 * mean(accuracy(splits[s], n) for s, n in assistants.items()):.2f}; below, minus soft targets"
    )
    table("through an assistant", over(grid, of(assistants, STUDENT), splits), distilled[kd])


if __name__ == "__main__":
    torch.set_num_threads(1)
    pilot(sys.argv[1], sys.argv[2])
