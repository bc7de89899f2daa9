"""The root schema of a run: every section, its names, types and defaults. No torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf


@dataclass
class Surgery:
    """What the student keeps of its teacher, where it is made from it (model@student=none); all null: nothing."""

    layers: Any = None  # how many of its layers, or which: [0, 2, 4]
    keep: str | None = None  # which, of a number: uniform (null: the same), every_other, first, last, ends
    hidden: int | None = None  # width of the hidden states, whole heads; the units with the largest weights stay
    heads: int | None = None  # of attention, at the same width, where there is a head_dim (Llama, not BERT)
    intermediate: int | None = None  # width of the feed-forward layers
    embeddings: str | None = None  # copied (null: the same), tied (the output projection is the same matrix), random
    initialise: bool | None = None  # false: the shape alone, all weights random


@dataclass
class Student:
    """The network that is trained."""

    model: Any = MISSING  # _target_ and its arguments; null: made from the teacher by surgery
    surgery: Surgery = field(default_factory=Surgery)
    checkpoint: str | None = None  # weights to start from; null: random
    epoch: str | None = None  # of a run directory: selected (by validation; null: the same) or last
    new_head: bool | None = None  # true: all of the checkpoint but its classifier, which is new, for other classes


@dataclass
class Teacher:
    """The frozen network, or several, that the student learns from."""

    model: Any = None  # null: no teacher, or the network recorded in the run directory given as checkpoint
    checkpoint: Any = None  # a run directory, .ckpt, .safetensors or state dict; a list: several teachers
    epoch: str | None = None  # of run directories: selected (by validation; null: the same) or last
    allow_random: bool = False  # a teacher without trained weights must be asked for
    combine: str = "probabilities"  # several teachers: mean of "probabilities" or of "logits"
    weights: list[float] | None = None  # several teachers: one weight each; null: equal
    mean: list[float] | None = None  # statistics of its input; null: recorded with it, else those of the data
    std: list[float] | None = None
    cache: bool | None = None  # true: answer each training image once, before the first epoch
    optimize: bool = True  # batch norms folded, channels last, where the first batch's answers stay the same
    trust: bool | None = None  # true: build what the checkpoint's own file names, also code from outside the libraries
    answers: Any = None  # _target_ of a kd.distill.answers.Answers in the place of live networks; null: these
    resize: Any = None  # an edge in pixels, or false: feed as is; null: refuse when the sizes differ


@dataclass
class Recipe:
    """Optimiser, schedule, length, batch."""

    epochs: int | None = None  # the length of the run, in epochs or in steps of the optimiser: one of the two
    steps: int | None = None
    batch_size: int = MISSING
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: Any = None  # _target_ and its arguments; null: a constant rate
    scheduler_interval: str = "epoch"  # or "step"
    warmup: float | None = None  # the rate rises linearly for so many epochs; steps, where the length is in steps
    warmup_start: float | None = None  # share of the rate to begin with; null: 0
    no_decay: str | None = None  # norm_and_bias: no weight decay for norms, biases, embeddings, tokens
    layer_decay: float | None = None  # factor of the rate from a layer to the one before it
    body_lr: Any = None  # of all of the student but its classifier: a rate, or xFACTOR of the optimiser's
    frozen_body: float | None = None  # share of the run that trains the student's classifier alone; 1: nothing else
    frozen_norms: bool | None = None  # true: batch norms keep the statistics that the student began with
    groups: Any = None  # [{pattern: glob or regex, lr: rate or xFACTOR, weight_decay: …}]; a parameter's first match
    ema: Any = None  # {decay: 0.999, warmup: true}: the average of the student is what is measured and kept
    networks: Any = None  # {NAME: {optimizer: …, scheduler: …}} of a set-up's network with an optimiser of its own
    gradient_clip: float | None = None
    accumulate: int = 1  # batches of a step, which is that of one batch with the rows of all


@dataclass
class Hardware:
    """Where and how it runs; ``trainer`` holds further arguments of ``lightning.Trainer``.

    With several processes (a process a device) a run is the same run: ``recipe.batch_size`` is split over them.
    """

    accelerator: str = "auto"
    devices: Any = 1  # of each node: how many, a list of GPU numbers, or auto: all GPUs
    num_nodes: int | None = None  # null: one, or what torchrun or Slurm says
    cluster: str | None = None  # who starts the processes: null: kd itself, on this machine; torchrun; slurm
    strategy: str = "auto"  # ddp, fsdp (student and teacher sharded), or auto: ddp where there are several processes
    sync_batchnorm: bool = False  # batch statistics over all processes (GPUs)
    compile: str | None = None  # mode of torch.compile (default, reduce-overhead, …); null: eager
    compiled: list[str] = field(default_factory=lambda: ["student", "teacher"])  # the networks that it compiles
    channels_last: bool = True  # memory format of images and convolutions, where a network answers the same with it
    loss_chunk: int | None = None  # rows of which a vocabulary's logits are there at a time; null: as suits; 0: all
    liger: Any = "auto"  # Liger's kernels for these losses on a GPU, where installed and faster; false: never
    gradient_checkpointing: bool = False  # of the student: activations are computed again in the backward pass
    keep_memory: bool = True  # glibc (Linux) keeps the memory that tensors leave: large ones are faster on a CPU
    precision: str = "32-true"
    threads: int | None = None  # of torch on the CPU; null: torch's choice
    timeout_s: int = 1800  # of several processes: how long each waits for the others before the run fails
    deterministic: Any = "warn"  # true, false, or "warn" where an operation has no deterministic form
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass
class Protocol:
    """Which split picks the checkpoint, how often it validates, what is kept."""

    monitor: str | None = None  # null: the first metric of the task, on val
    mode: str | None = None  # max or min; null: what is better for the metric
    val_every: int | None = 1  # epochs between validations; the end of the run is always validated
    val_every_steps: int | None = None  # steps of the optimiser between them, in place of epochs
    keep_predictions: bool = False  # write predictions_val.npz and predictions_test.npz


@dataclass
class Paths:
    """Folders."""

    data: str = MISSING
    runs: str = MISSING


@dataclass
class Root:
    """Everything a run is made of. Unknown keys are errors."""

    name: str = MISSING
    seed: int = 0
    tags: list[str] = field(default_factory=list)
    notes: str = ""
    student: Student = field(default_factory=Student)
    teacher: Teacher = field(default_factory=Teacher)
    task: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    networks: dict[str, Any] = field(default_factory=dict)  # further networks of a set-up, by name: peers, a generator
    recipe: Recipe = field(default_factory=Recipe)
    distiller: dict[str, Any] = field(default_factory=dict)
    hardware: Hardware = field(default_factory=Hardware)
    logger: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)  # Lightning's, or your own, beside those of every run
    protocol: Protocol = field(default_factory=Protocol)
    paths: Paths = field(default_factory=Paths)
    resume: str | None = None


# sections that hold a _target_, or nodes with one
OPEN = (
    *("student", "teacher", "task", "data", "loss", "networks", "recipe", "distiller", "hardware", "logger"),
    "callbacks",
)


def open_schema() -> Any:
    """Make the schema, open where a ``_target_`` may be: arguments need no ``+``; :mod:`kd.config.keys` checks them."""
    root = OmegaConf.structured(Root)
    for name in OPEN:
        OmegaConf.set_struct(root[name], False)
    return root


ConfigStore.instance().store(name="schema", node=open_schema())
OmegaConf.register_new_resolver(
    "kd.digest", lambda value: hashlib.sha256("\n".join(map(str, value)).encode()).hexdigest()[:8], replace=True
)
OmegaConf.register_new_resolver("kd.or", lambda value, default: default if value is None else value, replace=True)
OmegaConf.register_new_resolver(
    "kd.if", lambda value, wanted, then, otherwise: then if value == wanted else otherwise, replace=True
)
