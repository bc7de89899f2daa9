"""Classification of sentences: F1 and Matthews' correlation against scikit-learn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn import metrics

from kd.errors import KdError
from kd.losses.base import Batch, Output
from kd.run.trainer import selection
from kd.tasks.text_classification import TextClassification

TASK = TextClassification()


@pytest.mark.parametrize("classes", [2, 3])
def test_metrics_are_those_of_scikit_learn(classes: int) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(29, classes, generator=draw)
    targets = torch.randint(classes, (29,), generator=draw)
    meter = TASK.meter(classes)
    for rows in (slice(0, 17), slice(17, 29)):
        meter.update(Output(logits[rows]), TASK.rows(Batch(torch.zeros(len(logits[rows]), 1), targets[rows])))
    found, answer = meter.compute(with_teacher=False), logits.argmax(1)
    assert found["f1"] == pytest.approx(metrics.f1_score(targets, answer, average="macro"), abs=1e-6)
    assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(targets, answer), abs=1e-6)
    if classes == 2:
        assert found["f1_positive"] == pytest.approx(metrics.f1_score(targets, answer), abs=1e-6)
        assert found["f1_positive"] != pytest.approx(found["f1"], abs=1e-3)
    assert ("f1_positive" in found) == (classes == 2)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("answer", "target"), [(0, None), (1, None), (None, 0), (0, 0)])
def test_one_class_alone_correlates_with_nothing(classes: int, answer: int | None, target: int | None) -> None:
    """A network that answers all with one class has a Matthews' correlation of 0, as in scikit-learn."""
    drawn = [torch.tensor([0, 0, 0, 1, 0, 1, 0]) if one is None else torch.full((7,), one) for one in (answer, target)]
    logits = torch.nn.functional.one_hot(drawn[0], classes).float()
    meter = TASK.meter(classes)
    meter.update(Output(logits), TASK.rows(Batch(torch.zeros(7, 1), drawn[1])))
    assert meter.compute(with_teacher=False)["matthews"] == 0


def test_the_f1_of_class_1_selects_of_two_classes_alone() -> None:
    protocol = {"monitor": "val/f1_positive", "mode": None}
    objective = SimpleNamespace(needs=lambda what: True)

    def module(classes: int) -> Any:
        more = {"objective": objective, "student": None, "deployed": None}
        return SimpleNamespace(task=TASK, comparable=False, num_classes=classes, **more)

    assert selection(protocol, module(2)) == {**protocol, "mode": "max"}
    with pytest.raises(KdError, match=r"protocol\.monitor = val/f1_positive is not measured"):
        selection(protocol, module(3))
