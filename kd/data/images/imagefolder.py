"""A folder of images: ``train/CLASS/*.png``, with ``val/`` and ``test/`` beside it if there are any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd.config.rules import Rule, refusals, refuse
from kd.data.content import FileContent
from kd.data.images.files import list_images
from kd.data.images.image_files import ImageFiles
from kd.data.images.parts import Samples, Source, folder_of
from kd.errors import KdError

RULES = {"folder": Rule("the folder that holds train/CLASS/*.png, for example pets", bool)}


class ImageFolder(ImageFiles):
    """Class folders of RGB images; their options are those of :class:`ImageFiles`.

    ``folder``: relative to ``root``, or absolute

    ``num_classes`` and ``class_names`` (the class folders, sorted) are known after ``setup``. ``index`` is the position
    in the sorted listing of the folder that the image lies in.
    """

    def __init__(self, *, folder: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        refuse(refusals("data.", locals(), RULES))
        self.folder = str(folder)

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
        parts = self.kept(parts)
        return Source(parts["train"], val=parts.get("val"), test=parts.get("test"))

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
