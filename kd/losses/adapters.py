"""Adapters: learnable maps from the student's width and size to the teacher's (regressor, connector, projector)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kd.losses.base import check_choice

KINDS = ("auto", "conv_bn_relu", "conv", "linear", "identity")


def build_adapter(kind: str, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> nn.Module:
    """A module that maps a tensor of ``student_shape`` to ``teacher_shape``; the first dimension is the batch.

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
