"""What a cache keeps of an output: its k likeliest classes, its hidden rows, or its logits, as arrays and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kd.errors import KdError
from kd.losses.base import Output, TopK, at_least_float32, check_choice, check_temperature
from kd.tasks.output_projection import linear_of

FORMS = ("topk", "hidden", "logits")
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
CHUNK = 32  # rows whose logits over a large vocabulary are made at once
NUMBERS = 2**20  # logits at once of a smaller one
LOWEST = -6e4  # of log-probabilities: above the least number of float16

Arrays = dict[str, Tensor]


@dataclass(frozen=True)
class Form:
    """What is kept of each row.

    ``what``: ``"topk"``: the ``k`` likeliest classes with log-probabilities, and the mass of all others at each of the
    ``temperatures`` and at 1; ``"hidden"``: the hidden state that the output projection makes the logits of, so that
    they are what they were at any temperature; ``"logits"``: all of them. ``precision``: of the numbers, ``"float16"``,
    ``"bfloat16"`` or ``"float32"``; None: float16, of hidden states that of the network.

    ``ValueError`` for other values.
    """

    what: str = "topk"
    k: int = 64
    temperatures: Sequence[float] = field(default=(1.0,))
    precision: str | None = None

    def __post_init__(self) -> None:
        check_choice("what", self.what, FORMS)
        if isinstance(self.k, bool) or self.k != int(self.k) or self.k < 1:
            raise ValueError(f"k = {self.k} is not allowed: it must be a whole number above 0")
        if self.precision is not None:
            check_choice("precision", self.precision, tuple(PRECISIONS))
        if isinstance(self.temperatures, (int, float, str)):
            raise ValueError(f"temperatures = {self.temperatures} is not allowed: it must be a list of numbers above 0")
        temperatures = sorted({1.0, *map(check_temperature, self.temperatures)})
        object.__setattr__(self, "temperatures", tuple(temperatures))

    def described(self) -> str:
        """Say in a line what is kept: two caches with equal lines keep the same."""
        precision = self.precision or ("its own precision" if self.what == "hidden" else "float16")
        if self.what != "topk":
            return f"{self.what} in {precision}"
        return f"top {self.k} in {precision} at T = {', '.join(f'{t:g}' for t in self.temperatures)}"

    def encode(self, output: Output) -> tuple[Arrays, int | None]:
        """Return rows as tensors (rows, …) on the CPU, by name, and the number of classes (None: of hidden states)."""
        if self.what == "hidden":
            if output.hidden is None or output.head is None:
                raise KdError(
                    "teacher.answers.what = hidden needs a teacher of which the output projection is known (a language "
                    "model of transformers, one, not compiled): set what=logits, or what=topk"
                )
            return {"hidden": self._rounded(output.hidden)}, None
        parts = [self._topk(logits) if self.what == "topk" else self._dense(logits) for logits in _logits(output)]
        return put_together([arrays for arrays, _ in parts]), parts[0][1]

    def decode(self, arrays: Mapping[str, Tensor], classes: int | None, head: nn.Module | None) -> Output:
        """Make the output of rows that :meth:`encode` has made; ids as ``narrowed`` leaves them."""
        if self.what == "hidden":
            hidden = arrays["hidden"]
            weight = getattr(head, "weight", None)
            return Output(hidden=hidden if weight is None else hidden.to(weight.dtype), head=head)
        if self.what == "logits":
            return Output(at_least_float32(arrays["logits"]))
        assert classes is not None
        rests = {t: arrays["log_rests"][:, place] for place, t in enumerate(self.temperatures)}
        ids = arrays["ids"].long().cumsum(-1)
        return Output(topk=TopK(ids, arrays["log_probs"], classes, rests, arrays["log_sums"]))

    def _topk(self, logits: Tensor) -> tuple[Arrays, int]:
        sums = logits.logsumexp(-1, keepdim=True)
        log_probs = logits - sums
        ids = log_probs.topk(min(self.k, logits.shape[-1]), dim=-1).indices.sort(-1).values
        others = log_probs.scatter(-1, ids, -math.inf)
        rests = torch.stack([(others / t).logsumexp(-1) for t in self.temperatures], dim=-1)
        steps = torch.diff(ids, dim=-1, prepend=torch.zeros_like(ids[:, :1]))  # from one id to the next larger
        found = {"ids": steps.to("cpu", torch.int32), "log_probs": self._rounded(log_probs.gather(-1, ids))}
        found |= {"log_rests": rests.to("cpu", torch.float32), "log_sums": sums.squeeze(-1).to("cpu", torch.float32)}
        return found, logits.shape[-1]

    def _dense(self, logits: Tensor) -> tuple[Arrays, int]:
        return {"logits": self._rounded(logits)}, logits.shape[-1]

    def _rounded(self, numbers: Tensor) -> Tensor:
        own = numbers.dtype if self.what == "hidden" else torch.float16
        dtype = own if self.precision is None else PRECISIONS[self.precision]
        numbers = numbers.clamp(min=LOWEST) if self.what == "topk" and dtype == torch.float16 else numbers
        rounded = numbers.detach().to("cpu", dtype)
        if not bool(rounded.isfinite().all()) and bool(numbers.isfinite().all()):
            raise KdError(
                f"teacher.answers.precision = {str(dtype).removeprefix('torch.')} cannot hold the teacher's "
                f"{self.what}, they are too large: set precision=float32"
            )
        return rounded


def put_together(parts: Sequence[Arrays]) -> Arrays:
    """Join arrays of the same names along their rows."""
    with torch.autocast("cpu", enabled=False):  # which knows no float16
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def narrowed(arrays: Arrays) -> Arrays:
    """Return the arrays of a shard, with the steps between ids in the smallest type that holds them."""
    if "ids" not in arrays:
        return arrays
    largest = int(arrays["ids"].max()) if arrays["ids"].numel() else 0
    dtype = next(t for t, most in ((torch.uint8, 2**8), (torch.uint16, 2**16), (torch.int32, 2**31)) if largest < most)
    return {**arrays, "ids": arrays["ids"].to(dtype)}


def _logits(output: Output) -> Iterator[Tensor]:
    """Yield the logits in single precision, a chunk of rows at a time where they are not yet made."""
    if output.hidden is not None and output.head is not None:
        layer = linear_of(output.head)
        for part in output.hidden.split(CHUNK if layer is None else _rows_of(layer.weight.shape[0])):
            yield at_least_float32(output.head(part))
        return
    if not output.has_logits:
        raise KdError("teacher.answers needs a teacher with logits")
    yield from at_least_float32(output.logits).split(_rows_of(output.logits.shape[-1]))


def _rows_of(classes: int) -> int:
    return max(CHUNK, NUMBERS // max(1, classes))


def kept_projection(head: Any) -> tuple[Arrays, dict[str, str]]:
    """Return the output projection as tensors, and the numbers that go with it, as text.

    ``KdError`` where it is more than a linear layer with a scale and a cap.
    """
    if (layer := linear_of(head)) is None:
        kind = type(getattr(head, "projection", head)).__name__
        raise KdError(
            f"teacher.answers.what = hidden keeps a linear output projection, this one is a {kind}: set what=topk"
        )
    tensors = {"weight": layer.weight, **({} if layer.bias is None else {"bias": layer.bias})}
    about = {"scale": repr(float(getattr(head, "scale", 1.0)))}
    softcap = getattr(head, "softcap", None)
    about |= {} if softcap is None else {"softcap": repr(float(softcap))}
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, about
