"""Folded batch norms and channels-last weights: the same answers, and only where nobody reads what lies between."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from kd.models import cifar_resnet, mobilenetv2, shufflenetv1, shufflenetv2, vgg, wrn
from kd.models.folding import Folded, channels_last, foldable, to_channels_last

SHAPE = {"num_classes": 10, "input_shape": (3, 32, 32)}
OWN = {
    "resnet20": (lambda: cifar_resnet.resnet(20, **SHAPE), 21),
    "wrn16_1": (lambda: wrn.wrn(16, 1, **SHAPE), 6),  # norm first: the norm that opens a block reads a sum
    "vgg8": (lambda: vgg.vgg(8, **SHAPE), 5),
    "mobilenetv2": (lambda: mobilenetv2.mobilenetv2(**SHAPE), 53),
    "shufflenetv1": (lambda: shufflenetv1.shufflenetv1(**SHAPE), 49),
    "shufflenetv2": (lambda: shufflenetv2.shufflenetv2(**SHAPE), 56),
    "timm lcnet_035": (lambda: timm.create_model("lcnet_035"), 27),  # timm's norm with an activation inside
    "timm resnet18": (lambda: timm.create_model("resnet18"), 20),
}


def trained(network: nn.Module) -> nn.Module:
    """Frozen, with batch statistics that are not those of a fresh network."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias, std=0.1)
    return network.requires_grad_(False).eval()


@pytest.mark.parametrize("name", OWN)
def test_a_folded_network_answers_the_same(name: str) -> None:
    torch.manual_seed(0)
    make, norms = OWN[name]
    network, images = trained(make()), torch.randn(2, 3, 32, 32)
    before = copy.deepcopy(network.state_dict())
    expected = network(images)
    folded = Folded(network, foldable(network, lambda: network(images)))
    left = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()) - norms
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.network.modules()) == left
    near = {"rtol": 1e-5, "atol": 1e-5 * float(expected.abs().max())}
    torch.testing.assert_close(folded.network(images), expected, **near)
    assert to_channels_last(folded.network, lambda last: folded.network(channels_last(images) if last else images))
    torch.testing.assert_close(folded.network(channels_last(images)), expected, **near)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_the_other_weights_are_shared_and_changes_are_followed() -> None:
    network, images = trained(cifar_resnet.resnet(8, **SHAPE)), torch.randn(2, 3, 32, 32)
    folded = Folded(network, foldable(network, lambda: network(images)))
    assert folded.network.fc.weight is network.fc.weight
    other = trained(cifar_resnet.resnet(8, **SHAPE))
    network.load_state_dict(other.state_dict())
    folded.refresh()
    torch.testing.assert_close(folded.network(images), other(images), rtol=1e-4, atol=1e-5)


class Branched(nn.Module):
    """A convolution whose output is read by its norm and, if asked, by somebody else."""

    def __init__(self, branch: str) -> None:
        super().__init__()
        self.conv, self.norm, self.branch = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), branch

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """What reads the convolution's output, by the branch's name."""
        y = self.conv(x)
        if self.branch == "added":
            return self.norm(y) + y
        if self.branch == "view":
            return self.norm(y) + y.flatten(1).mean()
        if self.branch == "returned":
            return self.norm(y), y
        if self.branch == "twice":
            return self.norm(self.norm(y))
        if self.branch == "run twice":
            return self.norm(y) + self.conv(x)
        return self.norm(y)


@pytest.mark.parametrize("branch", ["alone", "added", "view", "returned", "twice", "run twice"])
def test_what_somebody_else_reads_is_not_folded(branch: str) -> None:
    network, images = trained(Branched(branch)), torch.randn(2, 3, 4, 4)
    wanted = [("conv", "norm")] if branch == "alone" else []
    assert foldable(network, lambda: network(images)) == wanted


@pytest.mark.parametrize("kind", ["trainable", "spectral", "parametrized", "no statistics", "meta"])
def test_weights_that_are_not_plain_and_frozen_are_not_folded(kind: str) -> None:
    network, images = trained(Branched("alone")), torch.randn(2, 3, 4, 4)
    if kind == "spectral":
        network.conv = nn.utils.spectral_norm(network.conv)
    elif kind == "parametrized":
        network.conv = nn.utils.parametrizations.weight_norm(network.conv)
    elif kind == "no statistics":
        network.norm = nn.BatchNorm2d(3, track_running_stats=False)
    elif kind == "meta":
        network, images = network.to("meta"), images.to("meta")
    network.eval().requires_grad_(kind == "trainable")
    assert foldable(network, lambda: network(images)) == []


class Viewing(nn.Module):
    """Reshapes its maps with ``view``, as many networks of papers do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 5, 3), nn.Linear(5 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, 4, 4) to logits (B, 2)."""
        return self.fc(self.conv(x).view(len(x), -1))


def test_a_network_that_cannot_is_left_as_it_was(caplog) -> None:
    caplog.set_level("INFO", "kd")
    network, images = Viewing(), torch.randn(2, 3, 4, 4)
    assert not to_channels_last(network, lambda last: network(channels_last(images) if last else images))
    assert network.conv.weight.is_contiguous()
    assert "view size is not compatible" in caplog.text
    assert not to_channels_last(nn.Linear(2, 2), lambda last: None)


def test_a_convolution_whose_gradient_is_wrong_is_trained_as_it_was() -> None:
    """Strided 1×1 kernels on few channels: channels last, torch's CPU code writes beyond the gradient's memory."""
    network, images = nn.Conv2d(6, 8, 1, 2), torch.randn(2, 6, 8, 8)

    def run(last: bool) -> Tensor:
        return network(channels_last(images) if last else images)

    assert not to_channels_last(network, run)
    assert to_channels_last(network.requires_grad_(False), run)  # forwards it is right
    assert to_channels_last(nn.Conv2d(6, 8, 3, 2), run)
