"""``kd wandb sync``: send what runs kept on disk while W&B had no key, was away or forbidden."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kd.errors import KdError, did_you_mean
from kd.tracking.wandb_sync import sync

USAGE = """kd wandb sync [DIR ...]

Sends to Weights & Biases what runs have kept on disk: every run below the directories (of runs, sweeps or studies;
default: runs) that is not there already. A resumed run is one run there. What is still training is left for later.

  kd train logger=wandb                without a key, or when the server is away, the run keeps everything on disk
  wandb login                          once, or set WANDB_API_KEY; a server of your own: WANDB_BASE_URL
  kd wandb sync runs/sweep_2026-01-31  later, from a machine that reaches the server; may be repeated

WANDB_MODE=offline in the environment keeps every run on disk, WANDB_MODE=disabled writes nothing at all."""


def main(argv: Sequence[str]) -> int:
    """Parse, send, say what became of each run. Returns 1 when a run could not be sent."""
    if not argv or any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0 if argv else 1
    verb, *rest = argv
    if verb != "sync":
        raise KdError(f"there is no kd wandb {verb}{did_you_mean(verb, ['sync'])}: kd wandb sync [DIR ...]")
    flags = [a for a in rest if a.startswith("-")]
    if flags:
        raise KdError(f"kd wandb sync takes directories only (given: {', '.join(flags)})")
    return sync([Path(a) for a in rest or ("runs",)])
