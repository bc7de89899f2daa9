"""A folder of images: ``train/CLASS/*.png``, with ``val/`` and ``test/`` beside it if there are any."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.config.rules import Rule, number, one_of, refusals, refuse, whole
from kd.data.content import FileContent
from kd.data.images.base import DataModule
from kd.data.images.files import FileLoader, decode, eval_transform, list_images, train_transform
from kd.data.images.loader import Loader
from kd.data.images.options import SHARE
from kd.data.images.parts import Part, Samples, Source, folder_of
from kd.data.split import hashed
from kd.errors import KdError

log = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the training images, 0..1
SMALL = 2000  # images; below it `in_memory: auto` decodes once
RULES = {
    "folder": Rule("the folder that holds train/CLASS/*.png, for example pets", bool),
    "image_size": whole(1),
    "crop_pct": number(above=0, most=1),
    "in_memory": one_of("auto", True, False),
    "num_workers": whole(0),
    "test_fraction": SHARE.or_null,
}


class ImageFolder(DataModule):
    """RGB images of ``image_size``², read from files or, small folders, kept in memory.

    ``folder``: relative to ``root``, or absolute
    ``crop_pct``: evaluation resizes the shorter edge to ``image_size / crop_pct`` and crops the centre
    ``in_memory``: decode everything once, as for evaluation, and augment by ``augment.pad`` and ``augment.flip``; from
    files training images get a random resized crop (``augment.scale``) and ``augment.flip``. "auto": below 2,000 images
    ``num_workers``: processes that decode files; 0: the training process
    ``test_fraction``: cut a test set from train/ where there is no test/; null: that is an error
    ``mean``, ``std``: a value a channel, or one for all; null: ImageNet's

    What is cut (val, where there is no val/, and test) is chosen by a hash of each file's name and ``split_seed``: a
    class gets about its share, and a file that is renamed or added moves no other between train, val and test.

    ``num_classes`` and ``class_names`` (the class folders, sorted) are known after ``setup``. ``index`` is the position
    in the sorted listing of the folder that the image lies in.
    """

    reads_files = True

    def __init__(
        self,
        *,
        folder: str | None = None,
        image_size: int = 224,
        crop_pct: float = 0.875,
        in_memory: bool | str = "auto",
        num_workers: int = 0,
        test_fraction: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(mean=mean or IMAGENET_MEAN, std=std or IMAGENET_STD, **common)
        refuse(refusals("data.", locals(), RULES))
        self.folder, self.image_size, self.crop_pct = str(folder), image_size, crop_pct
        self.in_memory, self.num_workers = in_memory, num_workers
        self.test_fraction = test_fraction or 0.0
        self.input_shape = (3, image_size, image_size)
        self.cut_by_name = False  # whether val or test was cut from train

    def load(self) -> Source:
        """List the folders, and decode them if they are to stay in memory."""
        path = Path(self.folder).expanduser()
        path = path if path.is_absolute() else folder_of(self.root) / path
        if not (path / "train").is_dir():
            raise KdError(
                f"there is no folder {path / 'train'}: data.folder must hold train/CLASS/*.png, "
                "relative to paths.data (the environment variable KD_DATA) or absolute"
            )
        self._check_test(path)
        parts: dict[str, Samples] = {}
        for part in ("train", "val", "test"):
            if (path / part).is_dir():
                names, files, targets, sizes = list_images(path / part)
                if part == "train":
                    self.class_names, self.num_classes = names, len(names)
                self._check_classes(path, part, names)
                parts[part] = Samples(files, targets, FileContent(path / part, files, sizes))
        if self.in_memory is True or (self.in_memory == "auto" and sum(len(p.targets) for p in parts.values()) < SMALL):
            parts = {part: samples._replace(inputs=self._decode(samples.inputs)) for part, samples in parts.items()}
            if self.augment.scale is not None:
                self.augmentation_off = ["data.augment.scale"]
                log.warning(
                    "the images are few and decoded once, so that data.augment.scale = %s is off: set "
                    "data.in_memory=false for random resized crops",
                    list(self.augment.scale),
                )
        return Source(parts["train"], val=parts.get("val"), test=parts.get("test"))

    def cut(self, part: Part, fraction: float, name: str) -> tuple[Tensor, Tensor]:
        """Choose by a hash of each file's name (``CLASS/file.png``): one that is renamed or added moves no other.

        A class of few images, of which all would be chosen, keeps one to train on.
        """
        names = map(part.content.name, part.index.tolist())
        place = torch.tensor([hashed(self.split_seed, name, file) for file in names], dtype=torch.float64)
        chosen = place < fraction
        classes = set(part.targets.tolist())
        for lost in classes - set(part.targets[~chosen].tolist()) if not chosen.all() else ():
            own = (part.targets == lost).nonzero().flatten()
            chosen[own[place[own].argmax()]] = False
        if absent := sorted(classes - set(part.targets[chosen].tolist())):
            missed = ", ".join(self.class_names[c] for c in absent[:10])
            log.warning("no image of %s in %s: there are few, and their names decide", missed, name)
        self.cut_by_name = True
        return chosen.nonzero().flatten(), (~chosen).nonzero().flatten()

    @property
    def split_facts(self) -> dict[str, Any]:
        """As of every set, and that files were divided by their names: not so in runs of before."""
        return {**super().split_facts, **({"cut_by": "name"} if self.cut_by_name else {})}

    def _check_test(self, path: Path) -> None:
        if (path / "test").is_dir() and self.test_fraction:
            raise KdError(f"data.test_fraction = {self.test_fraction} is not allowed: {path} has a folder test")
        if not (path / "test").is_dir() and not self.test_fraction:
            raise KdError(
                f"there is no folder {path / 'test'}: add one, or cut it from train with data.test_fraction=0.2"
            )

    def _check_classes(self, path: Path, part: str, names: list[str]) -> None:
        difference = sorted(set(names) ^ set(self.class_names))
        if difference:
            where = [f"{name} ({part if name in names else 'train'} only)" for name in difference]
            raise KdError(f"the class folders of {path}/train and {path}/{part} differ: {', '.join(where)}")

    def _decode(self, paths: Tensor | list[Path]) -> Tensor:
        transform = eval_transform(self.image_size, self.crop_pct)
        return torch.stack([decode(Path(path), transform) for path in paths])

    @property
    def moving(self) -> str | None:
        """As in memory; from files a random resized crop and a flip move the teacher's view as well."""
        self.setup()
        from_files = not isinstance(self.parts["train"].inputs, Tensor)
        return "data.augment" if from_files and (self.augment.scale or self.augment.flip) else super().moving

    def make_loader(self, part: Part, **options: Any) -> Loader:
        """From memory, or from files."""
        if isinstance(part.inputs, Tensor):
            return super().make_loader(part, **options)
        if self.augment.pad:
            raise KdError(f"data.augment.pad = {self.augment.pad} needs images in memory: set data.in_memory=true")
        if options["train"]:
            transform = train_transform(self.image_size, self.augment.scale, self.augment.flip)
        else:
            transform = eval_transform(self.image_size, self.crop_pct)
        workers = self.num_workers
        return FileLoader(part.inputs, part.targets, part.index, transform=transform, num_workers=workers, **options)
