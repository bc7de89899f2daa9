"""Images a second of kd's TensorLoader against PIL + torchvision transforms in a DataLoader, in turns, one thread.

    python experiments/benchmarks/data_path.py

Both crop (pad 4), flip and normalise 3 x 32 x 32 images in batches of 64. Target: a ratio of 25 or more.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from kd.data.images.augment import Augment
from kd.data.images.loader import TensorLoader

COUNT, BATCH, ROUNDS = 4096, 64, 7
MEAN, STD = [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]


class Pil(Dataset[tuple[torch.Tensor, int]]):
    """The usual pipeline: an image at a time."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()
        steps = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[row])), row


def rate(loader: Iterable[object]) -> float:
    """Images a second over one epoch."""
    start = time.perf_counter()
    for _ in loader:
        pass
    return COUNT / (time.perf_counter() - start)


def main() -> None:
    """Measure in turns and print the median of each and of their ratio."""
    torch.set_num_threads(1)
    images = torch.randint(0, 256, (COUNT, 3, 32, 32), dtype=torch.uint8)
    rows = torch.arange(COUNT)
    options = {"mean": MEAN, "std": STD, "train": True, "seed": 0, "shuffle": True}
    loaders = {
        "PIL + transforms, DataLoader": DataLoader(Pil(images), BATCH, shuffle=True),
        "TensorLoader, crop + flip": TensorLoader(images, rows, rows, BATCH, augment=Augment(4, flip=True), **options),
        "TensorLoader, reflect + flip": TensorLoader(
            images, rows, rows, BATCH, augment=Augment(4, "reflect", flip=True), **options
        ),
        "TensorLoader, normalise only": TensorLoader(images, rows, rows, BATCH, **options),
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(ROUNDS):
        for name, loader in loaders.items():
            rates[name].append(rate(loader))
    base, *_ = rates.values()
    for name, values in rates.items():
        ratio = statistics.median(value / b for value, b in zip(values, base, strict=True))
        print(f"{name:30} {statistics.median(values):10,.0f} images/s   ratio {ratio:6.1f}")


if __name__ == "__main__":
    main()
