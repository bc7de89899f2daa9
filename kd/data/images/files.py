"""Image files: listing a folder of class folders, decoding, and a loader that reads them batch by batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd.data.images.loader import Loader, affine, normalise
from kd.data.split import generator
from kd.errors import KdError
from kd.losses.base import Batch

DAMAGED = (OSError, SyntaxError, ValueError, EOFError)  # PIL raises all of these on damaged files
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def list_images(folder: Path) -> tuple[list[str], list[Path], Tensor, list[int]]:
    """List ``folder/CLASS/**/*.png`` (jpg, …): class names, files in sorted order, targets (n,) int64, bytes of each.

    Raises ``KdError`` where there is no image.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files: list[Path] = []
    targets: list[int] = []
    sizes: list[int] = []
    for label, name in enumerate(names):
        found = sorted(list_files(os.path.join(folder, name)), key=lambda image: image[0].split(os.sep))
        files += [Path(path) for path, _ in found]
        sizes += [size for _, size in found]
        targets += [label] * len(found)
    if not files:
        raise KdError(f"there is no image in {folder}: it must hold CLASS/*{{{','.join(EXTENSIONS[:3])},…}}")
    return names, files, torch.tensor(targets, dtype=torch.int64), sizes


def list_files(folder: str | Path) -> Iterator[tuple[str, int]]:
    """Yield path and bytes of every image below a folder; one call to the system a file."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from list_files(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS and entry.is_file():
                yield entry.path, entry.stat().st_size


def decode(path: Path, transform: Callable[[Any], Tensor]) -> Tensor:
    """Read the file as RGB through ``transform``: (3, H, W) uint8. Raises ``KdError`` naming a damaged or huge file.

    Huge is what PIL calls a possible decompression bomb: more than ``PIL.Image.MAX_IMAGE_PIXELS`` (89,478,485) pixels.
    """
    from PIL import Image

    try:
        with path.open("rb") as file, Image.open(file) as image:
            pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
            if most is not None and pixels > most:
                raise ValueError(f"{pixels:,} pixels, at most {most:,} are decoded: make it smaller")
            if image.mode.startswith(("I", "F")):  # PIL would clip these to white
                raise ValueError(f"mode {image.mode}: more than 8 bits a channel, convert it first")
            opaque = image.convert("RGBA") if "transparency" in image.info else image
            return transform(opaque.convert("RGB"))
    except (*DAMAGED, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise KdError(
            f"{path} cannot be read as an image ({' '.join(str(error).split())}): replace or delete it"
        ) from None


def readable(path: Any) -> bool:
    """Tell whether the beginning of a file is that of an image, which is not decoded for it."""
    from PIL import Image

    try:
        with path.open("rb") as file, Image.open(file):
            return True
    except (*DAMAGED, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return False


def eval_transform(image_size: int, crop_pct: float) -> Callable[[Any], Tensor]:
    """Make a transform: shorter edge to ``image_size / crop_pct`` (bicubic), centre crop, bytes."""
    from torchvision.transforms import InterpolationMode, v2

    edge = round(image_size / crop_pct)
    bicubic = InterpolationMode.BICUBIC
    return v2.Compose([v2.Resize(edge, bicubic), v2.CenterCrop(image_size), v2.PILToTensor()])


def train_transform(image_size: int, scale: Sequence[float] | None, flip: bool) -> Callable[[Any], Tensor]:
    """Make a random resized crop of an area in ``scale``, or the whole, squeezed to a square; then a flip; bytes."""
    from torchvision.transforms import InterpolationMode, v2

    bicubic = InterpolationMode.BICUBIC
    size = (image_size, image_size)
    steps: list[Any] = [
        v2.RandomResizedCrop(size, tuple(scale), interpolation=bicubic) if scale else v2.Resize(size, bicubic)
    ]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose([*steps, v2.PILToTensor()])


class Files(Dataset[tuple[Tensor, int]]):
    """Items ``(row, seed)`` to ``(image, row)``; the seed makes an item the same in any process."""

    def __init__(self, paths: list[Path], transform: Callable[[Any], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        """Decode one file, under its own random state."""
        row, seed = item
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.read(row), row

    def read(self, row: int) -> Tensor:
        """Decode one file."""
        return decode(self.paths[row], self.transform)

    def __len__(self) -> int:
        return len(self.paths)


class FileLoader(Loader):
    """Batches of image files, decoded by ``num_workers`` processes (0: in this one), the same for any number."""

    def __init__(
        self,
        paths: list[Path],
        targets: Tensor,
        index: Tensor,
        batch_size: int,
        *,
        transform: Callable[[Any], Tensor],
        num_workers: int,
        mean: Sequence[float],
        std: Sequence[float],
        **options: Any,
    ) -> None:
        super().__init__(targets, index, batch_size, **options)
        self.files = Files([paths[i] for i in index.tolist()], transform)
        self.num_workers = num_workers
        self.scale, self.shift = affine(mean, std)

    def batch(self, pixels: Tensor, rows: Tensor) -> Batch:
        """Make a batch of what the workers have decoded, (B, C, H, W) uint8."""
        return Batch(normalise(pixels, self.scale, self.shift), self.targets[rows], self.index[rows])

    def fetch(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        """Decode in the workers, normalise here: bytes travel between processes, not floats."""
        random = generator(self.seed, self.view, "files")
        extra = {} if self.period is None else {"view": self.view}
        seeds = torch.randint(2**62, (len(self.targets),), generator=random).tolist()
        items = [[(row, seeds[row]) for row in rows.tolist()] for rows in batches]
        # its own generator: a DataLoader draws a number from the global one otherwise
        loader = DataLoader(self.files, batch_sampler=items, num_workers=self.num_workers, generator=random)
        try:
            for pixels, rows in loader:
                batch = self.batch(pixels, rows)
                batch.extra.update(extra)
                yield batch
        except KdError as error:  # from a worker it comes with the worker's traceback in its text
            raise KdError(str(error).strip().splitlines()[-1].removeprefix("kd.errors.KdError: ")) from None
