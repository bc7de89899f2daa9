"""What must be as the run has left it before it goes on: its config, its checkpoint, its selected weights.

No torch at import.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.errors import KdError
from kd.records import inputs, weight_files
from kd.records.weight_files import CHECKPOINT, SELECTED
from kd.run import integrity

if TYPE_CHECKING:
    from kd.run.weights import Progress

log = logging.getLogger(__name__)


class Refused(KdError):
    """A run cannot go on from what its directory holds; nothing was written."""


def check_config(run_dir: Path, config: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """``Refused`` when the config is another one than when the run began, or reads other weights or code."""
    if other := inputs.changed(before, config):
        raise Refused(f"resume={run_dir}: {other}; a run goes on as it began")
    if gone := weight_files.absent(config, before):
        raise Refused(
            f"resume={run_dir}: {gone} does not exist: put the weights that the run has read back at that path (a "
            "link will do); the config stays as it is"
        )
    if differs := integrity.config_changed(config, before):
        raise Refused(
            f"resume={run_dir}: config.yaml was changed since the run began ({differs}): put it back, or start a run "
            "of its own with kd train KEY=VALUE …"
        )


def check_files(run_dir: Path) -> Progress:
    """Tell how far the run has come, and make ``student.safetensors`` the file that its checkpoint names.

    Where a run was killed before that file was written, or it was lost, and the checkpoint is of the selected epoch,
    it is written again from there. ``Refused`` where the checkpoint is damaged, or the file missing or another one.
    """
    from kd.run import weights  # start-up: torch

    checkpoint = run_dir / CHECKPOINT
    try:
        if not intact(checkpoint):
            why = "it is truncated or not a checkpoint, or some of its bytes have changed"
            raise KdError(f"{checkpoint} cannot be read: {why}")
        there = weights.read_pickle(checkpoint)
        progress = weights.progress_of(there, checkpoint)
    except KdError as error:
        raise Refused(f"{error}; {_anew(run_dir)}") from None
    best = there["callbacks"].get("SelectedWeights", {})
    epoch, digest = best.get("epoch"), best.get("digest")
    if epoch is None:
        return progress
    found = _selected(run_dir / SELECTED)
    if found is not None and found[1] == epoch and digest in (None, weights.digest(found[0])):
        return progress
    own = weights.student_of(there["state_dict"], there["kd"].get("deployed"))
    if epoch + 1 == progress.epochs and digest == weights.digest(own):
        weights.write(own, run_dir / SELECTED, {**there["kd"]["about"], "epoch": epoch})
        log.info("%s of epoch %d is written again, from the checkpoint", SELECTED, epoch + 1)
        return progress
    what = "is missing or cannot be read" if found is None else "holds other weights"
    raise Refused(
        f"{run_dir / SELECTED} {what}: the run has selected epoch {epoch + 1}, and its weights are nowhere else; put "
        f"that file back, or {_anew(run_dir)}"
    )


def intact(checkpoint: Path) -> bool:
    """Tell whether every byte that counts of a file of ``torch.save`` is as it was written, by the checksums inside."""
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            # torch writes no attributes, and takes an entry for a directory where one says so
            return archive.testzip() is None and not any(entry.external_attr for entry in archive.infolist())
    except (OSError, ValueError, RuntimeError, NotImplementedError, EOFError, zipfile.BadZipFile):
        return False


def _selected(file: Path) -> tuple[dict[str, Any], int | None] | None:
    """Return the weights of a file and the epoch that it was written at; None where it is missing or cannot be read."""
    from kd.run import weights  # start-up: torch

    try:
        state, about = weights.read(file)
    except KdError:
        return None
    return state, about.get("epoch")


def _anew(run_dir: Path) -> str:
    return f"remove {run_dir} to train the run anew"
