"""What the sets that torchvision can download have in common: fetching, and the sentence when they are not there."""

from __future__ import annotations

from pathlib import Path

from kd.errors import KdError


def missing(title: str, folder: Path, option: str) -> KdError:
    """Return the error for a set that is not in ``folder``."""
    return KdError(
        f"{title} was not found in {folder}: get it with `kd train data={option} data.download=true`, "
        "or name the folder of data sets that has it with paths.data or the environment variable KD_DATA"
    )


def fetch(attribute: str, title: str, root: Path) -> None:
    """Have torchvision download its set ``attribute`` into ``root``. Raises ``KdError`` when that fails."""
    import torchvision.datasets

    try:
        getattr(torchvision.datasets, attribute)(str(root), train=True, download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise KdError(
            f"data.download = true, but {title} could not be downloaded into {root} ({reason}): download it elsewhere "
            "and name its folder with paths.data or the environment variable KD_DATA"
        ) from None
