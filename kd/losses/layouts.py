"""Layouts: what the dimensions of a tapped tensor are, and the way from one layout to another, without parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

KINDS = {"NCHW": "B, C, H, W", "NHWC": "B, H, W, C", "tokens": "B, N, D", "vector": "B, D", "unknown": ""}


@dataclass(frozen=True)
class Layout:
    """What the dimensions of a tensor are.

    ``kind``: ``"NCHW"`` (B, C, H, W), ``"NHWC"`` (B, H, W, C), ``"tokens"`` (B, N, D), ``"vector"`` (B, D) or
    ``"unknown"``: attention maps, windows, and all that nobody says. ``prefix``: of tokens, how many stand before the
    patches: class, distillation, register tokens.
    """

    kind: str
    prefix: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"layout = {self.kind} is not allowed: it must be {', '.join(KINDS)}")

    @property
    def rank(self) -> int | None:
        """Number of dimensions, the batch included; None where it is not known."""
        return len(KINDS[self.kind].split(",")) if KINDS[self.kind] else None

    def __str__(self) -> str:
        if self.kind == "tokens":
            return f"tokens, {self.prefix or 'no'} prefix token{'' if self.prefix == 1 else 's'}"
        return self.kind if self.kind != "unknown" else "unknown layout"


UNKNOWN = Layout("unknown")
VECTOR = Layout("vector")
NCHW = Layout("NCHW")


def parse_layout(text: str, prefix: int = 0) -> Layout:
    """Read ``NCHW``, ``NHWC``, ``vector``, ``tokens`` (with ``prefix`` tokens first) or ``tokens2`` (with two).

    ``ValueError``, with the text and what is allowed, for anything else.
    """
    found = re.fullmatch(r"(NCHW|NHWC|vector)|tokens(\d*)", text)
    if found is None:
        raise ValueError(
            f"layout = {text} is not allowed: it must be NCHW, NHWC, vector, tokens, or tokens1 with one prefix token"
        )
    if found[1]:
        return Layout(found[1])
    return Layout("tokens", int(found[2]) if found[2] else prefix)


@dataclass(frozen=True)
class Tapped:
    """One tap of one network, as far as it is known before the first step."""

    side: str
    name: str
    shape: tuple[int, ...]
    layout: Layout

    def __str__(self) -> str:
        return f"{self.side} tap {self.name} ({self.layout}: {' × '.join(map(str, self.shape[1:]))})"

    @property
    def grid(self) -> tuple[int, int] | None:
        """Height and width of a map, or of the square of tokens behind the prefix; None where there is no grid."""
        if self.layout.kind == "NCHW":
            return self.shape[2], self.shape[3]
        if self.layout.kind != "tokens":
            return None
        patches = self.shape[1] - self.layout.prefix
        side = math.isqrt(max(0, patches))
        return (side, side) if patches > 0 and side * side == patches else None

    def as_map(self) -> Tapped:
        """Return the same feature as a map (B, C, H, W). ``ValueError`` where it has no grid."""
        if self.layout.kind == "NCHW":
            return self
        if self.grid is None:
            raise ValueError(
                f"{self.side} tap {self.bare} has no square grid: say how many prefix tokens it has, as "
                f"{self.bare}@tokens1"
            )
        return replace(self, shape=(self.shape[0], self.shape[2], *self.grid), layout=NCHW)

    @property
    def bare(self) -> str:
        """The name of the tap without a declared layout."""
        return self.name.partition("@")[0]


def cannot_compare(what: str, student: Tapped, teacher: Tapped, cure: str) -> ValueError:
    """Make a ``ValueError`` of one sentence with both taps and their layouts, and what to do."""
    return ValueError(f"{what} cannot compare {student} with {teacher}: {cure}")


def cure_of(student: Tapped, teacher: Tapped, wanted: Sequence[str]) -> str:
    """Say what to do about a pair that does not fit: declare an unknown layout, or tap elsewhere."""
    unknown = [tap for tap in (student, teacher) if tap.layout == UNKNOWN]
    if unknown:
        kinds = {4: "NCHW or @NHWC", 3: "tokens"}.get(len(unknown[0].shape), "tokens")
        return (
            f"attention maps are no features, and for a feature say its layout in the tap's name, "
            f"{unknown[0].side}_taps=[{unknown[0].bare}@{kinds}]"
        )
    return f"tap {' or '.join(wanted)} on both sides"


# ---------------------------------------------------------------------- from one layout to another


def tokens_to_map(tokens: Tensor, prefix: int = 0) -> Tensor:
    """Map (B, prefix + S², D) → (B, D, S, S): without prefix tokens. ``ValueError`` if the patches are no square."""
    patches = tokens.shape[1] - prefix
    side = math.isqrt(max(0, patches))
    if patches < 1 or side * side != patches:
        raise ValueError(
            f"{tokens.shape[1]} tokens with {prefix} prefix tokens are no square grid: {patches} patches are left"
        )
    return tokens[:, prefix:].transpose(1, 2).unflatten(2, (side, side))


def map_to_tokens(feature: Tensor) -> Tensor:
    """Map (B, C, H, W) → (B, H·W, C), row by row."""
    return feature.flatten(2).transpose(1, 2)


def resample(feature: Tensor, size: Sequence[int]) -> Tensor:
    """Bring a map (B, C, H, W) to another grid: the mean over each cell where no side grows, otherwise bilinear.

    A map of that size is returned as it is.
    """
    height, width = feature.shape[2:]
    if (height, width) == tuple(size):
        return feature
    if size[0] <= height and size[1] <= width:
        return F.adaptive_avg_pool2d(feature, (size[0], size[1]))
    return F.interpolate(feature, (size[0], size[1]), mode="bilinear", align_corners=False)


def mean_of_positions(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Average hidden states (samples, positions, width) over the positions of ``mask`` → (samples, width)."""
    if mask is None:
        return hidden.mean(1)
    weights = mask.float().unsqueeze(-1)  # a sum over many positions overflows in halves
    return ((hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)).to(hidden.dtype)
