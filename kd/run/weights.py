"""Reading and writing weights: run directories, Lightning checkpoints, safetensors, plain state dicts."""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kd.errors import KdError
from kd.parallel import group
from kd.records.durable import replacing, share
from kd.records.weight_files import locate


def save(network: nn.Module, path: Path, about: dict[str, Any]) -> str:
    """Write a network's plain state dict with ``about`` (model, data facts) as metadata, atomically; its digest.

    Of several processes all call it, and the first one writes.
    """
    state = whole_state(network)
    if group.rank() == 0:
        write(state, path, about)
    return digest(state)


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """Copy a network's plain state dict to the CPU. Of several processes all call it, and the first one gets it."""
    state = {}
    for name, tensor in network.state_dict().items():
        full = group.whole(tensor.detach())
        if group.rank() == 0:
            state[name] = full.cpu().contiguous().clone()
    return state


def write(state: dict[str, Tensor], path: Path, about: dict[str, Any]) -> None:
    """Write a state dict with ``about`` as metadata, atomically. ``MachineFailure`` when it cannot be written."""
    with replacing(path) as temporary:
        try:
            save_file(state, str(temporary), metadata={"kd": json.dumps(about), "format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from None
        share(temporary)


def digest(state: dict[str, Tensor]) -> str:
    """Hexadecimal SHA-256 of the names, types, shapes and values of a state dict on the CPU."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read(path: str | Path, epoch: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the state dict in a file (or run directory, of an epoch), and what was recorded with it (else empty).

    Files are read without running code: a pickle that needs more than tensors and plain containers is refused.
    Raises ``KdError`` for files that are missing, truncated, or no checkpoints.
    """
    file = locate(path, epoch)
    if file.suffix == ".safetensors":
        state, about = _read_safetensors(file)
    else:
        content = read_pickle(file)
        own = content.get("kd") if isinstance(content, dict) else None
        own = own if isinstance(own, dict) else {}
        state, about = _state_dict(content, file, own.get("deployed")), own.get("about", {})
    facts = about.get("data", {}) if isinstance(about, dict) else None
    shape = facts.get("input_shape", []) if isinstance(facts, dict) else None
    if not isinstance(shape, (list, tuple)) or len(shape) > 4 or not all(type(n) is int and n > 0 for n in shape):
        raise KdError(f"{file} cannot be read: what it says of its network and data is not what kd writes")
    return state, about


def read_pickle(file: Path) -> Any:
    """Read a file that ``torch.save`` wrote, without running code. ``KdError`` as :func:`read`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read is said below
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "Unsupported operand" in str(error):
            raise KdError(f"{file} is refused: it is a pickle that would run code, not only tensors") from None
        raise KdError(f"{file} cannot be read: it is truncated or not a checkpoint") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError):
        raise KdError(f"{file} cannot be read: it is truncated or not a checkpoint") from None


@dataclass(frozen=True)
class Progress:
    """How far a run has come: optimiser steps, epochs, and seconds in all its sessions."""

    steps: int = 0
    epochs: int = 0
    seconds: float = 0.0


def progress(checkpoint: Path) -> Progress:
    """Return what a checkpoint to resume from says of it. ``KdError`` as :func:`read`."""
    return progress_of(read_pickle(checkpoint), checkpoint)


def progress_of(there: Any, checkpoint: Path) -> Progress:
    """Return the same, of a checkpoint that was read already."""
    try:
        seconds = there["callbacks"].get("WallClock", {}).get("seconds", 0.0)
        steps = int(there["global_step"]) // max(1, len(there.get("optimizer_states", ())))  # Lightning counts all
        return Progress(steps, int(there["epoch"]) + 1, round(float(seconds), 3))
    except (KeyError, TypeError, AttributeError):
        raise KdError(f"{checkpoint} cannot be read: it is not a checkpoint of a run") from None


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], Any]:
    try:
        with safe_open(str(file), framework="pt") as handle:
            about = json.loads((handle.metadata() or {}).get("kd", "{}"))
            return {name: handle.get_tensor(name) for name in handle.keys()}, about  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError):
        raise KdError(f"{file} cannot be read: it is truncated or not a safetensors file") from None


def _state_dict(content: Any, file: Path, deployed: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Unwrap the usual shells: Lightning's and others' outer dictionaries, DDP's and compile's prefixes."""
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise KdError(f"{file} holds no state dict (name → tensor)")
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if any(name.startswith("student.") for name in state):  # a checkpoint of this package
        state = student_of(state, deployed)
    for prefix in ("module.", "_orig_mod.", "model."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def student_of(state: Mapping[str, Tensor], deployed: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Return the network that is deployed from a module's state dict: the student, or its average where one is kept.

    ``deployed``: where terms leave a head on the student, the name of each of its tensors in ``state``.
    """
    if deployed and not any(name.startswith("average.") for name in state):
        return {name: state[own] for name, own in deployed.items()}
    prefix = "average." if any(name.startswith("average.") for name in state) else "student."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def load(network: nn.Module, state: dict[str, Tensor], source: str | Path, role: str) -> None:
    """Put a state dict into a network, strictly. ``KdError`` names the first tensors that do not fit."""
    own = network.state_dict()
    for name in own.keys() & state.keys():
        if own[name].shape != state[name].shape:
            raise KdError(
                f"{source} does not fit the {role}: {name} is {tuple(state[name].shape)} in the file "
                f"and {tuple(own[name].shape)} in the network"
            )
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        parts = [f"lacks {', '.join(missing[:3])}" if missing else "", f"has {', '.join(extra[:3])}" if extra else ""]
        differ = " and ".join(part for part in parts if part)
        raise KdError(
            f"{source} does not fit the {role}: the file {differ} ({len(missing)} missing, {len(extra)} unexpected)"
        )
    if any(hasattr(tensor, "full_tensor") for tensor in own.values()):  # sharded
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(network, dict(state), options=StateDictOptions(full_state_dict=True))
    else:
        network.load_state_dict(state)
