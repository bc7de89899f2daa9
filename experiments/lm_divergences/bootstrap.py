"""Held-out loss a token with the uncertainty of the text, and what each arm costs.

    python experiments/lm_divergences/bootstrap.py [RUNS]

reads the students of ``runs/study_lm_divergences`` (or ``RUNS``) and scores the test text of each corpus in blocks of
128 tokens, the mean over seeds of each block. The interval is a block bootstrap (BCa, 9,999 samples) over passages of
eight blocks one after the other: of another text of the same kind, given these students. Seconds are those of a whole
run, on a machine with other work.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy.stats import bootstrap
from transformers import AutoModelForCausalLM

CORPORA = ("austen", "brown")
ARMS = (
    *("labels", "forward", "reverse", "js", "skewed", "skewed_reverse"),
    *("top4", "top16", "top64", "sequence", "on_policy"),
)
PASSAGE = 8  # blocks of 128 predicted tokens
KEPT = dict.fromkeys(
    ("top4", "top16", "top64"), "top64"
)  # the folder of kept answers, where it is not that of hidden states


def blocks(data: Any, folder: Path) -> np.ndarray:
    """Return the mean loss (blocks,) in nats a token of each whole block of the test text, of whole passages."""
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    losses: list[np.ndarray] = []
    with torch.inference_mode():
        for batch in data.test_dataloader():
            ids = batch.inputs["input_ids"]
            logits = network(**batch.inputs).logits[:, :-1].float()
            loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            whole = (batch.targets[:, 1:] >= 0).all(dim=1)
            order = torch.argsort(batch.index[whole])
            losses.append(np.column_stack([batch.index[whole][order], loss.mean(dim=1)[whole][order]]))
    found = np.concatenate(losses)
    found = found[np.argsort(found[:, 0]), 1]
    return np.asarray(found[: len(found) // PASSAGE * PASSAGE])


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of a mean over blocks, by passages of ``PASSAGE`` of them."""
    passages = values.reshape(-1, PASSAGE).mean(axis=1)
    found = bootstrap((passages,), np.mean, n_resamples=9999, rng=np.random.default_rng(0))
    return found.confidence_interval.low, found.confidence_interval.high


def megabytes(folder: Path) -> float:
    """Return the size of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def main(runs: Path) -> None:
    """Print a table a corpus."""
    for corpus in CORPORA:
        study = runs / "study_lm_divergences"
        first = study / f"{corpus}_labels" / "seed0"
        data = instantiate(OmegaConf.load(first / "config.yaml").data)
        data.setup()
        scored, seconds, seeds = {}, {}, {}
        arms = [arm for arm in ARMS if (study / f"{corpus}_{arm}").is_dir()]
        for arm in arms:
            folders = sorted((study / f"{corpus}_{arm}").glob("seed*"))
            scored[arm] = np.mean([blocks(data, folder / "last") for folder in folders], axis=0)
            records = [json.loads((folder / "result.json").read_text()) for folder in folders]
            seconds[arm] = np.mean([record["wall_clock_s"] for record in records])
            seeds[arm] = len(folders)
        print(f"\n| {corpus} | seeds | loss a token | − labels | − forward KL | seconds | kept, MB |")
        print("| :-- | --: | --: | --: | --: | --: | --: |")
        for arm in arms:
            shown = []
            for other in ("labels", "forward"):
                difference = scored[arm] - scored[other]
                low, high = interval(difference) if other != arm else (0.0, 0.0)
                shown.append(f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]" if other != arm else "–")
            folder = runs / "lm_answers" / f"{corpus}_{KEPT.get(arm, 'hidden')}"
            kept = "–" if arm in ("labels", "sequence") else f"{megabytes(folder):.0f}"
            cells = [arm, seeds[arm], f"{scored[arm].mean():.3f}", *shown, f"{seconds[arm]:.0f}", kept]
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs"))
