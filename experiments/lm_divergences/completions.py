"""Join what the teacher wrote to one text to train on, the prompts left out.

python experiments/lm_divergences/completions.py ANSWERS.jsonl TEXT.txt
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd


def main(answers: Path, target: Path) -> None:
    """Write the completions, each from a new line on, and print how many characters they are."""
    texts = pd.read_json(answers, lines=True)["completion"]
    joined = "\n".join(text.strip() for text in texts) + "\n"
    target.write_text(joined)
    print(f"{target}: {len(texts)} completions, {len(joined):,} characters")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
