"""What one of two processes of tests/test_distributed.py does: several small runs, one after the other.

Python's arguments: the folder to write to, and the cases as JSON (name → overrides).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd.losses.base import Term


class Plain(nn.Module):
    """Two convolutions without batch norm, as student."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU())
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W) → (B, num_classes)."""
        return self.fc(self.stage2(self.stage1(x)).mean((2, 3)))


class Breaks(Term):
    """Fails at the third call, in the process of this number only."""

    needs_teacher = False
    calls = 0

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, student: Any, teacher: Any, batch: Any) -> torch.Tensor:
        """Zero, or the failure."""
        from kd.parallel import group

        self.calls += 1
        if self.calls > 4 and group.rank() == self.rank:
            raise ValueError("this term breaks")
        return student.logits.sum() * 0


class Stops(Breaks):
    """Stops the process of this number at the third call, as SIGSTOP does."""

    def forward(self, student: Any, teacher: Any, batch: Any) -> torch.Tensor:
        """Zero, or nothing for ever."""
        from kd.parallel import group

        self.calls += 1
        if self.calls > 8 and group.rank() == self.rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        return student.logits.sum() * 0


def seen(module: Any) -> dict[str, Any]:
    """What a run leaves in a module that its record does not hold."""
    teacher = module.teacher.state_dict() if module.teacher is not None else {}
    ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", [])
    return {"teacher": teacher, "unreached": module.unreached, "ignored": ignored, "training": module.teacher.training}


def run(folder: Path, cases: dict[str, list[str]]) -> None:
    """Each case in ``folder/NAME``, with ``outcome.json`` beside the run's own files."""
    from kd.config.compose import checked
    from kd.config.hardware import settings
    from kd.parallel import cluster, group
    from kd.run import build, trainer

    built: list[Any] = []
    original = build.distiller
    build.distiller = lambda *a: built.append(original(*a)) or built[-1]  # type: ignore[func-returns-value,assignment]
    for name, overrides in cases.items():
        config = checked(overrides)
        cluster.join(settings(config))
        if group.rank() == 0:
            (folder / name).mkdir(parents=True)
        group.barrier()
        outcome = trainer.fit(config, folder / name, None)
        if group.rank() == 0:
            (folder / name / "outcome.json").write_text(json.dumps(outcome))
        if not built[-1].sharded:
            torch.save(seen(built[-1]), folder / name / f"seen{group.rank()}.pt")
        elif group.rank() == 0:
            kinds = [type(p).__name__ for p in built[-1].teacher.parameters()]
            built[-1].student.state_dict()  # ends what an evaluation has gathered
            kinds += [type(p).__name__ for p in built[-1].trainable()]
            (folder / name / "parameters.json").write_text(json.dumps(kinds))
    group.leave()


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
