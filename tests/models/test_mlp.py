"""Hinton's nets have their sizes, and the norm constraint holds wherever the weights are read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from kd.models.mlp import mlp

MNIST: dict[str, Any] = {"num_classes": 10, "input_shape": (1, 28, 28)}
DIGITS: dict[str, Any] = {"num_classes": 10, "input_shape": (1, 8, 8)}


@pytest.mark.parametrize(
    ("hidden", "shape", "parameters"),
    [  # Hinton 2015's two nets; the nets of the digits: 64-32-32-10 and 64-256-256-10
        ([1200, 1200], MNIST, 2_395_210),
        ([800, 800], MNIST, 1_276_810),
        ([32, 32], DIGITS, 3_466),
        ([256, 256], DIGITS, 85_002),
    ],
)
def test_parameters(hidden: list[int], shape: dict[str, Any], parameters: int) -> None:
    assert sum(p.numel() for p in mlp(hidden, **shape).parameters()) == parameters


def test_layers() -> None:
    model = mlp([32, 16], dropout=0.5, input_dropout=0.2, max_norm=2.0, **DIGITS)
    names = ["flatten", "input_dropout", "fc1", "relu1", "dropout1", "fc2", "relu2", "dropout2", "fc"]
    assert [name for name, _ in model.named_children()] == names
    assert model.stages == ("relu1", "relu2")
    plain = mlp([32, 16], **DIGITS)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(plain.eval()(x), model.eval()(x))


def test_no_hidden_layer() -> None:
    model = mlp([], **DIGITS)
    assert model.stages == ()
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def norms(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.norm(dim=1) for name, value in state.items() if name.endswith("weight")])


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_max_norm_holds_after_every_step(optimizer: Any) -> None:
    torch.manual_seed(0)
    model = mlp([32, 32], max_norm=0.5, **DIGITS)
    free = mlp([32, 32], **DIGITS)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    for net in (model, free):
        step = optimizer(net.parameters(), lr=1.0)
        for _ in range(5):
            nn.functional.cross_entropy(net(x), y).backward()
            step.step()
            step.zero_grad()
            if net is model:
                assert norms(copy.deepcopy(net).state_dict()).max() <= 0.5
                trained = net(x)  # the training forward projects
                assert max(p.norm(dim=1).max() for n, p in net.named_parameters() if "weight" in n) <= 0.5
                assert torch.equal(trained, net.eval()(x))
                net.train()
    assert norms(free.state_dict()).max() > 0.5


def test_max_norm_in_eval_straight_after_a_step() -> None:
    model = mlp([8], max_norm=0.5, **DIGITS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(100)
    model.eval()
    assert max(p.norm(dim=1).max() for n, p in model.named_parameters() if "weight" in n) <= 0.5


def test_max_norm_lets_two_forwards_share_a_backward() -> None:
    model = mlp([8], max_norm=0.5, **DIGITS)
    (model(torch.randn(4, 1, 8, 8)) + model(torch.randn(4, 1, 8, 8))).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_max_norm_leaves_short_vectors_alone() -> None:
    torch.manual_seed(0)
    model = mlp([8], max_norm=100.0, **DIGITS)
    before = [p.clone() for p in model.parameters()]
    model(torch.randn(4, 1, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"hidden": [32, 0]},
            r"hidden = \[32, 0\] is not allowed: it must be a list of widths, whole numbers of 1 or more",
        ),
        ({"hidden": [32], "dropout": 1.0}, "dropout = 1.0 is not allowed: it must be 0 or more and below 1"),
        ({"hidden": [32], "input_dropout": -0.1}, "input_dropout = -0.1 is not allowed"),
        ({"hidden": [32], "max_norm": 0}, "max_norm = 0 is not allowed: it must be above 0, or null"),
    ],
)
def test_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        mlp(**arguments, **DIGITS)
