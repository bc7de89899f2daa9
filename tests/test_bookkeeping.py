"""The step buffer's means are exact, whatever the batches were."""

from __future__ import annotations

import math

import pytest
import torch

from kd.distill.step_buffer import StepBuffer, first_bad


def steps(buffer: StepBuffer, *values_and_rows) -> None:
    for values, rows in values_and_rows:
        buffer.add([torch.tensor(float(v)) for v in values], rows)


def test_means_are_over_rows_and_over_labelled_rows() -> None:
    buffer = StepBuffer(["loss", "ce", "kd"], 10, torch.device("cpu"), over_labelled=["ce"], counts=["acc1"])
    assert buffer.names == ["loss", "ce", "kd", "acc1", "labelled"]
    # loss, ce, kd, right answers, labelled rows: a batch without labels, and a smaller last one
    steps(buffer, ([3, 2, 1, 1, 2], 8), ([1, 0, 1, 0, 0], 8), ([6, 5, 3, 1, 1], 4))
    buffer.read()
    means = buffer.means(*buffer.take_epoch())
    assert means == pytest.approx(
        {"loss": (3 * 8 + 8 + 6 * 4) / 20, "ce": (2 * 2 + 5) / 3, "kd": (8 + 8 + 12) / 20, "acc1": 2 / 3}
    )


def test_means_over_labelled_rows_are_left_out_where_there_are_none() -> None:
    buffer = StepBuffer(["loss", "ce"], 10, torch.device("cpu"), over_labelled=["ce"], counts=["acc1"])
    steps(buffer, ([3, 0, 0, 0], 8), ([1, 0, 0, 0], 8))
    buffer.read()
    assert buffer.means(*buffer.take_epoch()) == {"loss": 2.0}


def test_windows_add_up_to_the_epoch_and_the_next_starts_anew() -> None:
    buffer = StepBuffer(["loss"], 2, torch.device("cpu"))
    for value in (1, 2, 3):
        steps(buffer, ([value, 4], 4))
        if buffer.full:
            buffer.read()
    assert buffer.means(*buffer.last) == {"loss": 1.5}
    buffer.read()
    assert buffer.means(*buffer.last) == {"loss": 3.0}
    assert buffer.means(*buffer.take_epoch()) == {"loss": 2.0}
    assert buffer.take_epoch()[1] == 0


def test_the_first_bad_value_is_found() -> None:
    window = torch.ones(4, 3)
    assert first_bad(window) is None
    window[2, 1] = math.nan
    window[2, 0] = window[3, 2] = math.inf
    assert first_bad(window) == (2, [0, 1])
