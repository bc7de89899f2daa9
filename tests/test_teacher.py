"""The teacher stays furniture; several of them are averaged exactly; inputs are re-normalised."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd.distill.teacher import InputMap, Teacher
from kd.errors import KdError
from kd.tasks.base import Want


def networks(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Dropout()) for _ in range(count)]


IDENTITY = InputMap([0.5] * 3, [0.5] * 3)
X = torch.randn(4, 3, 2, 2)


def test_stays_in_eval_without_gradients() -> None:
    teacher = Teacher(networks(1), [IDENTITY])
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.train()
    answer = teacher(X.clone().requires_grad_())
    assert not any(m.training for m in teacher.modules())
    assert not answer.logits.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_its_features_can_feed_an_adapter() -> None:
    teacher = Teacher(networks(1), [IDENTITY])
    teacher.tap(["1"])
    adapter = nn.Linear(5, 2)
    adapter(teacher(X, want=Want(features=True)).features["1"]).sum().backward()  # fails for tensors of inference_mode
    assert adapter.weight.grad is not None


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_several_teachers(weights) -> None:
    nets = networks(2)
    shares = torch.tensor(weights or [1.0, 1.0])
    shares = shares / shares.sum()
    for net in nets:
        net.eval()
    logits = torch.stack([net(X) for net in nets])
    by_probability = Teacher(nets, [IDENTITY] * 2, "probabilities", weights)(X).logits
    torch.testing.assert_close(by_probability.softmax(1), (logits.softmax(2) * shares.view(-1, 1, 1)).sum(0))
    by_logit = Teacher(nets, [IDENTITY] * 2, "logits", weights)(X).logits
    torch.testing.assert_close(by_logit, (logits * shares.view(-1, 1, 1)).sum(0))


@pytest.mark.parametrize("weights", [[1.0], [-1.0, 2.0], [0.0, 0.0]])
def test_wrong_weights_are_refused(weights) -> None:
    with pytest.raises(KdError, match=r"teacher\.weights"):
        Teacher(networks(2), [IDENTITY] * 2, "logits", weights)


def test_renormalises() -> None:
    raw = torch.rand(4, 3, 2, 2)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    view = lambda v: torch.tensor(v).view(1, 3, 1, 1)  # noqa: E731
    data = (raw - 0.5) / 0.25
    wanted = (raw - view(mean)) / view(std)
    torch.testing.assert_close(InputMap([0.5] * 3, [0.25] * 3, mean, std)(data), wanted)


def test_resizes_when_asked() -> None:
    assert InputMap([0.5] * 3, [0.5] * 3, resize=8)(X).shape == (4, 3, 8, 8)


def test_statistics_of_other_channels_are_refused() -> None:
    with pytest.raises(KdError, match="they need 1 numbers each"):
        InputMap([0.5], [0.5], [0.5] * 3, [0.5] * 3)
