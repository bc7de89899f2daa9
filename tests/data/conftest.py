"""Where the real data sets are, and small ones written on the spot."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image


@pytest.fixture
def kd_data() -> str:
    """The folder of real data sets; without it the test is skipped."""
    root = os.environ.get("KD_DATA")
    if not root:
        pytest.skip("KD_DATA is not set: it must name the folder with MNIST, FashionMNIST and stamps8")
    return root


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``{part: {class: count}}`` as small PNG files of random pixels and returns the folder."""

    def write(**parts: dict[str, int]) -> Path:
        random = torch.Generator().manual_seed(0)
        for part, classes in parts.items():
            for name, count in classes.items():
                folder = tmp_path / "set" / part / name
                folder.mkdir(parents=True, exist_ok=True)
                for i in range(count):
                    pixels = torch.randint(0, 256, (20, 24, 3), dtype=torch.uint8, generator=random).numpy()
                    Image.fromarray(pixels).save(folder / f"{i:03}.png")
        return tmp_path / "set"

    return write
