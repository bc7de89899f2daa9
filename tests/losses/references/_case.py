"""One reference file: its tensors, its settings, and the function of ours that takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests import golden_option

ABOUT = ("method", "function", "reference")
UNREAD = {"targets"}  # reference files hold the labels also where the loss does not read them


class Case:
    """One file: tensors by name, settings, and the reference values."""

    def __init__(self, path: Path) -> None:
        from tests.losses import references  # which imports this module

        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        self.stem = path.stem
        self.about = {name: str(arrays.pop(name)) for name in ABOUT if name in arrays}
        found = golden_option.belongs(path, self.about.get("method"), self.about.get("reference"))
        self.method, self.pattern = found.method, found.pattern
        self.loss = float(arrays.pop("loss"))
        single = references.closest(path.stem, references.single()) is not None
        self.bits = int(arrays.pop("reference_float_bits", 32 if single else self.stored_bits(arrays)))
        self.alternatives, self.factors, self.variants, self.grads = (
            {k.removeprefix(start): arrays.pop(k) for k in list(arrays) if k.startswith(start)}
            for start in ("alt_loss__", "alt_factor__", "alt_variant__", "grad_")
        )
        renamed = {"targets" if k == "target" else k: v for k, v in arrays.items()}
        self.hyper: dict[str, Any] = {k: v.item() for k, v in renamed.items() if v.ndim == 0}
        # stored exactly, perhaps in fewer bits: computed in float64 whatever the reference ran in
        exact = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in renamed.items() if v.ndim > 0}
        self.tensors = {k: torch.from_numpy(v) for k, v in exact.items()}
        for name in self.grads:
            self.tensors[name].requires_grad_()

    @staticmethod
    def stored_bits(arrays: dict[str, Any]) -> int:
        """Of a file that does not say in which precision the reference ran: 64, if all that it holds is so."""
        return 64 if all(v.dtype == np.float64 for v in arrays.values() if v.ndim and v.dtype.kind == "f") else 32

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def layers(self, side: str) -> list[Tensor]:
        count = sum(name.startswith(f"{side}_feature_") for name in self.tensors)
        return [self.tensors[f"{side}_feature_{i}"] for i in range(count)]

    def calls(self, function: Callable[..., Tensor]) -> list[dict[str, Any]] | str:
        """The arguments of each call whose values are summed, or why the function does not take what is in the file."""
        parameters = inspect.signature(function).parameters
        given: dict[str, Any] = {**self.hyper, **self.tensors}
        layered = {f"{s}_feature": self.layers(s) for s in ("student", "teacher") if self.layers(s)}
        lists = {f"{name}s": tensors for name, tensors in layered.items()}
        single = {k: v for k, v in layered.items() if k in parameters}
        used = {k: v for k, v in {**given, **lists}.items() if k in parameters}
        read = {k for k in given if k in parameters or k.rpartition("_")[0] in single}
        read |= {k for k in given if k.rpartition("_")[0] + "s" in used and k.rpartition("_")[0] + "s" in lists}
        missing = [n for n, p in parameters.items() if p.default is p.empty and n not in used and n not in single]
        if missing or given.keys() - read - UNREAD:
            return f"lacks {missing or 'nothing'}, does not take {sorted(given.keys() - read - UNREAD) or 'nothing'}"
        rows = zip(*single.values(), strict=True) if single else [()]
        return [{**used, **dict(zip(single, row, strict=True))} for row in rows]

    def function(self) -> tuple[Callable[..., Tensor], list[dict[str, Any]]]:
        """The function of the method's file that takes exactly what is in this one, and the arguments of its calls."""
        assert self.method is not None, f"{self.stem}.npz is of no method"
        module = import_module(golden_option.methods()[self.method])
        named = self.about.get("function")
        found = {n: self.calls(getattr(module, n)) for n in module.__all__ if named in (None, n)}
        fit = {n: calls for n, calls in found.items() if not isinstance(calls, str)}
        why = "; ".join(f"{n} {calls}" for n, calls in found.items() if isinstance(calls, str))
        assert len(fit) == 1, f"{self.stem}.npz fits {list(fit) or 'no function'} of {module.__name__}: {why}"
        ((name, calls),) = fit.items()
        return getattr(module, name), calls

    def value(self, **other: Any) -> Tensor:
        """Our value; ``other``: settings in the place of the file's."""
        function, calls = self.function()
        return torch.stack([function(**{**call, **other}) for call in calls]).sum()
