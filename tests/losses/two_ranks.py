"""Every term of ``conf/loss``, on one process and on two: values, gradients and what terms keep.

``python -m tests.losses.two_ranks FOLDER RANK WORLD_SIZE``, with ``MASTER_ADDR`` and ``MASTER_PORT``: writes
``FOLDER/WORLD_SIZE_RANK.pt``, for each term a mapping.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from kd.config.keys import OBJECTIVE_KEYS
from kd.distill.objective import Objective
from kd.losses.base import UNLABELLED, Batch, Output, Setup, Term
from kd.parallel import group
from kd.run.build import make

CONF = Path(__file__).parents[2] / "conf" / "loss"
HEADS = {"heads": 2, "relation_heads": 4}
BANKS = {"negatives": 4, "queue": 6}  # of terms that remember samples: fewer than there are
WIDTHS = {"student": 8, "teacher": 12}
# the authors' attention_mse counts padding, of which each process has its own; the first stage of ft reads no student
CHOSEN: dict[str, dict[str, Any]] = {"attention_mse": {"variant": "masked"}, "ft": {"epochs": 0}}
ROWS, SPLIT, CLASSES = 9, 5, 5  # process 0 gets 5 rows, process 1 gets 4, with fewer labels
DRAWS = 600  # of a term that draws random numbers: its mean is compared


def names() -> list[str]:
    """The terms that the package ships."""
    return sorted(file.stem for file in CONF.glob("*.yaml"))


def term(name: str, settings: dict[str, Any] | None = None) -> Term:
    """A term with the settings of its YAML, and those of ``settings`` that it has; with as many heads as there are."""
    (node,) = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml")).values()  # type: ignore[union-attr]
    given = {**HEADS, **BANKS, **(CHOSEN.get(name, {}) if settings is None else settings)}
    node |= {key: value for key, value in given.items() if key in node}
    built: Term = make({k: v for k, v in node.items() if k not in OBJECTIVE_KEYS}, f"loss.{name}")
    for side in ("student", "teacher"):
        taps = getattr(built, f"{side}_taps")
        stages = list(range(6 if reads_hidden(built) else 2))
        if taps is None or len(taps):
            read = stages if taps is None or reads_hidden(built) else stages[-len(taps) :]
            setattr(built, f"{side}_taps", [f"{side}{stage}" for stage in read])
    return built


def networks() -> dict[str, nn.Module]:
    """What a term may look at in the networks: batch norms before the taps, classifiers of the last ones."""
    widths = {"student": (4, 6), "teacher": (5, 7)}
    made = {}
    for side, (first, last) in widths.items():
        norms = {f"{side}0": nn.BatchNorm2d(first), f"{side}1": nn.BatchNorm2d(last)}
        made[side] = nn.ModuleDict({**norms, "fc": nn.Linear(last, CLASSES)}).double()
    return made


def reads_hidden(built: Term) -> bool:
    """Whether a term compares hidden states (samples, positions, width), and their mask."""
    return type(built).__module__.startswith("kd.losses.hidden.")


def drawn(hidden: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor], Batch]:
    """Tensors of student and teacher by name, and the whole batch; of ``hidden`` states padded to the longest."""
    random = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(ROWS, *shape, generator=random, dtype=torch.float64)

    if hidden:
        mask = torch.arange(6) < torch.tensor([4, 2, 3, 1, 4, 6, 3, 5, 2]).unsqueeze(1)  # process 0 pads to 4
        own, other = ({f"{side}{n}": normal(6, width) for n in range(6)} for side, width in WIDTHS.items())
        return own, other, Batch(normal(1), None, torch.arange(ROWS), mask)
    student = {"logits": 3 * normal(CLASSES), "student0": normal(4, 8, 8), "student1": normal(6, 4, 4)}
    teacher = {"logits": 3 * normal(CLASSES), "teacher0": normal(5, 8, 8), "teacher1": normal(7, 4, 4)}
    targets = torch.tensor([0, 1, UNLABELLED, 3, 4, 0, UNLABELLED, UNLABELLED, 2])
    views = {"strong": normal(1)}
    return student, teacher, Batch(normal(1), targets, torch.arange(ROWS) * 2, views=views)


def step(objective: Objective, rows: slice, seed: int) -> dict[str, Any]:
    """One step on these rows: total, values and gradients of what the student has made and the term has learned."""
    ((_, term_),) = objective.items()
    student, teacher, batch = drawn(reads_hidden(term_))
    leaves = {name: tensor.requires_grad_() for name, tensor in student.items()}
    part = batch.map(lambda t: t[rows])
    length = None if part.mask is None else int(part.mask.sum(1).max())
    if length is not None:
        part.mask = part.mask[:, :length]

    def output(tensors: dict[str, Tensor]) -> Output:
        features = {name: tensor[rows] for name, tensor in tensors.items() if name != "logits"}
        if length is not None:
            features = {name: tensor[:, :length] for name, tensor in features.items()}
        return Output(tensors["logits"][rows] if "logits" in tensors else None, features)

    labelled = torch.tensor(0) if part.targets is None else (part.targets != UNLABELLED).sum()
    shares = group.shares(len(part), labelled, len(part), part.mask)
    torch.manual_seed(seed)
    values, total = objective(output(leaves), output(teacher), part, 1.0, 4, shares)
    objective.zero_grad()
    total.backward()
    learned = {f"term.{n}": p for n, p in objective.named_parameters()}
    zero = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in {**leaves, **learned}.items()}
    return {"total": total.detach(), "values": values[0].detach(), "gradients": {n: g.clone() for n, g in zero.items()}}


def run(folder: Path, rank: int, world_size: int) -> None:
    """All terms, each prepared alike on every process."""
    torch.set_num_threads(1)
    if world_size > 1:
        group.join("gloo", rank, world_size, 120)
    rows = slice(None) if world_size == 1 else (slice(0, SPLIT), slice(SPLIT, None))[rank]
    found = {}
    for name in names():
        built = term(name)
        student, teacher, batch = drawn(reads_hidden(built))
        torch.manual_seed(0)
        own, other = (
            Output(t.get("logits"), {k: v for k, v in t.items() if k != "logits"}) for t in (student, teacher)
        )
        index, targets = torch.arange(ROWS) * 2, batch.targets
        built.prepare(Setup(own, other, batch, networks(), index, targets, CLASSES, epochs=4, steps=8))
        objective = Objective({name: built.double()})
        first, second = (step(objective, rows, seed) for seed in (1, 2))
        draws = [step(objective, rows, 10 * seed + rank)["total"] for seed in range(DRAWS)] if _draws(name) else []
        found[name] = {"steps": [first, second], "draws": draws, "buffers": dict(built.named_buffers())}
    torch.save(found, folder / f"{world_size}_{rank}.pt")
    group.leave()


def _draws(name: str) -> bool:
    """Whether a term draws random numbers: the same step with another seed is another number."""
    torch.manual_seed(0)
    built = term(name)
    student, teacher, batch = drawn(reads_hidden(built))
    own, other = (Output(t.get("logits"), {k: v for k, v in t.items() if k != "logits"}) for t in (student, teacher))
    built.prepare(
        Setup(own, other, batch, networks(), torch.arange(ROWS) * 2, batch.targets, CLASSES, epochs=4, steps=8)
    )
    built.double().eval()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(built(own, other, batch).item())
    return results[0] != results[1]


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
