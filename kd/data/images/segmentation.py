"""Images with a class at each pixel: folders of images and masks, or npz files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.config.rules import Rule, list_of, one_of, refusals, refuse, whole
from kd.data.content import FileContent
from kd.data.images.base import DataModule
from kd.data.images.loader import Loader
from kd.data.images.mask_files import (
    Classes,
    decode_mask,
    decode_pair,
    list_pairs,
    other_size,
    pairs_of,
    read_arrays,
    size_of,
)
from kd.data.images.masks import MaskFileLoader, MaskLoader, joint_transform
from kd.data.images.options import SHARE
from kd.data.images.parts import Part, Samples, Source, folder_of
from kd.data.split import hashed
from kd.errors import KdError

log = logging.getLogger(__name__)

SMALL = 2000  # pairs; below it `in_memory: auto` decodes once
READ = (
    500  # masks of larger folders whose ids are checked before the first batch, evenly spaced; the others when decoded
)
PARTS = ("train", "val", "test")
EDGE = whole(1)
RULES = {
    "folder": Rule("the folder that holds train/images and train/masks, or train.npz", bool),
    "num_classes": whole(2, 255).or_null,
    "ignore_index": whole(0, 255).or_null,
    "image_size": Rule(
        "an edge in pixels, or [height, width]",
        lambda size: EDGE.fits(size) or (list_of(EDGE, least=2).fits(size) and len(size) == 2),
    ).or_null,
    "in_memory": one_of("auto", True, False),
    "num_workers": whole(0),
    "test_fraction": SHARE.or_null,
}
# options of sets with one class an image that mean something else here, or nothing
IDLE = {
    "drop_classes": "an image has many classes: take the pixels out of the loss by data.ignore_index",
    "test_shift": "the masks would not move along",
    "mixup": "a mixture of two masks is no mask",
    "teacher_view": "the pixels of two views do not belong together",
}


class Segmentation(DataModule):
    """``folder``/train/images/NAME.jpg with train/masks/NAME.png of class ids, or ``folder``/train.npz; val, test so.

    ``folder``: relative to ``root``, or absolute. An image has the mask of its name, whatever the endings are; folders
    inside of images/ count as part of the name. A mask is a PNG of one channel or of a palette. An npz file has
    ``image`` (n, H, W, 3) or (n, H, W), ``mask`` (n, H, W), both uint8, and perhaps ``classes`` (names)
    ``num_classes``: ids are 0 to ``num_classes`` − 1; null: as many as ``class_names`` or ``classes`` name
    ``ignore_index``: the id of pixels that belong to no class; null: there is none
    ``image_size``: edge, or [height, width], that images and masks are brought to, squeezed if they have another shape:
    the image bilinearly, the mask by its nearest pixel; metrics are of masks of this size. null: all are of one size
    ``in_memory``: decode everything once and augment by ``augment.pad`` and ``augment.flip``; from files by
    ``augment.scale`` and ``augment.flip``. "auto": below 2,000 pairs; npz files are always in memory
    ``num_workers``: processes that decode files; 0: the training process
    ``test_fraction``: cut a test set from train where there is none; null: that is an error

    Crops and flips move image and mask together; what a crop shows outside of the image is ignored. Val, where there is
    none, and test are cut by a hash of each file's name (of npz its number) and ``split_seed``. ``label_fraction``: of
    the images that keep their mask, the others stay with pixels that have no label. Targets of a batch are (B, H, W)
    int64 with 255 where a pixel is ignored.
    """

    reads_files = True

    def __init__(
        self,
        *,
        folder: str | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        ignore_index: int | None = 255,
        image_size: int | Sequence[int] | None = None,
        in_memory: bool | str = "auto",
        num_workers: int = 0,
        test_fraction: float | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        idle = {"drop_classes": self.drop_classes, "test_shift": self.test_shift, "mixup": self.mixup}
        idle["teacher_view"] = self.teacher_view
        set_ = [f"data.{key} = {value} is not allowed: {IDLE[key]}" for key, value in idle.items() if value]
        refuse([*refusals("data.", locals(), RULES), *set_])
        self.folder, self.in_memory, self.num_workers = str(folder), in_memory, num_workers
        self.ignore_index, self.test_fraction = ignore_index, test_fraction or 0.0
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.class_names = list(class_names or [])
        if num_classes is not None:
            self.num_classes = num_classes
        self.cut_by_name = False  # whether val or test was cut from train

    # ------------------------------------------------------------------ reading

    def load(self) -> Source:
        """Read the arrays, or list the folders and decode them if they are to stay in memory."""
        path = Path(self.folder).expanduser()
        path = path if path.is_absolute() else folder_of(self.root) / path
        npz = (path / "train.npz").is_file()
        if not npz and not (path / "train" / "images").is_dir():
            raise KdError(
                f"there is neither {path / 'train' / 'images'} nor {path / 'train.npz'}: data.folder must hold "
                "train/images and train/masks, or train.npz, relative to paths.data (the environment variable KD_DATA) "
                "or absolute"
            )
        there = [part for part in PARTS if (path / (f"{part}.npz" if npz else f"{part}/images")).exists()]
        if "test" not in there and not self.test_fraction:
            raise KdError(f"there is no test set in {path}: add one, or cut it from train with data.test_fraction=0.2")
        if "test" in there and self.test_fraction:
            raise KdError(f"data.test_fraction = {self.test_fraction} is not allowed: {path} has a test set")
        found = self._arrays(path, there) if npz else self._folders(path, there)
        return Source(found["train"], val=found.get("val"), test=found.get("test"))

    def _classes(self, path: Path, names: Sequence[str] = ()) -> Classes:
        """Settle how many classes there are, and their names. ``KdError`` where that is not said, or said twice."""
        if not self.class_names:
            self.class_names = list(names)
        count = getattr(self, "num_classes", len(self.class_names))
        if not count:
            raise KdError(f"the classes of {path} are not known: set data.num_classes, or data.class_names")
        if self.class_names and len(self.class_names) != count:
            raise KdError(
                f"data.num_classes = {count} is not allowed: there are {len(self.class_names)} names of classes, "
                f"{', '.join(self.class_names[:5])} …"
            )
        self.num_classes = count
        self.class_names = self.class_names or [f"class {c}" for c in range(count)]
        return Classes(count, self.ignore_index)

    def _arrays(self, path: Path, there: Sequence[str]) -> dict[str, Samples]:
        if self.image_size is not None or self.in_memory is False:
            key = "image_size" if self.image_size is not None else "in_memory"
            value = "false" if key == "in_memory" else list(self.image_size or ())
            raise KdError(f"data.{key} = {value} is not for npz files: they are taken as they are, in memory")
        read = {part: read_arrays(path / f"{part}.npz") for part in there}
        classes = self._classes(path, read["train"][2])
        self._in_memory_only()
        shapes = {part: (images.shape[1:], masks.shape[1:]) for part, (images, masks, _) in read.items()}
        if len(set(shapes.values())) > 1:
            raise KdError(f"the images of {path} differ in shape: {', '.join(f'{p} {s}' for p, s in shapes.items())}")
        found = {}
        for part, (images, masks, _) in read.items():
            ids = classes.checked(masks, str(path / f"{part}.npz"))
            found[part] = Samples(images, torch.zeros(len(images), dtype=torch.int64), masks=ids)
        channels, height, width = read["train"][0].shape[1:]
        self.input_shape = (channels, height, width)
        return found

    def _folders(self, path: Path, there: Sequence[str]) -> dict[str, Samples]:
        classes, found = self._classes(path), {}
        for part in there:
            pairs, sizes = list_pairs(path / part)
            images, masks = ([pair[side] for pair in pairs] for side in (0, 1))
            content = FileContent(path / part / "images", images, sizes)
            mask_sizes = [mask.stat().st_size for mask in masks]
            targets = torch.zeros(len(pairs), dtype=torch.int64)
            found[part] = Samples(images, targets, content, FileContent(path / part / "masks", masks, mask_sizes))
        every = [pair for samples in found.values() for pair in pairs_of(samples)]
        self.input_shape = (3, *self._size(every))
        memory = self.in_memory is True or (self.in_memory == "auto" and len(every) < SMALL)
        if memory:
            self._in_memory_only()
            return {part: self._decoded(samples, classes) for part, samples in found.items()}
        for place in np.linspace(0, len(every) - 1, min(len(every), READ)).astype(int):
            classes.checked(decode_mask(every[place][1]), str(every[place][1]))
        return found

    def _in_memory_only(self) -> None:
        if self.augment.scale is not None:
            self.augmentation_off = ["data.augment.scale"]
            log.warning("the images are in memory, so that data.augment.scale = %s is off", list(self.augment.scale))

    def _size(self, pairs: Sequence[tuple[Path, Path]]) -> tuple[int, int]:
        """Find the size that all are brought to, or have. ``KdError`` for a mask of another size than its image."""
        sizes = [(size_of(image), size_of(mask)) for image, mask in pairs]
        for (image, mask), (size, mask_size) in zip(pairs, sizes, strict=True):
            if size != mask_size:
                raise other_size(image, size, mask, mask_size)
        if self.image_size is not None:
            return self.image_size[0], self.image_size[1]
        first = sizes[0][0]
        other = next((place for place, (size, _) in enumerate(sizes) if size != first), None)
        if other is not None:
            there = f"{pairs[other][0]} is {sizes[other][0][0]} x {sizes[other][0][1]}"
            raise KdError(
                f"{pairs[0][0]} is {first[0]} x {first[1]}, {there}: images of several sizes need data.image_size"
            )
        return first

    def _decoded(self, samples: Samples, classes: Classes) -> Samples:
        change = joint_transform(self.input_shape[1:])
        both = [change(*decode_pair(image, mask, classes)) for image, mask in pairs_of(samples)]
        return samples._replace(inputs=torch.stack([i for i, _ in both]), masks=torch.stack([m for _, m in both]))

    # ------------------------------------------------------------------ splits

    def cut(self, part: Part, fraction: float, name: str) -> tuple[Tensor, Tensor]:
        """Choose by a hash of each file's name: one that is renamed or added moves no other."""
        self.cut_by_name = True
        names = map(part.content.name, part.index.tolist())
        chosen = torch.tensor([hashed(self.split_seed, name, file) < fraction for file in names])
        return chosen.nonzero().flatten(), (~chosen).nonzero().flatten()

    @property
    def split_facts(self) -> dict[str, Any]:
        """As of every set, and that samples were divided by their names."""
        return {**super().split_facts, **({"cut_by": "name"} if self.cut_by_name else {})}

    @property
    def train_targets(self) -> None:  # type: ignore[override]
        """Nothing: an image has no one class."""

    # ------------------------------------------------------------------ loading

    @property
    def moving(self) -> str | None:
        """As in memory; from files a random resized crop and a flip move the teacher's view as well."""
        self.setup()
        from_files = not isinstance(self.parts["train"].inputs, Tensor)
        return "data.augment" if from_files and (self.augment.scale or self.augment.flip) else super().moving

    def make_loader(self, part: Part, **options: Any) -> Loader:
        """Make the loader, from memory or from files."""
        if isinstance(part.inputs, Tensor):
            assert isinstance(part.masks, Tensor)
            if options["train"]:
                options["augment"] = self.augment
            return MaskLoader(part.inputs, part.masks, part.targets, part.index, **options)
        if self.augment.pad:
            raise KdError(f"data.augment.pad = {self.augment.pad} needs images in memory: set data.in_memory=true")
        moved = (self.augment.scale, self.augment.flip) if options["train"] else (None, False)
        transform = joint_transform(self.input_shape[1:], *moved)
        classes, workers = Classes(self.num_classes, self.ignore_index), self.num_workers
        pairs = pairs_of(part)
        options |= {"classes": classes, "transform": transform, "num_workers": workers}
        return MaskFileLoader(pairs, part.targets, part.index, **options)
