"""Adapters: learnable maps from the student's width and size to the teacher's (regressor, connector, projector)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd.losses.base import check_choice
from kd.losses.layouts import (
    NCHW,
    UNKNOWN,
    VECTOR,
    Layout,
    Tapped,
    cannot_compare,
    cure_of,
    map_to_tokens,
    resample,
    tokens_to_map,
)

KINDS = ("auto", "conv_bn_relu", "conv", "linear", "identity")
POINTWISE = ("auto", "conv", "conv_bn_relu", "identity")


class Convert(nn.Module):
    """Brings a feature to another layout and grid, without parameters.

    ``made``: its layout, NCHW or tokens; ``kind``: ``"NCHW"`` or ``"tokens"``. ``size``: the grid that it is resampled
    to, None: its own. Prefix tokens are dropped, or kept with ``keep_prefix`` (tokens to tokens).
    """

    def __init__(self, made: Layout, kind: str, size: tuple[int, int] | None = None, keep_prefix: bool = False) -> None:
        super().__init__()
        self.made, self.kind, self.size, self.keep_prefix = made, kind, size, keep_prefix

    def forward(self, feature: Tensor) -> Tensor:
        """Map (B, N, D) or (B, C, H, W) → the same."""
        if self.made.kind == self.kind == "tokens" and self.size is None:
            return feature[:, self.made.prefix :]
        found = feature if self.made == NCHW else tokens_to_map(feature, self.made.prefix)
        found = found if self.size is None else resample(found, self.size)
        if self.kind == "NCHW":
            return found
        found = map_to_tokens(found)
        return torch.cat([feature[:, : self.made.prefix], found], dim=1) if self.keep_prefix else found


class Pool(nn.Module):
    """The mean over the positions: (B, C, H, W) or (B, N, D) → (B, width); prefix tokens are left out."""

    def __init__(self, made: Layout) -> None:
        super().__init__()
        self.made = made

    def forward(self, feature: Tensor) -> Tensor:
        """Map (B, C, H, W), (B, N, D) or (B, D) → (B, width)."""
        if self.made.kind == "tokens":
            return feature[:, self.made.prefix :].mean(1)
        return feature if self.made == VECTOR else feature.mean((2, 3))


def width_of(tap: Tapped) -> int:
    """Count the numbers that a feature has at each position."""
    return tap.shape[2] if tap.layout.kind == "tokens" else tap.shape[1]


def as_vectors(what: str, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
    """Return two modules that make vectors (B, width) of maps, tokens or vectors.

    ``ValueError`` for an unknown layout.
    """
    if UNKNOWN in (student.layout, teacher.layout):
        raise cannot_compare(what, student, teacher, cure_of(student, teacher, ("maps, tokens or vectors",)))
    return Pool(student.layout), Pool(teacher.layout)


def check_maps(what: str, student: Tapped, teacher: Tapped) -> tuple[Tapped, Tapped]:
    """Return both taps as maps (B, C, H, W). ``ValueError`` where one is neither a map nor a square grid of tokens."""
    if not {student.layout.kind, teacher.layout.kind} <= {"NCHW", "tokens"}:
        cure = cure_of(student, teacher, ("maps (B, C, H, W)", "tokens"))
        raise cannot_compare(what, student, teacher, cure)
    for tap in (student, teacher):
        if tap.grid is None:
            cure = f"{tap.bare} has no square grid, say how many prefix tokens it has as {tap.bare}@tokens1"
            raise cannot_compare(what, student, teacher, cure)
    return student.as_map(), teacher.as_map()


def as_maps(what: str, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
    """Return two modules that make maps (B, C, H, W) of one grid, the smaller of both; the widths stay."""
    own, other = check_maps(what, student, teacher)
    size = (min(own.shape[2], other.shape[2]), min(own.shape[3], other.shape[3]))
    return Convert(student.layout, "NCHW", size), Convert(teacher.layout, "NCHW", size)


def pointwise(
    what: str, kind: str, student: Tapped, teacher: Tapped, norm: bool = False
) -> tuple[nn.Module, nn.Module]:
    """Build an adapter of maps by a 1×1 convolution, and what the teacher's map goes through (no parameters).

    The student's grid is resampled to the teacher's. ``kind``: ``auto``, a convolution where the widths differ or
    ``norm`` says that batch norm follows it; ``conv``, always; ``conv_bn_relu``, with batch norm and ReLU behind it;
    ``identity``, no parameters, equal widths.
    """
    check_choice("adapter", kind, POINTWISE)
    own, other = check_maps(what, student, teacher)
    widths = own.shape[1], other.shape[1]
    if kind == "identity" and widths[0] != widths[1]:
        raise cannot_compare(what, student, teacher, "adapter = identity needs equal widths: use adapter=auto")
    steps: list[nn.Module] = [Convert(student.layout, "NCHW", other.grid)]
    rectified = kind == "conv_bn_relu"
    norm = norm or rectified
    if kind in ("conv", "conv_bn_relu") or (kind == "auto" and (norm or widths[0] != widths[1])):
        steps.append(nn.Conv2d(*widths, kernel_size=1, bias=not norm))
        steps += [nn.BatchNorm2d(widths[1])] if norm else []
        steps += [nn.ReLU()] if rectified else []
    return nn.Sequential(*steps), Convert(teacher.layout, "NCHW")


def match(what: str, kind: str, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
    """Build two modules: the adapter of the student's tensor, and what the teacher's goes through (no parameters).

    Tensors of one layout are adapted as :func:`build_adapter` says. With ``auto`` they are compared in the teacher's
    layout otherwise, with ``conv`` and ``conv_bn_relu`` as maps, with ``linear`` as tokens: the student's grid is
    resampled to the teacher's, ``auto`` resamples maps that no convolution fits as well. Prefix tokens take part where
    both have equally many, otherwise they are left out on both sides.

    ``ValueError``, with both taps and layouts and what to do, where they cannot be compared.
    """
    check_choice("adapter", kind, KINDS)
    try:
        made, other = student.layout, teacher.layout
        if UNKNOWN in (made, other):
            if kind != "auto":  # who chooses the map says what the dimensions are
                return build_adapter(kind, student.shape, teacher.shape), nn.Identity()
            cure = f"{cure_of(student, teacher, ())}, or choose adapter=linear, conv or identity"
            raise cannot_compare(what, student, teacher, cure)
        if made == other == NCHW and kind == "auto" and not _fits(student.shape[2:], teacher.shape[2:]):
            return _resampled(student, teacher, "conv_bn_relu"), nn.Identity()
        linear = kind in ("auto", "linear") and student.shape[1] == teacher.shape[1]
        if made == other and (made.kind != "tokens" or kind == "identity" or linear):
            return build_adapter(kind, student.shape, teacher.shape), nn.Identity()
        if VECTOR in (made, other) or kind == "identity":
            raise cannot_compare(what, student, teacher, cure_of(student, teacher, ("the same kind of feature",)))
        if kind in ("conv", "conv_bn_relu") or (kind == "auto" and other == NCHW):
            return _as_maps(kind, student, teacher)
        return _as_tokens(what, student, teacher)
    except ValueError as error:
        if str(student) in str(error) and str(teacher) in str(error):
            raise
        raise ValueError(f"{error} ({student}, {teacher})") from None


def _as_maps(kind: str, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
    own, other = student.as_map(), teacher.as_map()
    goal = nn.Identity() if teacher.layout == NCHW else Convert(teacher.layout, "NCHW")
    if kind == "auto" and not _fits(own.shape[2:], other.shape[2:]):
        return _resampled(student, other, "conv_bn_relu"), goal
    adapter = build_adapter(kind, own.shape, other.shape)
    return (adapter if student.layout == NCHW else nn.Sequential(Convert(student.layout, "NCHW"), adapter)), goal


def _as_tokens(what: str, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
    same = student.layout == teacher.layout  # as many prefix tokens: they take part
    counts = [t.shape[1] - t.layout.prefix if t.layout.kind == "tokens" else None for t in (student, teacher)]
    size = None
    if counts[0] is None or counts[0] != counts[1]:
        if student.grid is None or teacher.grid is None:
            cure = (
                "they must have equal N, or be square grids behind the prefix tokens, the number of which is said as "
                f"{(student if student.grid is None else teacher).bare}@tokens1"
            )
            raise cannot_compare(what, student, teacher, cure)
        size = teacher.grid
    width, target = (t.shape[1] if t.layout == NCHW else t.shape[2] for t in (student, teacher))
    adapter = nn.Sequential(Convert(student.layout, "tokens", size, keep_prefix=same), nn.Linear(width, target))
    return adapter, nn.Identity() if same else Convert(teacher.layout, "tokens")


def _resampled(student: Tapped, teacher: Tapped, kind: str) -> nn.Module:
    """Resample to the teacher's grid, then a 1×1 convolution."""
    own = student.as_map()
    shape = (*own.shape[:2], *teacher.shape[2:])
    return nn.Sequential(Convert(student.layout, "NCHW", teacher.grid), build_adapter(kind, shape, teacher.shape))


def _fits(size: Sequence[int], target: Sequence[int]) -> bool:
    """Say whether one of the convolutions brings a map of this size to the target."""
    pairs = list(zip(size, target, strict=True))
    return all(2 * s == t for s, t in pairs) or all(s >= t for s, t in pairs)


def build_adapter(kind: str, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> nn.Module:
    """Build a module that maps a tensor of ``student_shape`` to ``teacher_shape``; the first dimension is the batch.

    ``kind``:

    - ``conv``: one convolution between maps (B, C, H, W). Student twice the teacher's size: 3×3, stride 2; half of it:
      transposed 4×4, stride 2; otherwise a valid convolution with kernel 1 + size_s − size_t, so the student must not
      be the smaller one. FitNets' regressor (section 2.2) as the code of CRD's benchmark sizes it.
    - ``conv_bn_relu``: the same, then batch norm and ReLU, as in that code (teacher taps after a ReLU are positive).
    - ``linear``: vectors (B, D) and tokens (B, N, D), equal N.
    - ``identity``: no parameters, equal shapes.
    - ``auto``: ``conv_bn_relu`` for maps, ``linear`` for the rest.

    ``ValueError``, with both shapes, when the shapes do not fit the kind.
    """
    check_choice("adapter", kind, KINDS)
    student, teacher = tuple(student_shape), tuple(teacher_shape)
    if kind == "auto":
        kind = "conv_bn_relu" if len(student) == 4 else "linear"
    if kind == "identity":
        if student[1:] != teacher[1:]:
            raise _misfit(kind, student, teacher, "both must be equal, otherwise use adapter=auto")
        return nn.Identity()
    if kind == "linear":
        if len(student) not in (2, 3) or len(student) != len(teacher) or student[1:-1] != teacher[1:-1]:
            raise _misfit(kind, student, teacher, "both must be (B, D), or (B, N, D) with equal N; for maps use conv")
        return nn.Linear(student[-1], teacher[-1])
    if len(student) != 4 or len(teacher) != 4:
        raise _misfit(kind, student, teacher, "both must be maps (B, C, H, W); for vectors and tokens use linear")
    conv = _conv(kind, student, teacher)
    if kind == "conv":
        return conv
    return nn.Sequential(conv, nn.BatchNorm2d(teacher[1]), nn.ReLU())


def _conv(kind: str, student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module:
    channels, size, target = (student[1], teacher[1]), student[2:], teacher[2:]
    if all(s == 2 * t for s, t in zip(size, target, strict=True)):
        return nn.Conv2d(*channels, kernel_size=3, stride=2, padding=1)
    if all(2 * s == t for s, t in zip(size, target, strict=True)):
        return nn.ConvTranspose2d(*channels, kernel_size=4, stride=2, padding=1)
    if all(s >= t for s, t in zip(size, target, strict=True)):
        return nn.Conv2d(*channels, kernel_size=(1 + size[0] - target[0], 1 + size[1] - target[1]))
    raise _misfit(kind, student, teacher, "a smaller map can be enlarged only to exactly twice its size")


def _misfit(kind: str, student: tuple[int, ...], teacher: tuple[int, ...], rule: str) -> ValueError:
    return ValueError(f"adapter = {kind} cannot map the student's {student} to the teacher's {teacher}: {rule}")
