"""What must hold of every term that ships, and of each of its variants: all that ``conf/loss`` has, found by itself.

What a formula takes exception to stands in the tables below, with the reason; an exception that is none fails.
``test_two_processes.py`` has one more: two processes give what one gives.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from scipy.stats import entropy
from torch import Tensor, nn

from kd.distill.objective import Objective
from kd.errors import KdError
from kd.losses.base import Batch, Output, Setup, Term, TopK
from kd.losses.feature_term import FeatureTerm
from tests.losses import two_ranks
from tests.losses.two_ranks import CLASSES, CONF, ROWS, reads_hidden

# settings whose choices a method's module lists: each of them is a case
LISTED = {"variant": "VARIANTS", "base": "BASES", "form": "FORMS", "mask": "MASKS", "merge": "MERGES"}
LISTED |= {"against": "AGAINST", "negatives_from": "KINDS", "weights": "WEIGHTS"}
FURTHER: dict[str, list[dict[str, Any]]] = {  # limits of a formula, and paths of their own
    "abkd": [{"alpha": 1.0, "beta": 0.0}, {"alpha": 0.0, "beta": 0.5}],
    "jsd": [{"beta": 0.0}, {"beta": 1.0}],
    "dtd": [{"shift": True}],
    "kd": [{"temperature": 1.0}],
    "attention_mse": [{"merge_heads": True, "variant": "masked"}],
    "fkd": [{"k": 2}],
    "ft": [{"epochs": 0.0}, {"epochs": 0.0, "variant": "code"}],
    "topk_kl": [{"k": 2}],
    "wkd_feature": [{"grid": 2}],
}
QUEUE = {"queue": ROWS}  # the whole batch: what is pushed out of a queue depends on the order
PERMUTED = torch.tensor([4, 0, 8, 2, 6, 1, 3, 7, 5])


class Case(NamedTuple):
    """A term with the settings of its YAML, and with these."""

    name: str
    settings: dict[str, Any]

    def __str__(self) -> str:
        return ",".join([self.name, *(f"{key}={value}" for key, value in self.settings.items())])


def cases() -> Iterator[Case]:
    for name in two_ranks.names():
        (node,) = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml")).values()
        module = import_module(node["_target_"].rpartition(".")[0])
        choices = {key: getattr(module, names, ()) for key, names in LISTED.items() if key in node}
        others = [{key: value} for key, values in choices.items() for value in values if value != node[key]]
        yield from (Case(name, settings) for settings in [{}, *others, *FURTHER.get(name, [])])


CASES = list(cases())


def of(table: dict[str, Any], case: Case) -> Any:
    """The entry of a table for a case, or for all cases of its term; None: it is no exception."""
    return table.get(str(case), table.get(case.name))


# ---------------------------------------------------------------------- where a formula makes an exception


def soft_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The mean entropy of softmax(z / T)."""
    return torch.from_numpy(entropy((logits / temperature).softmax(-1).numpy(), axis=-1)).mean()


# Where equal networks do not lose 0: why, and what they lose where that is the least there is, with no gradient
LEAST: dict[str, tuple[str, Callable[[dict[str, Tensor]], float | Tensor]]] = {
    "fkd": ("cross-entropy with soft labels: their entropy", lambda s: soft_entropy(s["logits"])),
    "attention_ce": ("cross-entropy of attention: its entropy", lambda s: math.nan),
    "wsld": (
        "cross-entropy, T² (1 − 1/e) H(p): the weight of equal networks is 1 − 1/e",
        lambda s: 16 * (1 - math.exp(-1)) * soft_entropy(s["logits"], 4.0),
    ),
    "ft": ("the first stage is of the teacher alone", lambda s: math.nan),
    "vid": ("likelihood, ½ log σ² of two taps: σ² begins at 5", lambda s: math.log(5.0)),
    "vid,variant=paper": (
        "likelihood, ½ log 2πσ² of each element",
        lambda s: (s["student0"][0].numel() + s["student1"][0].numel()) / 2 * math.log(2 * math.pi * 5.0),
    ),
    "srd": ("the logarithm of 0: that of the smallest number", lambda s: math.log(torch.finfo(torch.float64).tiny)),
}
NOT_LEAST = {  # equal networks lose something, and move on: why
    "ab": "responses are moved to the margin, beyond those of the teacher",
    "bkd": "sigmoid of the student beside softmax of the teacher",
    "ce": "labels, no teacher",
    "crd": "contrast of two learned embeddings with banks",
    "cwtm": "labels, which the teacher weighs",
    "dino": "the teacher is sharpened, and centred",
    "dkpp": "the teacher's other classes are permuted",
    "fkd,k=2": "the mass of the others is spread evenly",
    "dcd": "two embeddings of its own",
    "ft,epochs=0.0": "a translator and a paraphraser of its own",
    "ft,epochs=0.0,variant=code": "a translator and a paraphraser of its own",
    "hard_label": "the teacher's decision alone",
    "itrd": "correlations are (B − 1) / B at best, and the mutual information has no 0 there",
    "logistic_ranking": "the order alone: distances grow without end",
    "mft": "the teacher is moved to the label",
    "mse": "labels, no teacher",
    "nkd": "its part of the label is −p_t(y) log p_s(y) without the other classes",
    "ofa": "heads of its own on the stages of the student",
    "reviewkd": "fusions of its own between the features",
    "rrd": "the teacher is sharpened, and has a random embedding",
    "scalekd": "projectors of its own",
    "sdd,base=nkd": "that of nkd",
    "semckd": "projections of its own, between all layers",
    "ttm": "the teacher's powers beside the student at T = 1",
    "uskd": "labels, no teacher",
    "vitkd": "hidden tokens are generated",
    "wkd_logit": "of the label −p_t(y) log p_s(y), and a plan with entropy moves mass",
    "vkd": "the teacher alone is layer-normalised",
    "wttm": "the teacher's powers beside the student at T = 1",
}
ZERO_IN = {"mse,against=teacher"}
NEARLY = {"dist": 1e-5}  # 1e-8 is added to the product of the norms
BEYOND = {  # where the gradient itself is above 65504, so that a loss scaler skips the step: when, and why
    "fsp,variant=paper": ("far apart", "a sum of fourth powers over all entries of the flow matrices"),
    "ickd,variant=paper": ("far apart", "a sum of fourth powers over the Gram matrices"),
    "hint,variant=unit": ("dead", "rounding behind batch norm of what is constant is brought to unit length"),
    "ft,epochs=0.0": ("dead", "three batch norms in a row, each multiplies what is constant by 316"),
    "ft,epochs=0.0,variant=code": ("dead", "three batch norms in a row, each multiplies what is constant by 316"),
}
ORDERED = {  # why the order of a batch matters
    "cc": "the code multiplies the differences of neighbours",
    "crd": "negatives are drawn at random",
    "dkpp": "permuted at random",
    "mgd": "masked at random",
    "semckd": "its attention reads similarities by the place in the batch",
    "vitkd": "masked at random",
}
UNORDERED = {"cc,variant=paper"}
ALONE = {  # what refuses a batch of one
    "itrd": "itrd correlates over the samples of a batch, and there is one: set data.drop_last=true",
    "pad_l2": "pad_l2 needs two samples or more in a batch, for batch norm of vectors: set data.drop_last=true",
    "srd": "srd needs two samples or more in a batch, for batch norm of vectors: set data.drop_last=true",
}
# Of terms that read logits alone: why softmax(z / T) of each row is not all that they read of the teacher
MORE_THAN_SOFTMAX = {
    "ctkd": "the temperature is learned",
    "dino": "its centre is the mean of each class over the rows, sharpened 25 times",
    "dist": "each class is correlated over the rows, however little it has",
    "dtd": "a temperature for each row",
    "mlkd": "five temperatures",
    "mse,against=teacher": "the logits themselves",
    "normkd": "the spread of a row",
    "skd_direction": "the length of a row",
}


def test_every_exception_is_one_of_a_term() -> None:
    names = {str(case) for case in CASES} | {case.name for case in CASES}
    assert {*LEAST, *NOT_LEAST, *NEARLY, *BEYOND, *ORDERED, *UNORDERED, *ZERO_IN, *ALONE, *MORE_THAN_SOFTMAX} <= names


# ---------------------------------------------------------------------- a term, what it reads, a step


class Made(NamedTuple):
    """A prepared term, in training mode, and what it is called with; float64."""

    term: Term
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    batch: Batch
    networks: dict[str, nn.Module]


def output(tensors: dict[str, Tensor]) -> Output:
    return Output(tensors.get("logits"), {name: tensor for name, tensor in tensors.items() if name != "logits"})


def made(case: Case, equal: bool = False, seed: int = 0) -> Made:
    """``equal``: the teacher is the student, the labels are what it chooses, and no adapter lies between."""
    settings = dict(case.settings)
    if equal:
        settings |= {"adapter": "identity"} | ({"embedding": None} if case.name == "cc" else {})
    term = two_ranks.term(case.name, {**QUEUE, **settings})
    student, teacher, batch = two_ranks.drawn(reads_hidden(term))
    torch.manual_seed(1)  # the networks are the same for any seed
    networks = two_ranks.networks()
    if equal:
        teacher = {name.replace("student", "teacher"): tensor.clone() for name, tensor in student.items()}
        copied = {name.replace("student", "teacher"): m for name, m in networks["student"].named_children()}
        networks["teacher"] = copy.deepcopy(nn.ModuleDict(copied))
        if "logits" in student:
            batch.targets = student["logits"].argmax(1)
    index = torch.arange(ROWS) * 2
    torch.manual_seed(seed)
    setup = Setup(output(student), output(teacher), batch, networks, index, batch.targets, CLASSES, epochs=4, steps=8)
    term.eval()
    term.prepare(setup)
    if equal and isinstance(term, FeatureTerm):
        term.adapters = copy.deepcopy(term.goals)
    return Made(term.double().train(), student, teacher, batch, networks)


def change(tensors: dict[str, Tensor], by: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: by(tensor) for name, tensor in tensors.items()}


def step(of: Made, seed: int = 2, half: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its gradients, of what the student has made and of what the term learns; ``half``: by autocast."""
    leaves = change(of.student, lambda t: t.detach().clone(memory_format=torch.preserve_format).requires_grad_())
    of.term.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", half, enabled=half is not None):  # not around the backward pass, as in training
        _, total = Objective({"term": of.term})(output(leaves), output(of.teacher), of.batch, 1.0, 4)
    if total.requires_grad:
        total.backward()
    tensors = leaves | {f"term.{name}": parameter for name, parameter in of.term.named_parameters()}
    return total.detach(), {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in tensors.items()}


# ---------------------------------------------------------------------- the invariants


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_networks_lose_nothing(case: Case) -> None:
    """And what they lose has no gradient for the student; or the formula says otherwise."""
    equal = made(case, equal=True)
    loss, gradients = step(equal)
    pull = max(float(gradients[name].abs().max()) for name in equal.student)
    least = of(LEAST, case) if str(case) not in NOT_LEAST else None
    if least is None and of(NOT_LEAST, case) is not None and str(case) not in ZERO_IN:
        assert loss.abs() > 1e-4
        assert pull > 1e-5
        return
    expected = 0.0 if least is None else float(least[1](equal.student))
    if not math.isnan(expected):
        assert loss.item() == pytest.approx(expected, rel=1e-9, abs=of(NEARLY, case) or 1e-12)
    assert pull < 1e-6


@pytest.mark.parametrize("kind", ["far apart", "dead"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision_under_autocast_is_finite(case: Case, dtype: torch.dtype, kind: str) -> None:
    """Logits 2 · 10⁴ apart, features whose sums of squares overflow; or a student that answers 0 throughout."""
    found = made(case)

    def large(name: str, tensor: Tensor) -> Tensor:
        return (1e4 * tensor.sign() if name == "logits" else 30 * tensor).to(dtype)

    student, teacher = ({n: large(n, t) for n, t in side.items()} for side in (found.student, found.teacher))
    if kind == "dead":
        student = change(student, torch.zeros_like)
    for module in (found.term, *found.networks.values()):
        module.float()
    loss, gradients = step(found._replace(student=student, teacher=teacher), half=dtype)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    if kind in (of(BEYOND, case) or ()):
        assert max(float(g.abs().nan_to_num(math.inf, math.inf).max()) for g in gradients.values()) > 65504
        return
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
    if kind == "dead":
        assert max(float(gradients[name].abs().max()) for name in student) < 1e5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_teacher_is_neither_trained_nor_changed(case: Case) -> None:
    found = made(case)
    before = {role: copy.deepcopy(network.state_dict()) for role, network in found.networks.items()}
    step(found)
    teacher = list(found.networks["teacher"].parameters())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher)
    owned = {parameter.data_ptr() for parameter in found.term.parameters()}
    for role, network in found.networks.items():
        assert not owned & {parameter.data_ptr() for parameter in network.parameters()}, role
        torch.testing.assert_close(dict(network.state_dict()), dict(before[role]), rtol=0, atol=0)
    assert [name for name, buffer in found.term.named_buffers() if buffer.requires_grad] == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_order_of_a_batch_does_not_matter(case: Case) -> None:
    found = made(case)
    loss, gradients = step(found._replace(term=copy.deepcopy(found.term)))
    student, teacher = (change(side, lambda t: t[PERMUTED]) for side in (found.student, found.teacher))
    again, permuted = step(
        found._replace(student=student, teacher=teacher, batch=found.batch.map(lambda t: t[PERMUTED]))
    )
    if of(ORDERED, case) is not None and str(case) not in UNORDERED:
        assert not torch.isclose(loss, again, rtol=1e-6)
        return
    torch.testing.assert_close(again, loss, rtol=1e-10, atol=1e-12)
    for name in found.student:
        torch.testing.assert_close(permuted[name], gradients[name][PERMUTED], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", [case for case in CASES if not reads_hidden(two_ranks.term(case.name))], ids=str)
def test_the_memory_format_of_a_feature_changes_no_number(case: Case) -> None:
    """Channels last, as cuDNN likes them and Swin makes them: no term may ``view``."""
    found = made(case)

    def last(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    loss, gradients = step(found._replace(term=copy.deepcopy(found.term)))
    again, of_last = step(found._replace(student=change(found.student, last), teacher=change(found.teacher, last)))
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(of_last, gradients)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_batch_of_one(case: Case) -> None:
    """It is finite, or one sentence says why not."""
    found = made(case)
    student, teacher = (change(side, lambda t: t[:1]) for side in (found.student, found.teacher))
    alone = found._replace(student=student, teacher=teacher, batch=found.batch.map(lambda t: t[:1]))
    if (why := of(ALONE, case)) is not None:
        with pytest.raises(KdError) as caught:
            step(alone)
        assert why in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    loss, gradients = step(alone)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_term_keeps_survives_a_checkpoint(case: Case) -> None:
    """Adapters, banks, running statistics: after two steps, in a term prepared with other random numbers."""
    found = made(case)
    optimizer = torch.optim.SGD([*found.term.parameters(), nn.Parameter(torch.zeros(()))], lr=1e-3)
    for seed in (3, 4):
        step(found, seed)
        optimizer.step()
    saved = io.BytesIO()
    torch.save(found.term.state_dict(), saved)
    saved.seek(0)
    other = made(case, seed=9)
    other.term.load_state_dict(torch.load(saved, weights_only=True))
    if isinstance(getattr(other.term, "rows", None), nn.Module):
        other.term.rows.seed = found.term.rows.seed  # that of the run, which a resumed one has as well
    for seed in (5, 6):
        loss, gradients = step(found, seed)
        again, resumed = step(other, seed)
        assert torch.equal(again, loss)
        assert all(torch.equal(resumed[name], gradient) for name, gradient in gradients.items())


def of_logits() -> dict[str, Case]:
    """The cases that read the teacher's logits, and those at T = 1, where T is one that can be set."""
    found = {}
    for case in CASES:
        term = two_ranks.term(case.name, {**QUEUE, **case.settings})
        if term.needs_teacher_logits and not term.reads_topk and not term.teacher_taps:
            found[str(case)] = case
            if term.reads_softmax_at not in (None, 1):
                key = "temperature" if hasattr(term, "temperature") else "gamma"
                at_one = Case(case.name, {**case.settings, key: 1.0})
                found[str(at_one)] = at_one
    return found


@pytest.mark.parametrize("case", of_logits().values(), ids=str)
def test_a_kept_topk_is_read_as_the_logits_are_or_the_term_declares_more(case: Case) -> None:
    """Exactly with a tail in equal parts, whatever the shift of the logits; nearly with any tail that has no weight."""
    student, _, batch = two_ranks.drawn()
    torch.manual_seed(0)
    kept, shift = torch.randn(ROWS, CLASSES - 2).double().log_softmax(1), torch.randn(ROWS, 1).double()
    order = torch.stack([torch.randperm(CLASSES - 1) for _ in range(ROWS)])  # the last class is always of the tail
    ids, others = order[:, :-1], torch.cat([order[:, -1:], torch.full((ROWS, 1), CLASSES - 1)], dim=1)
    batch = replace(batch, targets=ids.gather(1, kept.argmax(1, keepdim=True)).squeeze(1))
    parts = -10 * torch.rand(ROWS, 2).double()
    low = student["logits"].scatter(1, others, -15.0)
    agree = []
    for own, mass, split, close in ((student["logits"], 0.3, 0 * parts, 1e-9), (low, 1e-6, parts, 2e-5)):
        known, tail = kept + math.log1p(-mass), split.log_softmax(1) + math.log(mass)
        logits = torch.empty(ROWS, CLASSES).double().scatter(1, ids, known).scatter(1, others, tail) + shift
        values = []
        for teacher in (Output(topk=TopK(ids, known, CLASSES)), Output(logits)):
            found = made(case)
            for seed in (2, 3):  # the second step reads what a term has kept of the first
                torch.manual_seed(seed)
                value = found.term(output({**found.student, "logits": own}), teacher, batch).detach()
            values.append(value)
        agree.append(torch.isclose(*values, rtol=close, atol=0))
    declared = found.term.reads_softmax_at
    assert all(agree) == (declared == 1), f"reads_softmax_at = {declared}"
    assert (declared is None) == (of(MORE_THAN_SOFTMAX, case) is not None)
