"""Files of images with a class at each pixel: listing, reading and checking of pairs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd.data.content import FileContent
from kd.data.images.files import DAMAGED, decode, list_files
from kd.data.images.parts import Part, Samples
from kd.errors import KdError

IGNORED = 255  # in batches, of a pixel that belongs to no class, whatever the files say of it


@dataclass(frozen=True)
class Classes:
    """Which ids a mask may have: 0 to ``count`` − 1, and ``ignored`` (None: no other)."""

    count: int
    ignored: int | None

    def checked(self, masks: Tensor, name: str) -> Tensor:
        """Put ``IGNORED`` in the place of what masks (uint8) ignore. ``KdError`` for an id that is no class."""
        without = torch.zeros_like(masks, dtype=torch.bool) if self.ignored is None else masks == self.ignored
        wrong = masks[(masks >= self.count) & ~without]
        if len(wrong):
            also = "" if self.ignored is None else f", or data.ignore_index = {self.ignored}"
            raise KdError(
                f"{name} has the class id {int(wrong[0])}: with data.num_classes = {self.count} ids are 0 to "
                f"{self.count - 1}{also}"
            )
        return masks.masked_fill(without, IGNORED)


def decode_mask(path: Path) -> Tensor:
    """Read class ids (H, W) uint8 from a PNG of one channel or a palette. ``KdError`` naming a file that is none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode, ids = image.mode, np.array(image)
    except (*DAMAGED, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise KdError(
            f"{path} cannot be read as an image ({' '.join(str(error).split())}): replace or delete it"
        ) from None
    if ids.ndim != 2 or ids.max(initial=0) > 255:
        raise KdError(f"{path} is no mask: it must have one channel of class ids from 0 to 255, its mode is {mode}")
    return torch.from_numpy(ids.astype(np.uint8))


def decode_pair(image: Path, mask: Path, classes: Classes) -> tuple[Tensor, Tensor]:
    """Read image (3, H, W) and mask (H, W), uint8. ``KdError`` where they differ in size or an id is no class."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    pixels, ids = decode(image, pil_to_tensor), decode_mask(mask)
    if pixels.shape[1:] != ids.shape:
        raise other_size(image, tuple(pixels.shape[1:]), mask, tuple(ids.shape))
    return pixels, classes.checked(ids, str(mask))


def other_size(image: Path, size: Sequence[int], mask: Path, mask_size: Sequence[int]) -> KdError:
    """Make the error for a mask that does not fit its image; sizes are (height, width)."""
    sizes = f"{mask_size[0]} x {mask_size[1]}", f"{size[0]} x {size[1]}"
    return KdError(f"{mask} is {sizes[0]} and its image {image} is {sizes[1]}: both must be of one size")


def read_arrays(file: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Read images (n, C, H, W) and masks (n, H, W), both uint8, and names of the classes, from an npz file.

    ``KdError`` for arrays that are missing or do not fit.
    """
    try:
        with np.load(file, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in kept.files}
    except Exception:  # of a damaged archive numpy and zipfile raise many kinds
        raise KdError(f"{file} cannot be read as an npz file: write it with numpy.savez_compressed") from None
    if lacking := [name for name in ("image", "mask") if name not in arrays]:
        raise KdError(f"{file} has no array {lacking[0]}: it needs image (n, H, W, 3) and mask (n, H, W), both uint8")
    image, mask = arrays["image"], arrays["mask"]
    image = image[..., None] if image.ndim == 3 else image
    shapes = f"image is {image.dtype} {image.shape}, mask {mask.dtype} {mask.shape}"
    if image.dtype != np.uint8 or mask.dtype != np.uint8 or image.ndim != 4 or image.shape[:3] != mask.shape:
        raise KdError(f"{file}: {shapes}: they must be uint8, (n, H, W, 3) or (n, H, W), and (n, H, W)")
    names = [str(name) for name in arrays.get("classes", ())]
    return torch.from_numpy(image).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(mask), names


def list_pairs(folder: Path) -> tuple[list[tuple[Path, Path]], list[int]]:
    """List ``folder``/images with the masks of their names, in sorted order, and the bytes of each image.

    ``KdError`` for an image without a mask, and where there is no image.
    """
    if not (folder / "masks").is_dir():
        raise KdError(f"there is no folder {folder / 'masks'}: each image needs a mask of its name there, a PNG")
    found = sorted(list_files(folder / "images"))
    if not found:
        raise KdError(f"there is no image in {folder / 'images'}")
    pairs, lacking = [], []
    for image, _ in found:
        mask = (folder / "masks" / os.path.relpath(image, folder / "images")).with_suffix(".png")
        pairs.append((Path(image), mask))
        lacking += [] if mask.is_file() else [image]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise KdError(f"{lacking[0]}{more} has no mask: it must lie in {folder / 'masks'}, with the ending .png")
    return pairs, [size for _, size in found]


def pairs_of(part: Samples | Part) -> list[tuple[Path, Path]]:
    """List image and mask file of each sample."""
    assert isinstance(part.masks, FileContent)
    return [(Path(image), Path(mask)) for image, mask in zip(part.inputs, part.masks.files, strict=True)]


def size_of(path: Path) -> tuple[int, int]:
    """Read height and width of an image file from its header. ``KdError`` naming a file that has none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        raise KdError(f"{path} cannot be read as an image ({error}): replace or delete it") from None
