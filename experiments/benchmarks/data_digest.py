"""What it costs to list a folder of image files with the digest of its content, against listing it alone.

    python experiments/benchmarks/data_digest.py [FILES] [FOLDER]

Makes FILES (default: 1,300,000, about ImageNet) sparse files of 100,000 to 200,000 bytes in 1,000 class folders below
FOLDER (default: /dev/shm), where they take no room, and removes them. Each step is timed once: names and sizes
(kd.data.images.files.list_images), the digest, the split by name, and what weights record of the images they have seen.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kd.data import content
from kd.data.content import FileContent, Rows
from kd.data.images.files import list_images
from kd.data.split import hashed

CLASSES = 1000


def timed(what: str, call: Callable[[], Any]) -> Any:
    """Run ``call`` once and print its seconds."""
    start = time.perf_counter()
    found = call()
    print(f"{what:<44} {time.perf_counter() - start:6.1f} s", flush=True)
    return found


def make(folder: Path, count: int) -> None:
    """Write ``count`` sparse files, spread over the classes."""
    for c in range(CLASSES):
        (folder / f"class{c:04}").mkdir()
    for i in range(count):
        with (folder / f"class{i % CLASSES:04}" / f"image_{i:08}.jpg").open("wb") as file:
            file.truncate(100_000 + i * 7919 % 100_000)


def names_only(folder: Path) -> int:
    """What listing took without sizes: every file is asked whether it is one."""
    return sum(p.is_file() for p in folder.rglob("*") if p.suffix == ".jpg")


def main() -> None:
    """Make the files, time each step, remove them."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_300_000
    root = Path(tempfile.mkdtemp(dir=sys.argv[2] if len(sys.argv) > 2 else "/dev/shm", prefix="kd-"))
    try:
        make(root, count)
        print(f"{count:,} files")
        timed("names alone, pathlib", lambda: names_only(root))
        _, files, targets, sizes = timed("names, sizes and labels (list_images)", lambda: list_images(root))
        found = FileContent(root, files, sizes)
        timed("digest of the content", lambda: content.digest([found], targets.numpy().tobytes()))
        timed("split by name", lambda: [hashed(0, "val", found.name(i)) < 0.1 for i in range(count)])
        rows = Rows(found, torch.arange(count))
        seen = timed("images that weights have seen", lambda: content.seen([rows]))
        test = Rows(found, torch.arange(0, count, 26))
        timed("50,000 test images compared with them", lambda: content.overlap(seen, test, [rows]))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
