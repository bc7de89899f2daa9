"""The two treatments of born-again networks, against numpy, their equations, and what must hold for any input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor

from kd.losses.base import UNLABELLED, Batch, Output
from kd.losses.functional import (
    confidence_weighted_cross_entropy,
    cross_entropy,
    kl_divergence,
    permute_non_argmax,
    permuted_kl_divergence,
)
from kd.losses.logits.cwtm import ConfidenceWeighted
from kd.losses.logits.dkpp import PermutedPredictions


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def logits(rows: int, classes: int, grad: bool = False, scale: float = 3.0) -> Tensor:
    return (torch.randn(rows, classes, dtype=torch.float64) * scale).requires_grad_(grad)


# ---------------------------------------------------------------------- CWTM


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_weighting_in_numpy(temperature: float) -> None:
    student, teacher = logits(7, 5), logits(7, 5)
    targets = torch.tensor([0, 4, UNLABELLED, 2, 2, UNLABELLED, 1])
    numerator = denominator = 0.0
    for row, label in enumerate(targets.tolist()):
        if label == UNLABELLED:
            continue
        weight = softmax(teacher.numpy()[row] / temperature).max()
        numerator += weight * -log_softmax(student.numpy()[row])[label]
        denominator += weight
    ours = confidence_weighted_cross_entropy(student, teacher, targets, temperature)
    np.testing.assert_allclose(ours.item(), numerator / denominator, rtol=1e-12)


def test_gradient_of_weighting_is_equation_10() -> None:
    student, teacher, targets = logits(6, 4, grad=True), logits(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    confidence_weighted_cross_entropy(student, teacher, targets).backward()
    q, w = student.detach().softmax(1), teacher.softmax(1).amax(1)
    expected = (w / w.sum())[:, None] * (q - torch.nn.functional.one_hot(targets, 4))
    torch.testing.assert_close(student.grad, expected)


def test_equal_confidence_is_plain_cross_entropy() -> None:
    """Also where the teacher chooses another class than the label: only its confidence counts."""
    student, targets = logits(4, 3), torch.tensor([0, 1, UNLABELLED, 2])
    teacher = torch.tensor([[2.0, 0, 0]] * 4).double()
    ours = confidence_weighted_cross_entropy(student, teacher, targets)
    torch.testing.assert_close(ours, cross_entropy(student, targets))


def test_a_confident_row_counts_more() -> None:
    student, targets = torch.tensor([[0.0, 0.0], [5.0, 0.0]]).double(), torch.tensor([0, 1])  # row 1 is worse
    flat, sure = torch.zeros(2, 2).double(), torch.tensor([[0.0, 0.0], [0.0, 9.0]]).double()
    assert confidence_weighted_cross_entropy(student, sure, targets) > confidence_weighted_cross_entropy(
        student, flat, targets
    )


@pytest.mark.parametrize("rows", [0, 3])
def test_no_labelled_row_is_zero_without_gradient(rows: int) -> None:
    student = logits(rows, 4, grad=True)
    loss = confidence_weighted_cross_entropy(student, logits(rows, 4), torch.full((rows,), UNLABELLED))
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


# ---------------------------------------------------------------------- DKPP


def test_permuting_keeps_the_largest_and_the_multiset() -> None:
    teacher = logits(200, 6)
    permuted = permute_non_argmax(teacher)
    assert torch.equal(permuted.argmax(1), teacher.argmax(1))
    assert torch.equal(permuted.amax(1), teacher.amax(1))
    assert torch.equal(permuted.sort(1).values, teacher.sort(1).values)
    assert not torch.equal(permuted, teacher)


def test_every_permutation_is_as_likely_as_another_and_rows_differ() -> None:
    teacher = torch.tensor([1.0, 9.0, 2.0, 3.0]).expand(12_000, 4)
    permuted = permute_non_argmax(teacher)
    assert (permuted[:, 1] == 9).all()
    orders, counts = permuted.unique(dim=0, return_counts=True)
    assert len(orders) == 6
    assert counts.tolist() == pytest.approx([2000] * 6, abs=180)


def test_leading_dimensions_and_two_classes() -> None:
    teacher = torch.randn(2, 3, 5)
    permuted = permute_non_argmax(teacher)
    assert torch.equal(permuted.sort(-1).values, teacher.sort(-1).values)
    assert torch.equal(permuted.argmax(-1), teacher.argmax(-1))
    pair = torch.randn(4, 2)
    assert torch.equal(permute_non_argmax(pair), pair)  # nothing to permute


def test_the_permutation_comes_from_the_generator_or_the_global_seed() -> None:
    teacher = logits(20, 8)
    first, second = (permute_non_argmax(teacher, torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(first, second)
    state = torch.random.get_rng_state()
    third = permute_non_argmax(teacher)
    torch.random.set_rng_state(state)
    assert torch.equal(third, permute_non_argmax(teacher))
    assert not torch.equal(third, permute_non_argmax(teacher))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_permuted_divergence_by_a_loop(temperature: float) -> None:
    student, teacher = logits(5, 4), logits(5, 4)
    shuffled = permute_non_argmax(teacher, torch.Generator().manual_seed(3)).numpy()
    total = 0.0
    for row in range(5):
        p, q = (softmax(z[row] / temperature) for z in (shuffled, student.numpy()))
        total += sum(p[c] * (np.log(p[c]) - np.log(q[c])) for c in range(4))
    ours = permuted_kl_divergence(student, teacher, temperature, torch.Generator().manual_seed(3))
    np.testing.assert_allclose(ours.item(), temperature**2 * total / 5, rtol=1e-10)


def test_gradient_of_permuting_is_equation_11() -> None:
    student, teacher = logits(6, 5, grad=True), logits(6, 5)
    permuted_kl_divergence(student, teacher, generator=torch.Generator().manual_seed(0)).backward()
    p = permute_non_argmax(teacher, torch.Generator().manual_seed(0)).softmax(1)
    torch.testing.assert_close(student.grad, (student.detach().softmax(1) - p) / 6)
    torch.testing.assert_close(p.amax(1), teacher.softmax(1).amax(1))


def test_dark_knowledge_that_is_uniform_survives() -> None:
    """A teacher whose other classes are all equal loses nothing: the term is plain KD."""
    student = logits(5, 4)
    teacher = torch.tensor([[0.0, 3.0, 0.0, 0.0]] * 5).double()
    torch.testing.assert_close(permuted_kl_divergence(student, teacher, 2.0), kl_divergence(student, teacher, 2.0))


def test_on_average_each_wrong_class_gets_the_mean_of_all() -> None:
    teacher = torch.tensor([[4.0, 2.0, 1.0, 0.0]]).double().expand(30_000, 4)
    mean = permute_non_argmax(teacher).softmax(1).mean(0)
    p = teacher[0].softmax(0)
    torch.testing.assert_close(mean, torch.stack([p[0], *[p[1:].mean()] * 3]), rtol=0.03, atol=0)


# ---------------------------------------------------------------------- both


def test_terms_are_their_functions() -> None:
    student, teacher, targets = Output(logits(4, 3)), Output(logits(4, 3)), torch.tensor([0, UNLABELLED, 2, 1])
    batch = Batch(torch.empty(4, 1), targets, torch.arange(4))
    expected = confidence_weighted_cross_entropy(student.logits, teacher.logits, targets, 2.0)
    torch.testing.assert_close(ConfidenceWeighted(2.0)(student, teacher, batch), expected)
    torch.manual_seed(5)
    found = PermutedPredictions(2.0)(student, teacher, batch)
    torch.manual_seed(5)
    torch.testing.assert_close(found, permuted_kl_divergence(student.logits, teacher.logits, 2.0))


def test_finite_differences() -> None:
    teacher, targets = logits(3, 4), torch.tensor([1, UNLABELLED, 3])
    for loss in (
        lambda z: confidence_weighted_cross_entropy(z, teacher, targets, 2.0),
        lambda z: permuted_kl_divergence(z, teacher, 2.0, torch.Generator().manual_seed(0)),
    ):
        assert torch.autograd.gradcheck(loss, logits(3, 4, grad=True))


@pytest.mark.parametrize(
    "call", [lambda s, t: confidence_weighted_cross_entropy(s, t, torch.tensor([0, 1])), permuted_kl_divergence]
)
def test_unequal_shapes_are_refused(call) -> None:
    with pytest.raises(ValueError, match=r"^logits must have one shape"):
        call(logits(2, 3), logits(2, 4))
