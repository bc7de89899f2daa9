"""From the start of the interpreter to the end of the first step: a bare script, transformers' Trainer, ``kd train``.

    python experiments/benchmarks/start.py [rounds=5]

The work is that of ``text_step.py all``: 4 × 256 tokens, random Llamas. Each is a process of its own, which ends with
its first step, and they take turns; times are CPU seconds, ratios medians over the rounds, each to the first line.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import text_work

WORK = "{title: work, vocabulary: 32768, samples: 4, tokens: 256, prompt: 1}"
NODE = "{_target_: text_work.network, vocabulary: 32768, tokens: 256, classes: 0, layers: "
KD = [
    *("train", "~data", "+data._target_=text_step.Rows", f"+data.case={WORK}", "+data.steps=1", "task=causal_lm"),
    *("model@student=none", f"student.model={NODE}2, width: 128}}", "model@teacher=none", "teacher.allow_random=true"),
    *(f"teacher.model={NODE}4, width: 256}}", "loss=[ce,kd]", "loss.ce.weight=0.5", "loss.kd.temperature=1"),
    *("recipe=finetune", "recipe.epochs=1", "recipe.batch_size=4", "hardware=cpu", "hardware.threads=1"),
    "+callbacks.stop._target_=start.stop",
]


class Ended(text_work.Meter):
    """Ends the process with the first step."""

    def step(self) -> None:
        """End it."""
        os._exit(0)


def stop() -> Any:
    """Make a callback of Lightning that ends the process with the first step."""
    from lightning import Callback

    class Stop(Callback):
        observes_only = True

        def on_train_batch_end(self, *_: Any) -> None:
            os._exit(0)

    return Stop()


def run(contender: str, folder: str) -> None:
    """Take one step, in this process."""
    import torch  # each imports what it needs: that is what is measured

    torch.set_num_threads(1)
    case = text_work.CASES["all"]
    if contender == "bare script":
        text_work.bare(case, 1, Ended(), Path(folder))
    elif contender == "transformers.Trainer":
        import text_peers

        text_peers.transformers_trainer(case, 1, Ended(), Path(folder))
    else:
        from kd.cli.main import main

        sys.exit(main([*KD, f"hydra.run.dir={folder}"]))


def main(rounds: int) -> None:
    """Print a line a contender."""
    names = ["bare script", "transformers.Trainer", "kd train"]
    found: dict[str, list[float]] = {name: [] for name in names}
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    for _ in range(rounds):
        for name in names:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, "run", name, f"{folder}/run"]
                done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
            if done.returncode:
                raise SystemExit(f"{name} has failed: {done.stderr.strip().splitlines()[-1]}")
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            found[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    for name, seconds in found.items():
        ratio = statistics.median(own / bare for own, bare in zip(seconds, found[names[0]], strict=True))
        print(f"  {name:24} {statistics.median(seconds):6.2f} s  {ratio:5.2f} ×")


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run(*sys.argv[2:])
    else:
        main(int(dict(argument.split("=", 1) for argument in sys.argv[1:]).get("rounds", 5)))
