"""What a distillation step on text costs: the bare loop, transformers' Trainer, TRL's two trainers and ``kd``.

    python experiments/benchmarks/text_step.py [CASE …] [rounds=5] [steps=6] [trl=FOLDER] [vocabulary=N] [tokens=N]

Cases: ``all`` (4 × 256 tokens, all of them supervised, V = 32,768), ``prompts`` (half of each row is a prompt),
``large`` (4 × 64 tokens, V = 131,072), ``on_policy`` (8 prompts of 64 tokens, 64 new ones), ``classification`` (32 × 64
tokens, 77 classes), ``kept`` (the rows of ``all``, the teacher's answers from the disk, beside labels alone). Teachers
are random networks of 4 layers × 256, students of 2 × 128: Llama, BERT for ``classification``. The loss is forward KL +
½ CE, on-policy and kept forward KL; AdamW; float32, one thread.

The bare loop makes all logits of both networks; also with the allocator's setting of ``hardware.keep_memory``. ``kd``
is Distiller and Trainer as ``kd train`` builds them, with a metrics file; also without that setting. TRL's trainers
have no CE; DistillationTrainer, which always samples, is handed the completions of the rows but in ``on_policy``. TRL
is no dependency: ``pip install --no-deps --target=FOLDER trl==1.16.0`` and ``trl=FOLDER``.

Each run is a process of its own, and they take turns. The first step warms up; time is the CPU's in the others. Ratios
are medians over the rounds, each to the first line in its round. Memory is the peak resident set over what is there
once the libraries are loaded, less the weights of the networks; of kept answers also while they are made. ``loss``: of
the first step, by which one sees that the work is the same.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import text_peers
import text_work
import torch
from text_work import CASES, LR, Case, Meter

from kd.config.compose import checked
from kd.losses.base import Batch
from kd.run import build, callbacks, trainer
from kd.tracking import loggers

FORWARD = ("loss=[kd]", "loss.kd.temperature=1")  # forward KL alone


class Rows(L.LightningDataModule):
    """The rows of a case as a data module; validation and test are two short ones, which cost next to nothing."""

    mean: tuple[float, ...] = ()
    random_view = None  # the same rows in every epoch: answers may be kept

    def __init__(self, case: Mapping[str, Any], steps: int) -> None:
        super().__init__()
        self.case, self.steps = Case(**case), steps
        self.num_classes = self.case.classes or self.case.vocabulary

    def made(self, case: Case, samples: int) -> Batch:
        """Rows as a batch."""
        inputs = text_work.rows(case, samples)
        targets, index = inputs.pop("labels"), torch.arange(samples)
        return Batch(inputs, targets, index, inputs["attention_mask"].bool())

    def train_dataloader(self) -> list[Batch]:
        """The batches of a run, one a step."""
        size, whole = self.case.samples, self.made(self.case, self.case.samples * self.steps)
        return [whole.map(lambda t, s=start: t[s : s + size]) for start in range(0, size * self.steps, size)]

    def val_dataloader(self) -> list[Batch]:
        """Two rows of four tokens."""
        return [self.made(replace(self.case, tokens=4, prompt=1), 2)]

    test_dataloader = val_dataloader
    answering_dataloader = train_dataloader


class Steps(L.Callback):
    """Note the end of each step, and the loss of the first."""

    observes_only = True

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, out: Any, batch: Any, idx: int) -> None:
        """Note it."""
        self.meter.note(out["loss"])
        self.meter.step()


def ours(case: Case, steps: int, meter: Meter, folder: Path, *more: str, loss: tuple[str, ...] = ()) -> None:
    """``kd``, as ``kd train`` builds it; ``loss``: settings in the place of the case's."""
    facts = ",".join(f"{key}: {value}" for key, value in vars(case).items() if key != "title")
    shape = f"vocabulary: {case.vocabulary}, tokens: {case.tokens}, classes: {case.classes}"
    node = f"{{_target_: text_work.network, {shape}, layers: "
    mixed = (FORWARD[0],) if case.new else ("loss=[ce,kd]", "loss.ce.weight=0.5")
    own = ["distiller=on_policy", "distiller.share=1.0", f"distiller.max_new_tokens={case.new}"] if case.new else []
    values = checked(
        [
            *("~data", "+data._target_=text_step.Rows", f"+data.case={{title: work, {facts}}}", f"+data.steps={steps}"),
            *("model@student=none", f"student.model={node}2, width: 128}}", "model@teacher=none"),
            *(
                f"teacher.model={node}4, width: 256}}",
                "teacher.allow_random=true",
                *(loss or (*mixed, FORWARD[1])),
                *own,
            ),
            f"task={'text_classification' if case.classes else 'causal_lm'}",
            *("recipe=finetune", f"recipe.optimizer.lr={LR}", "recipe.optimizer.weight_decay=0", "recipe.epochs=1"),
            *("recipe.no_decay=null", "recipe.warmup=null", "recipe.scheduler=null", "recipe.gradient_clip=null"),
            *(f"recipe.batch_size={case.samples}", "hardware=cpu", "hardware.threads=1", *more),
        ]
    )
    meter.begin()
    trainer.begin(values)
    data = build.datamodule(values)
    module = build.distiller(values, data)
    hooks = [*callbacks.standard(folder, trainer.selection(values["protocol"], module), {}), Steps(meter)]
    fitting = trainer.make_trainer(values, folder, [loggers.MetricsFile(folder)], hooks, module)
    fitting.fit(module, datamodule=data)


def ours_mapped(case: Case, steps: int, meter: Meter, folder: Path) -> None:
    """``kd`` without the allocator's setting."""
    ours(case, steps, meter, folder, "hardware.keep_memory=false")


def ours_alone(case: Case, steps: int, meter: Meter, folder: Path) -> None:
    """``kd`` with labels alone, no teacher."""
    ours(case, steps, meter, folder, "teacher.model=null", loss=("loss=[ce]",))


def ours_live(case: Case, steps: int, meter: Meter, folder: Path) -> None:
    """``kd`` with forward KL alone, the teacher in the same process."""
    ours(case, steps, meter, folder, loss=FORWARD)


def ours_kept(case: Case, steps: int, meter: Meter, folder: Path) -> None:
    """``kd`` with the teacher's top 64 tokens from the disk, which it writes there before the first step."""
    kept = f"{{_target_: kd.distill.cache.CachedAnswers, k: 64, folder: '{folder}'}}"
    ours(case, steps, meter, folder, f"teacher.answers={kept}", loss=("loss=[topk_kl]", "loss.topk_kl.k=64"))


def ours_hidden(case: Case, steps: int, meter: Meter, folder: Path) -> None:
    """``kd`` with the teacher's last hidden states from the disk, which give all its logits."""
    kept = f"{{_target_: kd.distill.cache.CachedAnswers, what: hidden, folder: '{folder}'}}"
    ours(case, steps, meter, folder, f"teacher.answers={kept}", loss=FORWARD)


CONTENDERS: dict[str, Callable[[Case, int, Meter, Path], None]] = {
    "bare loop": text_work.bare,
    "bare loop, memory kept": text_work.bare_kept,
    "transformers.Trainer": text_peers.transformers_trainer,
    "TRL GKDTrainer": text_peers.trl_gkd,
    "TRL DistillationTrainer": text_peers.trl_distillation,
    "kd": ours,
    "kd, keep_memory=false": ours_mapped,
}
OF_KEPT: dict[str, Callable[[Case, int, Meter, Path], None]] = {
    "kd, labels alone": ours_alone,
    "kd, live teacher": ours_live,
    "kd, top 64 kept": ours_kept,
    "kd, hidden states kept": ours_hidden,
}


def contenders(name: str, trl: str | None) -> list[str]:
    """The names of those that can do the work of a case and are installed; says which are not."""
    if name == "kept":
        return list(OF_KEPT)
    case = CASES[name]
    there = trl is not None or importlib.util.find_spec("trl") is not None
    names = [name for name in CONTENDERS if not (case.classes and "TRL" in name)]
    names = [name for name in names if not (case.new and name == "transformers.Trainer")]
    if not there and any("TRL" in name for name in names):
        print("TRL is not installed: its trainers are left out (see trl=FOLDER)")
    return [name for name in names if there or "TRL" not in name]


def measure(name: str, contender: str, options: Mapping[str, str]) -> tuple[float, float, float]:
    """Seconds a step, MiB over start and the first loss of one run, in this process."""
    case, steps = sized(name, options), int(options.get("steps", 6))
    torch.set_num_threads(1)
    trainer.quieten()
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        (OF_KEPT if name == "kept" else CONTENDERS)[contender](case, steps, meter, Path(folder))
    held = text_work.pair(case)[: 1 if contender == "kd, labels alone" else 2]
    weights = sum(p.numel() * p.element_size() for network in held for p in network.parameters())
    return meter.found(weights)


def sized(name: str, options: Mapping[str, str]) -> Case:
    """A case, with another vocabulary and other lengths where these are asked for."""
    case = CASES[name]
    tokens = int(options.get("tokens", case.tokens))
    new = case.new * tokens // case.tokens
    prompt = max(1, case.prompt * tokens // case.tokens)
    return replace(
        case, vocabulary=int(options.get("vocabulary", case.vocabulary)), tokens=tokens, prompt=prompt, new=new
    )


def compare(name: str, options: Mapping[str, str]) -> None:
    """Print the table of one case."""
    trl, given = options.get("trl"), [f"{key}={value}" for key, value in options.items()]
    path = os.pathsep.join([str(Path(__file__).parent), *([trl] if trl else []), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": path, "WANDB_MODE": "disabled", "TRL_EXPERIMENTAL_SILENCE": "1"}
    names = contenders(name, trl)
    found: dict[str, list[list[float]]] = {contender: [] for contender in names}
    for _ in range(int(options.get("rounds", 5))):
        for contender in names:
            command = [sys.executable, __file__, "measure", name, contender, *given]
            done = subprocess.run(command, capture_output=True, text=True, env=variables)
            if done.returncode:
                raise SystemExit(f"{contender} has failed: {done.stderr.strip().splitlines()[-1]}")
            found[contender].append([float(word) for word in done.stdout.split()[-3:]])
    case = sized(name, options)
    print(f"{case.title}, {case.samples} × {case.tokens} tokens")
    first = found[names[0]]
    for contender, runs in found.items():
        seconds, peak, loss = (statistics.median(column) for column in zip(*runs, strict=True))
        ratio = statistics.median(run[0] / other[0] for run, other in zip(runs, first, strict=True))
        print(f"  {contender:24} {1e3 * seconds:9.1f} ms  {ratio:5.2f} ×  {peak:6.0f} MiB  loss {loss:.5f}")


def main(arguments: list[str]) -> None:
    """Compare in the cases that are named, or in all."""
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument and " " not in argument)
    if arguments[:1] == ["measure"]:
        print(*measure(arguments[1], arguments[2], dict(a.split("=", 1) for a in arguments[3:])))
        return
    for name in [argument for argument in arguments if "=" not in argument] or CASES:
        compare(name, options)


if __name__ == "__main__":
    main(sys.argv[1:])
