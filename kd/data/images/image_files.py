"""Images that lie in files, whatever lists them: decoded once and kept, or batch by batch by several processes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kd.config.rules import number, one_of, refusals, refuse, whole
from kd.data.images.base import DataModule
from kd.data.images.files import FileLoader, decode, eval_transform, train_transform
from kd.data.images.loader import Loader
from kd.data.images.options import SHARE
from kd.data.images.parts import Part, Samples
from kd.data.split import hashed
from kd.errors import KdError

log = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the training images, 0..1
SMALL = 2000  # images; below it `in_memory: auto` decodes once
MOST = 2**30  # bytes of decoded images that it keeps
RULES = {
    "image_size": whole(1),
    "crop_pct": number(above=0, most=1),
    "in_memory": one_of("auto", True, False),
    "num_workers": whole(0),
    "test_fraction": SHARE.or_null,
}


class ImageFiles(DataModule):
    """RGB images of ``image_size``², read from files or, if they are few, kept in memory. A subclass lists them.

    ``crop_pct``: evaluation resizes the shorter edge to ``image_size / crop_pct`` and crops the centre
    ``in_memory``: decode everything once, as for evaluation, and augment by ``augment.pad`` and ``augment.flip``; from
    files training images get a random resized crop (``augment.scale``) and ``augment.flip``. "auto": below 2,000 images
    that take no more than 1 GiB
    ``num_workers``: processes that decode files; 0: the training process
    ``test_fraction``: cut a test set from train where there is none; null: that is an error
    ``mean``, ``std``: a value a channel, or one for all; null: ImageNet's

    What is cut (val, where there is none, and test) is chosen by a hash of each file's name and ``split_seed``: a
    class gets about its share, and a file that is renamed or added moves no other between train, val and test.
    """

    reads_files = True

    def __init__(
        self,
        *,
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
        self.image_size, self.crop_pct = image_size, crop_pct
        self.in_memory, self.num_workers = in_memory, num_workers
        self.test_fraction = test_fraction or 0.0
        self.input_shape = (3, image_size, image_size)
        self.cut_by_name = False  # whether val or test was cut from train

    def kept(self, parts: Mapping[str, Samples]) -> dict[str, Samples]:
        """Decode the files of all parts if they are to stay in memory."""
        count = sum(len(part.targets) for part in parts.values())
        small = count < SMALL and 3 * count * self.image_size**2 <= MOST
        if self.in_memory is False or (self.in_memory == "auto" and not small):
            return dict(parts)
        if self.augment.scale is not None:
            self.augmentation_off = ["data.augment.scale"]
            log.warning(
                "the images are few and decoded once, so that data.augment.scale = %s is off: set "
                "data.in_memory=false for random resized crops",
                list(self.augment.scale),
            )
        return {name: samples._replace(inputs=self._decode(samples.inputs)) for name, samples in parts.items()}

    def _decode(self, files: Any) -> Tensor:
        transform = eval_transform(self.image_size, self.crop_pct)
        return torch.stack([decode(file, transform) for file in files])

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

    @property
    def moving(self) -> str | None:
        """As in memory; from files a random resized crop and a flip move the teacher's view as well."""
        self.setup()
        from_files = not isinstance(self.parts["train"].inputs, Tensor)
        return "data.augment" if from_files and (self.augment.scale or self.augment.flip) else super().moving

    def make_loader(self, part: Part, **options: Any) -> Loader:
        """Make the loader, from memory or from files."""
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
