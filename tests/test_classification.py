"""The metrics of image classification, against scikit-learn and by hand; ties go to the first class, NaN scores 0."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch.nn import functional as F

from kd.losses.base import Batch, Output
from kd.tasks.classification import Classification


def measured(logits, targets, teacher=None) -> dict[str, float]:
    metrics = Classification().meter(logits.shape[1])
    for part in range(0, len(logits), 7):
        rows = slice(part, part + 7)
        metrics.add(logits[rows], targets[rows], None if teacher is None else teacher[rows])
    return metrics.compute(teacher is not None)


def test_against_other_implementations() -> None:
    torch.manual_seed(0)
    logits, targets, teacher = torch.randn(50, 8) * 2, torch.randint(0, 8, (50,)), torch.randn(50, 8)
    found = measured(logits, targets, teacher)
    p = logits.softmax(1).double().numpy()
    p /= p.sum(1, keepdims=True)
    assert found["acc1"] == pytest.approx(accuracy_score(targets, p.argmax(1)))
    assert found["acc5"] == pytest.approx(top_k_accuracy_score(targets, p, k=5, labels=range(8)))
    assert found["nll"] == pytest.approx(log_loss(targets, p, labels=range(8)), rel=1e-5)
    assert found["agreement"] == pytest.approx((logits.argmax(1) == teacher.argmax(1)).float().mean().item())
    q = teacher.softmax(1).double()
    assert found["kl"] == pytest.approx(
        (q * (q.log() - F.log_softmax(logits.double(), 1))).sum(1).mean().item(), rel=1e-5
    )
    confidence, right = p.max(1), p.argmax(1) == targets.numpy()
    bins = np.minimum((confidence * 15).astype(int), 14)
    ece = sum(abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    assert found["ece"] == pytest.approx(ece, rel=1e-4)


def test_a_dead_network_scores_by_chance_and_nan_scores_nothing() -> None:
    """Of equal logits the first class is the answer, as for argmax: 2 of 10 targets are 0."""
    targets = torch.arange(10) % 8
    for value, wanted in ((0.0, [2, 2]), (math.nan, [0, 0])):
        logits = torch.full((10, 8), value)
        found = measured(logits, targets)
        assert [found["acc1"], found["acc5"]] == pytest.approx([w / 10 for w in wanted])
        batch = Batch(torch.zeros(10, 1), targets)
        assert [int(c) for c in Classification().count(Output(logits), batch)] == wanted
        assert int(Classification().labelled(batch)) == 10


def test_one_definition_of_a_right_answer_in_all_metrics() -> None:
    """With the many ties of bfloat16: top-1, top-5, per class, agreement and calibration are those of argmax."""
    torch.manual_seed(0)
    logits, targets = (torch.randn(4000, 8) * 0.3 + 8).bfloat16(), torch.randint(0, 8, (4000,))
    assert (logits.sort(1).values.diff(dim=1)[:, -1] == 0).sum() > 400  # the two highest are equal
    answer, exact = logits.argmax(1), logits.float()
    metrics = Classification().meter(8)
    metrics.add(logits, targets, logits)
    found = metrics.compute(True)
    assert found["acc1"] == pytest.approx((answer == targets).float().mean().item())
    assert (exact.numpy().argmax(1) == answer.numpy()).all()
    below = (exact < exact.gather(1, targets[:, None])).sum(1)
    assert found["acc5"] == pytest.approx(((below >= 8 - 5) | (answer == targets)).float().mean().item())
    recall = [(answer[targets == c] == c).float().mean().item() for c in range(8)]
    assert metrics.per_class() == pytest.approx(recall)
    assert found["agreement"] == 1
    assert found["kl"] == 0
    sure = exact.softmax(1).amax(1)
    bins = (sure * 15).long().clamp(max=14)
    right = (answer == targets).float()
    ece = sum(abs(float(right[bins == b].mean() - sure[bins == b].mean())) * (bins == b).sum() for b in bins.unique())
    assert found["ece"] == pytest.approx(float(ece) / 4000, rel=1e-4)
    correct = Classification().count(Output(logits), Batch(torch.zeros(4000, 1), targets))
    assert [int(c) / 4000 for c in correct] == pytest.approx([found["acc1"], found["acc5"]])


def test_unlabelled_rows_are_not_counted() -> None:
    logits = torch.eye(4) * 5
    batch = Batch(torch.zeros(4, 1), torch.tensor([0, -1, 2, 1]))
    assert [int(c) for c in Classification().count(Output(logits), batch)] == [2, 3]
    assert int(Classification().labelled(batch)) == 3


def test_accuracy_per_class() -> None:
    metrics = Classification().meter(3)
    metrics.add(torch.eye(3)[[0, 0, 1, 1]], torch.tensor([0, 1, 1, 1]))
    assert metrics.per_class() == pytest.approx([1.0, 2 / 3, 0.0])
