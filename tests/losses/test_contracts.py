"""What a term is handed: batches, outputs whose logits are made when they are read, set-ups; its part of the sum."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kd.distill.objective import Objective, _Gathered
from kd.errors import KdError
from kd.losses.base import OVER, UNLABELLED, Batch, Output, Setup, Term, TopK
from kd.losses.logits.ce import CrossEntropy, cross_entropy
from kd.parallel import group
from kd.tasks.base import Want
from kd.tasks.classification import Classification

# ---------------------------------------------------------------------- batches


def words() -> Batch:
    """Three samples whose inputs are a mapping, with all that a batch may hold."""
    inputs = {"ids": torch.arange(12).view(3, 4), "mask": torch.ones(3, 4, dtype=torch.bool)}
    extra = {"partners": torch.tensor([2, 0, 1]), "share": torch.tensor(0.3), "boxes": [torch.ones(5, 4)], "name": "a"}
    targets, index = torch.tensor([1, UNLABELLED, 0]), torch.tensor([7, 8, 9])
    return Batch(inputs, targets, index, inputs["mask"], {"teacher": torch.rand(3, 2)}, extra)


def test_few_cuts_what_has_a_row_for_each_sample() -> None:
    batch, few = words(), words().few(2)
    assert (len(batch), len(few)) == (3, 2)
    assert {name: tuple(part.shape) for name, part in few.inputs.items()} == {"ids": (2, 4), "mask": (2, 4)}
    assert (few.targets.tolist(), few.index.tolist(), few.mask.shape) == ([1, UNLABELLED], [7, 8], (2, 4))
    assert few.views["teacher"].shape == (2, 2)
    assert few.extra["partners"].tolist() == [2, 0]
    assert few.extra["share"] == torch.tensor(0.3)  # of no sample
    assert few.extra["boxes"][0].shape == (5, 4)
    assert few.extra["name"] == "a"
    assert len(batch.few(99)) == 3
    assert len(Batch(torch.zeros(5, 2)).few(2)) == 2


def test_a_batch_moves_and_changes_with_all_its_tensors() -> None:
    there = words().to("meta")
    found = [*there.inputs.values(), there.targets, there.index, there.mask, there.views["teacher"]]
    found += [there.extra["partners"], there.extra["share"], there.extra["boxes"][0]]
    assert all(tensor.device.type == "meta" for tensor in found)
    batch = words()
    doubled = batch.map(lambda tensor: tensor * 2)
    assert torch.equal(doubled.inputs["ids"], batch.inputs["ids"] * 2)
    assert torch.equal(doubled.extra["boxes"][0], torch.full((5, 4), 2.0))
    assert torch.equal(batch.index, words().index)  # the old one stays
    assert replace(batch, targets=None).map(torch.clone).targets is None


# ---------------------------------------------------------------------- outputs


def test_logits_come_from_hidden_states_when_they_are_read() -> None:
    head, hidden, calls = nn.Linear(3, 5), torch.rand(4, 3), []
    head.register_forward_hook(lambda *a: calls.append(1))
    output = Output(hidden=hidden, head=head)
    assert output.has_logits
    assert not calls  # a fused loss, which reads the two, never makes them
    torch.testing.assert_close(output.logits, hidden @ head.weight.T + head.bias)
    assert output.logits is output.logits
    assert len(calls) == 1
    assert not Output(hidden=hidden).has_logits
    halves = Output(hidden=hidden.bfloat16(), head=copy.deepcopy(head).bfloat16())
    assert halves.to_float32().logits.dtype == torch.float32  # measured is in single precision
    trained = Output(hidden=hidden, head=head)
    assert not trained.detach().logits.requires_grad  # nor does the head get a gradient
    assert trained.logits.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_tail_of_known_classes_is_spread_evenly(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    log_probs, ids = torch.randn(6, 10).log_softmax(1).topk(3)
    output = Output(topk=TopK(ids, log_probs.to(dtype), 10))
    assert output.has_logits
    dense = output.logits.softmax(1)
    assert output.logits.dtype == torch.float32
    close = {"rtol": 2e-3, "atol": 1e-5} if dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(output.logits.exp().sum(1), torch.ones(6), **close)
    torch.testing.assert_close(dense.gather(1, ids), log_probs.exp(), **close)
    rest = torch.ones(6, 10, dtype=torch.bool).scatter(1, ids, False)
    tail = dense[rest].view(6, 7)
    torch.testing.assert_close(tail, tail[:, :1].expand(6, 7))
    torch.testing.assert_close(tail.sum(1), 1 - log_probs.exp().sum(1), **close)


def test_all_classes_known_leave_no_tail() -> None:
    logits = torch.randn(2, 4)
    log_probs, ids = logits.log_softmax(1).topk(4)
    torch.testing.assert_close(TopK(ids, log_probs, 4).dense(), logits.log_softmax(1))


def test_an_output_without_logits_says_so() -> None:
    bare = Output(torch.ones(2, 3), {"a": torch.ones(2)}, raw="maps", views={"strong": Output()}).without_logits()
    assert not bare.has_logits
    assert (list(bare.features), bare.raw, list(bare.views)) == (["a"], "maps", ["strong"])
    for output in (Output(), bare, Output(raw={"boxes": 1})):
        with pytest.raises(ValueError, match=r"^there are no logits: .*needs_student_logits, needs_teacher_logits\)$"):
            _ = output.logits


@pytest.mark.parametrize(
    "raw", [{"logits": torch.ones(2, 3)}, (torch.ones(2, 3), "more"), torch.ones(2, 3)], ids=["mapping", "tuple", "own"]
)
def test_a_network_may_answer_with_more_than_logits(raw) -> None:
    class Net(nn.Module):
        def forward(self, ids: Tensor):
            return raw

    output = Classification().answer(Net(), {"ids": torch.zeros(2, 1)}, Batch({"ids": torch.zeros(2, 1)}), Want())
    assert output.logits.shape == (2, 3)
    assert output.raw is (None if isinstance(raw, Tensor) else raw)


# ---------------------------------------------------------------------- set-ups


def test_a_table_has_a_place_for_the_largest_index() -> None:
    setup = Setup(Output(), Output(), words(), train_index=torch.tensor([4, 11, 0]))
    assert setup.size == 12
    with pytest.raises(ValueError, match="does not tell its index"):
        _ = replace(setup, train_index=None).size


# ---------------------------------------------------------------------- the part of a term in the sum


class Over(Term):
    """The mean of the logits that it sees, and how many rows these are."""

    needs_teacher = needs_teacher_logits = False

    def __init__(self, over: str) -> None:
        super().__init__()
        self.over = over

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        self.seen = len(student.logits), len(batch), batch.targets.tolist()
        return student.logits.mean()


def test_each_mean_gets_the_share_of_what_it_is_over(monkeypatch) -> None:
    """A term over the batch sees it whole, and its value is the whole already."""
    monkeypatch.setattr(group, "gather_rows", lambda tensor: torch.cat([tensor, tensor + 1]))
    objective = Objective({over: Over(over) for over in OVER})
    shares = group.Shares(*(torch.tensor(factor) for factor in (0.5, 2.0, 3.0, 5.0)))
    student, batch = Output(torch.full((2, 3), 4.0)), Batch(torch.zeros(2, 1), torch.tensor([1, 0]))
    values, total = objective(student, Output(), batch, shares=shares)
    assert [float(value) for value in values] == [4, 4, 4, 4, 4.5]
    assert float(total) == 4 * 0.5 + 4 * 2 + 4 * 3 + 4 * 5 + 4.5
    assert [term.seen for _, term in objective.items()] == [(2, 2, [1, 0])] * 4 + [(4, 4, [1, 0, 2, 1])]
    assert float(objective(student, Output(), batch)[1]) == 20  # in one process nothing is gathered
    with pytest.raises(KdError, match=r"^loss\.a: over = pixels is not allowed: it must be rows, labelled, samples, "):
        Objective({"a": Over("pixels")})


def test_what_is_gathered_is_never_another_tensors(monkeypatch) -> None:
    """Python gives the id of a tensor that is freed to the next one."""
    monkeypatch.setattr(group, "gather_rows", torch.clone)
    gathered = _Gathered(Output(), Output(), words())
    assert [gathered._rows(torch.tensor([number])).item() for number in range(50)] == list(range(50))
    whole = gathered.seen_by(Over("batch"))[2]
    assert whole is gathered.seen_by(Over("batch"))[2]
    assert (len(whole), whole.views, whole.extra) == (3, {}, {})
    assert whole.targets.tolist() == words().targets.tolist()


def test_buffers_of_one_process_stay_as_they_are() -> None:
    network = nn.BatchNorm1d(2)
    network(torch.randn(4, 2))
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    group.same_buffers(network)
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())


# ---------------------------------------------------------------------- soft targets


def test_shares_as_targets() -> None:
    """A row of one share is its label; a mixture is the mixture of the losses; its larger share is counted."""
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    shares = nn.functional.one_hot(labels, 3).float()
    for smoothing in (0.0, 0.1):
        torch.testing.assert_close(cross_entropy(logits, shares, smoothing), cross_entropy(logits, labels, smoothing))
    mixed = 0.7 * shares + 0.3 * shares.roll(1, 0)
    expected = 0.7 * cross_entropy(logits, labels) + 0.3 * cross_entropy(logits, labels.roll(1))
    batch = Batch(torch.zeros(4, 1), mixed)
    torch.testing.assert_close(CrossEntropy()(Output(logits), Output(), batch), expected, rtol=1e-6, atol=0)
    assert int(Classification().labelled(batch)) == 4
    counted = Classification().count(Output(logits), batch)
    assert [int(c) for c in counted] == [int((logits.argmax(1) == labels).sum()), 4]
    assert int(Classification().labelled(Batch(torch.zeros(4, 1)))) == 0
