"""MNIST and Fashion-MNIST: 60,000 + 10,000 grey images of 28 x 28, as torchvision lays them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd.config.rules import FLAG, one_of, refusals, refuse
from kd.data.images.base import DataModule
from kd.data.images.parts import Samples, Source, folder_of
from kd.data.images.torchvision_set import fetch, missing
from kd.errors import KdError

SETS = {  # name: (torchvision class, the name people use)
    "mnist": ("MNIST", "MNIST"),
    "fashion_mnist": ("FashionMNIST", "Fashion-MNIST"),
}
FILES = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


class MNIST(DataModule):
    """``name``: mnist or fashion_mnist, read from ``root``/MNIST/raw or ``root``/FashionMNIST/raw.

    ``download``: fetch it first, if it is not there.
    """

    def __init__(self, *, name: str = "mnist", download: bool = False, **common: Any) -> None:
        super().__init__(**common)
        refuse(refusals("data.", locals(), {"name": one_of(*SETS), "download": FLAG}))
        self.set_name, self.download = name, download
        self.num_classes, self.input_shape = 10, (1, 28, 28)
        self.class_names = [str(digit) for digit in range(10)] if name == "mnist" else list(FASHION)

    @property
    def title(self) -> str:
        """MNIST or Fashion-MNIST."""
        return SETS[self.set_name][1]

    def prepare_data(self) -> None:
        """Download, if asked; Lightning calls it on one rank only."""
        if self.download:
            attribute, title = SETS[self.set_name]
            fetch(attribute, title, folder_of(self.root))

    def load(self) -> Source:
        """Load both parts. Raises ``KdError`` when a file is missing or not as long as its header says."""
        import torchvision.datasets

        self.prepare_data()
        attribute, title = SETS[self.set_name]
        root = folder_of(self.root)
        raw = root / attribute / "raw"
        if not all((raw / file).is_file() for file in FILES):
            raise missing(title, raw, self.set_name)
        for file in FILES:
            check_idx(raw / file)
        parts = [getattr(torchvision.datasets, attribute)(str(root), train=train) for train in (True, False)]
        train, test = (Samples(p.data[:, None].contiguous(), p.targets.long()) for p in parts)
        return Source(train, test)


def check_idx(path: Path) -> None:
    """Raise ``KdError`` unless ``path`` is an idx file of bytes whose length is what its header promises."""
    with path.open("rb") as file:
        magic = file.read(4)
        sizes = [int.from_bytes(file.read(4), "big") for _ in range(magic[3])] if len(magic) == 4 else []
    header = 4 + 4 * len(sizes)
    expected = header
    if sizes:
        count = 1
        for size in sizes:
            count *= size
        expected += count
    wanted = 3 if "images" in path.name else 1
    length = path.stat().st_size
    if magic[:3] != b"\x00\x00\x08" or len(sizes) != wanted:
        raise KdError(f"{path} is damaged: it does not begin like an idx file of bytes; delete it and fetch it again")
    if length != expected:
        raise KdError(f"{path} is damaged: {length:,} bytes instead of {expected:,}; delete it and fetch it again")
