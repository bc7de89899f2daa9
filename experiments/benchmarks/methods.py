"""What a training step costs with each loss of ``conf/loss``, relative to a step with ``kd`` on the same networks.

    OMP_NUM_THREADS=1 python experiments/benchmarks/methods.py [NAME ...] [rounds=7]

A step is forward of both networks, the loss with its weight 1, backward and SGD. Each loss is measured on the first of
these pairs that it can compare, beside ``kd`` on the same pair, in turns; the figure is the median over rounds of the
ratio of the two. Losses that no pair fits (two tokenizers) are listed with the reason, and have no figure.

- images: resnet56 → resnet20, 64 × 3 × 32 × 32, 100 classes; with two views where a loss reads them
- masked: a BERT of 4 layers × 128 → 2 layers, 32 × 32 tokens of which 15 % are masked, 2,000 entries
- causal: a Llama of the same size, 32 × 32 tokens

``experiments/benchmarks/methods.csv`` is written at the end, which ``kd methods`` shows; losses that were not named
stay in it as they are.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kd.cli.methods import collect
from kd.config.compose import checked
from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch
from kd.models.transformers_model import transformers_model
from kd.run import build
from kd.tasks.tokens import CausalLM, MaskedLM

OUT = Path(__file__).with_suffix(".csv")
CLASSES, ENTRIES, TOKENS = 100, 2000, 32
BERT = {"model_type": "bert", "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}
BERT |= {"vocab_size": ENTRIES, "max_position_embeddings": TOKENS}
SETTINGS = {
    "ft": ["loss.ft.epochs=0"],  # what follows its first stage
    "minilmv2": ["loss.minilmv2.relation_heads=8"],  # of 16 numbers each, as published for BERT's 768
}
LLAMA = {**BERT, "model_type": "llama", "num_key_value_heads": 2}


def on_images(name: str) -> Callable[[], None]:
    """Return a step on images, by the objects that ``kd train`` builds."""
    overrides = ["data=fake", "data.shape=[3,32,32]", f"data.num_classes={CLASSES}", "data.train_images=20000"]
    overrides += ["model@student=resnet20", "model@teacher=resnet56", "teacher.allow_random=true", "hardware=cpu"]
    overrides += ["recipe.batch_size=64", f"loss=[{name}]", f"loss.{name}.weight=1", *SETTINGS.get(name, ())]
    config = checked(overrides)
    data = build.datamodule(config)
    data.setup("fit")
    module = build.distiller(config, data)
    return stepped(module, next(iter(data.train_dataloader())))


def on_tokens(name: str, masked: bool) -> Callable[[], None]:
    """Return a step on tokens."""
    from kd.distill.distiller import Distiller
    from kd.distill.teacher import Teacher

    torch.manual_seed(0)
    kind = "masked_lm" if masked else "causal_lm"
    student, teacher = (
        transformers_model(config={**(BERT if masked else LLAMA), "num_hidden_layers": n}, architecture=kind)
        for n in (2, 4)
    )
    objective = build.objective(checked([f"loss=[{name}]", f"loss.{name}.weight=1", *SETTINGS.get(name, ())]))
    ids = torch.randint(5, ENTRIES, (32, TOKENS))
    hidden = torch.rand(ids.shape) < 0.15
    hidden[:, 0] = True
    mask = torch.ones_like(ids)
    batch = Batch(
        {"input_ids": ids, "attention_mask": mask},
        torch.where(hidden, ids, UNLABELLED) if masked else ids,
        torch.arange(len(ids)),
        mask.bool(),
    )
    task = MaskedLM() if masked else CausalLM()
    module = Distiller(student, Teacher([teacher], task=task), objective, task)
    module.prepare(batch)
    return stepped(module, batch)


PAIRS: dict[str, Callable[[str], Callable[[], None]]] = {
    "images": on_images,
    "masked": lambda name: on_tokens(name, True),
    "causal": lambda name: on_tokens(name, False),
}


def stepped(module: Any, batch: Batch) -> Callable[[], None]:
    """Return a function that makes one step on a batch."""
    module.train()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        module.losses(module.task.rows(module.compose(batch))).total.backward()
        optimizer.step()

    step()
    return step


def measured(name: str, rounds: int, kd: dict[str, Callable[[], None]]) -> tuple[str, float, str]:
    """Return the pair that a loss fits and its ratio to ``kd`` there; without one "" and the reasons."""
    reasons = []
    for pair, made in PAIRS.items():
        try:
            step = made(name)
        except (KdError, ValueError) as error:
            reasons.append(f"{pair}: {str(error).splitlines()[0]}")
            continue
        kd[pair] = kd.get(pair) or made("kd")
        ratios = []
        for _ in range(rounds):
            times = []
            for turn in (step, kd[pair]):
                start = time.process_time()
                turn()
                times.append(time.process_time() - start)
            ratios.append(times[0] / times[1])
        return pair, statistics.median(ratios), ""
    return "", float("nan"), "; ".join(reasons)


def main(arguments: Sequence[str]) -> None:
    """Measure, print a line for each loss, write the table."""
    torch.set_num_threads(1)
    rounds = int(next((a.partition("=")[2] for a in arguments if a.startswith("rounds=")), 7))
    names = [a for a in arguments if "=" not in a]
    kd: dict[str, Callable[[], None]] = {}
    rows = {row["name"]: row for row in csv.DictReader(OUT.open(newline=""))} if names and OUT.is_file() else {}
    for method in collect():
        if names and method.name not in names:
            continue
        pair, ratio, reason = measured(method.name, rounds, kd)
        rows[method.name] = {"name": method.name, "pair": pair, "ratio": f"{ratio:.2f}" if pair else ""}
        print(f"{method.name:20} {pair:8} {f'{ratio:6.2f}' if pair else reason}", flush=True)
    with OUT.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("name", "pair", "ratio"), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
