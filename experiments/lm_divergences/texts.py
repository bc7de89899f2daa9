"""Cut the texts of the study: passages to train on, held-out text, and prompts for the teacher.

    python experiments/lm_divergences/texts.py DATA FOLDER [TOKENIZER]

``DATA`` holds ``austen.train.txt``, ``austen.valid.txt``, ``brown.train.txt`` and ``brown.valid.txt``. Of each corpus
``FOLDER`` gets ``.train.txt`` (some 260 kB in passages of 4 kB at equal distances, whole lines), ``.held.txt`` (the
first 100 kB of the other file), ``.few.txt`` (the next 5 kB, for runs that measure nothing) and ``.prompts.jsonl``: the
first 32 tokens of every 128 of the training text, in the tokenizer of the teacher (``runs/encoders/smollm2``), which is
to go on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

CORPORA = ("austen", "brown")
TRAIN, PASSAGE, HELD, FEW = 240_000, 4_000, 100_000, 5_000  # characters
BLOCK, PROMPT = 128, 32  # tokens


def passages(lines: Sequence[str]) -> list[str]:
    """Return whole lines: ``TRAIN // PASSAGE`` passages of ``PASSAGE`` characters, or a part of a line more."""
    total, count = sum(map(len, lines)), TRAIN // PASSAGE
    kept: list[str] = []
    begun = position = left = 0
    for line in lines:
        if begun < count and position >= total * begun / count:
            begun, left = begun + 1, PASSAGE
        if left > 0:
            kept.append(line)
            left -= len(line)
        position += len(line)
    return kept


def first(lines: Sequence[str], characters: int) -> list[str]:
    """Return the lines that begin within the first ``characters``."""
    kept: list[str] = []
    for line in lines:
        if sum(map(len, kept)) >= characters:
            break
        kept.append(line)
    return kept


def main(data: Path, folder: Path, tokenizer: str) -> None:
    """Write four files a corpus, and print their sizes."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    for name in CORPORA:
        train = "".join(passages((data / f"{name}.train.txt").read_text().splitlines(keepends=True)))
        other = (data / f"{name}.valid.txt").read_text().splitlines(keepends=True)
        held = first(other, HELD)
        ids = tokens(train)["input_ids"]
        starts = range(0, len(ids) - BLOCK, BLOCK)
        prompts = [json.dumps({"prompt": tokens.decode(ids[start : start + PROMPT])}) for start in starts]
        (folder / f"{name}.train.txt").write_text(train)
        (folder / f"{name}.held.txt").write_text("".join(held))
        (folder / f"{name}.few.txt").write_text("".join(first(other[len(held) :], FEW)))
        (folder / f"{name}.prompts.jsonl").write_text("\n".join(prompts) + "\n")
        sizes = f"{len(train):,} and {sum(map(len, held)):,} characters"
        print(f"{name}: {sizes}, {len(ids):,} tokens, {len(prompts)} prompts")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) == 4 else "runs/encoders/smollm2")
