"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 colour images of 32 x 32, as torchvision lays them out."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch

from kd.config.rules import FLAG, one_of, refusals, refuse
from kd.data.images.base import DataModule
from kd.data.images.parts import Samples, Source, folder_of
from kd.data.images.torchvision_set import fetch, missing
from kd.errors import KdError

SETS = {  # name: (torchvision class, the name people use, classes)
    "cifar10": ("CIFAR10", "CIFAR-10", 10),
    "cifar100": ("CIFAR100", "CIFAR-100", 100),
}


class CIFAR(DataModule):
    """``name``: cifar10 or cifar100, read from ``root``/cifar-10-batches-py or ``root``/cifar-100-python.

    ``download``: fetch it first, if it is not there. ``class_names`` are known after ``setup``.
    """

    def __init__(self, *, name: str = "cifar100", download: bool = False, **common: Any) -> None:
        super().__init__(**common)
        refuse(refusals("data.", locals(), {"name": one_of(*SETS), "download": FLAG}))
        self.set_name, self.download = name, download
        self.num_classes, self.input_shape = SETS[name][2], (3, 32, 32)
        self.class_names = [f"class {c}" for c in range(self.num_classes)]

    @property
    def title(self) -> str:
        """CIFAR-10 or CIFAR-100."""
        return SETS[self.set_name][1]

    def prepare_data(self) -> None:
        """Download, if asked; Lightning calls it on one rank only."""
        if self.download:
            attribute, title, _ = SETS[self.set_name]
            fetch(attribute, title, folder_of(self.root))

    def load(self) -> Source:
        """Load both parts. Raises ``KdError`` when a file is missing or its checksum is wrong."""
        import torchvision.datasets

        self.prepare_data()
        attribute, title, _ = SETS[self.set_name]
        loader, root = getattr(torchvision.datasets, attribute), folder_of(self.root)
        folder = root / loader.base_folder
        files = [*loader.train_list, *loader.test_list, (loader.meta["filename"], loader.meta["md5"])]
        if not all((folder / file).is_file() for file, _ in files):
            raise missing(title, folder, self.set_name)
        for file, md5 in files:
            check_md5(folder / file, md5)
        with warnings.catch_warnings():  # the pickles are older than numpy's rule about `align`
            warnings.filterwarnings("ignore", message=".*align should be passed.*")
            parts = [loader(str(root), train=train) for train in (True, False)]
        self.class_names = list(parts[0].classes)
        train, test = (
            Samples(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in parts
        )
        return Source(train, test)


def check_md5(path: Path, md5: str) -> None:
    """Raise ``KdError`` unless the file has this checksum."""
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if digest != md5:
        raise KdError(f"{path} is damaged: its MD5 is {digest} instead of {md5}; delete it and fetch it again")
