"""Losses computed in chunks from hidden states are those of the logits: values, gradients, and through a whole step."""

from __future__ import annotations

import importlib.machinery
import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kd.config.compose import checked
from kd.distill import fused as fused_terms
from kd.distill.distiller import Distiller
from kd.distill.objective import Objective
from kd.errors import KdError
from kd.losses import functional as f
from kd.losses.base import UNLABELLED, Batch, Fused, Output, Setup, Term, TopK
from kd.losses.features.hint import Hint
from kd.losses.logits.ce import CrossEntropy
from kd.losses.logits.jsd import JensenShannon
from kd.losses.logits.kd import KnowledgeDistillation
from kd.losses.logits.rkl import ReverseKL
from kd.losses.logits.skl import SkewedKL
from kd.losses.logits.srkl import SkewedReverseKL
from kd.losses.logits.symmetric_kl import SymmetricKL
from kd.losses.tokens import _liger
from kd.losses.tokens.fused import Liger, Projection, TeacherRows, fused_losses
from kd.losses.tokens.topk_kl import TopKKL
from kd.parallel.group import Shares
from kd.run import build
from kd.tasks.output_projection import Head
from kd.tasks.tokens import CausalLM
from tests.losses.references import Case
from tests.losses.references.tokens import IGNORED
from tests.tiny_language import LLAMA, Texts

GOLDEN = Path(__file__).parents[1] / "golden"
ROWS, CLASSES, WIDTH, WIDER = 23, 17, 6, 9
TERMS: dict[str, Callable[[float], Term]] = {
    "kd": KnowledgeDistillation,
    "rkl": ReverseKL,
    "jsd": lambda t: JensenShannon(t, 0.3),
    "jsd_0": lambda t: JensenShannon(t, 0.0),
    "jsd_1": lambda t: JensenShannon(t, 1.0),
    "skl": lambda t: SkewedKL(t, 0.1),
    "skl_0": lambda t: SkewedKL(t, 0.0),
    "srkl": lambda t: SkewedReverseKL(t, 0.2),
    "srkl_0": lambda t: SkewedReverseKL(t, 0.0),
    "tail": lambda t: TopKKL(4, t),
    "renormalised": lambda t: TopKKL(4, t, "renormalised"),
    "zero": lambda t: TopKKL(4, t, "zero"),
    "all_of_them": lambda t: TopKKL(40, t),
}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 1.3, "softcap": 2.0},
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Pair(NamedTuple):
    """Hidden states and heads of both sides, and targets."""

    student: Tensor
    own: Head
    teacher: Tensor
    other: Head
    targets: Tensor

    def outputs(self, kind: str = "hidden") -> tuple[Output, Output]:
        """``kind``: what is known of the teacher."""
        with torch.no_grad():
            logits = self.other(self.teacher)
            log_probs, ids = logits.log_softmax(-1).topk(6, dim=-1)
        known = {
            "hidden": Output(hidden=self.teacher, head=self.other),
            "logits": Output(logits),
            "topk": Output(topk=TopK(ids, log_probs, CLASSES)),
        }
        return Output(hidden=self.student, head=self.own), known[kind]

    def trained(self) -> list[Tensor]:
        return [self.student, *(p for p in self.own.parameters() if p.requires_grad)]

    @property
    def batch(self) -> Batch:
        return Batch(torch.empty(3), self.targets)


def head(width: int, dtype: torch.dtype, bias: bool = False, scale: float = 1.0, softcap: float | None = None) -> Head:
    layer = nn.Linear(width, CLASSES, bias).to(dtype)
    nn.init.normal_(layer.weight, std=0.7)
    return Head(layer, scale, softcap)


def pair(dtype: torch.dtype = torch.float64, rows: int = ROWS, **settings: Any) -> Pair:
    targets = torch.randint(CLASSES, (rows,))
    targets[::4] = UNLABELLED
    other = head(WIDER, dtype, **settings).requires_grad_(False)
    hidden = [torch.randn(rows, width, dtype=dtype) for width in (WIDTH, WIDER)]
    return Pair(hidden[0].requires_grad_(), head(WIDTH, dtype, **settings), hidden[1], other, targets)


def computed(objective: Objective, made: Pair, kind: str, chunk: int, shares: Any = None) -> list[Tensor]:
    """Values, sum, gradients; with ``chunk`` 0 from the logits."""
    objective.chunk = chunk
    student, teacher = made.outputs(kind)
    values, total = objective(student, teacher, made.batch, shares=shares)
    assert (student.made_logits is None) == (chunk > 0)
    assert not chunk or teacher.made_logits is None or kind == "logits"
    return [*values, total, *torch.autograd.grad(total, made.trained())]


def same(found: list[Tensor], expected: list[Tensor], near: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        largest = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=near * largest)


# ---------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["hidden", "logits", "topk"])
def test_the_same_numbers_as_from_logits(name: str, temperature: float, kind: str) -> None:
    """In chunks of one row, of a number that does not divide the rows, and of more rows than there are."""
    made = pair()
    objective = Objective({"ce": CrossEntropy(0.1), name: TERMS[name](temperature)}, {"ce": 0.3, name: 1.7})
    expected = computed(objective, made, kind, 0)
    assert all(gradient.abs().max() > 1e-3 for gradient in expected[3:])
    for chunk in (1, 7, 64):
        same(computed(objective, made, kind, chunk), expected, 1e-12)


@pytest.mark.parametrize("name", ["kd", "rkl", "jsd", "skl", "srkl", "tail"])
@pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS)
def test_heads_with_bias_scale_and_soft_cap(name: str, settings: dict[str, Any]) -> None:
    made = pair(**settings)
    for names in ((name,), ("ce", name), (name, "rkl", "ce")):
        terms = {n: CrossEntropy() if n == "ce" else TERMS[n](2.0) for n in names}
        objective = Objective(terms, {n: 0.5 + i for i, n in enumerate(terms)})
        same(computed(objective, made, "hidden", 5), computed(objective, made, "hidden", 0), 1e-12)


@pytest.mark.parametrize("name", ["kd", "rkl", "jsd", "skl", "srkl", "tail"])
@pytest.mark.parametrize("size", [(96, 33), (64, 2000)])
def test_in_single_precision_as_near_to_the_exact_value(
    name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.losses.test_fused.CLASSES", size[1])
    exact = pair(rows=size[0])
    single = Pair(*(t.detach().float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in exact))
    single.student.requires_grad_()
    objective = Objective({"ce": CrossEntropy(), name: TERMS[name](2.0)})
    expected = [t.float() for t in computed(objective, exact, "hidden", 0)]
    for h in (exact.own, exact.other):
        h.float()
    plain, ours = (computed(objective, single, "hidden", chunk) for chunk in (0, 32))
    same(ours, plain, 4e-7)
    for near, far, true in zip(ours, plain, expected, strict=True):
        off, usual = ((t - true).abs().max() / true.abs().max() for t in (near, far))
        assert off <= 1.5 * usual + 2e-7


@pytest.mark.parametrize("name", [name for name in TERMS if name != "all_of_them"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_far_apart_are_finite(name: str, dtype: torch.dtype) -> None:
    rows = torch.tensor([[1e4, 0.0, -1e4, 1.0, 2.0, 9.0], [0.0] * 6, [-1e4, 1e4, 0.0, 1.0, 1.0, 1.0]], dtype=dtype)
    hidden, weight = rows.clone().requires_grad_(), torch.eye(6, dtype=dtype).requires_grad_()
    form = TERMS[name](1.0).fused()
    teacher = TeacherRows(logits=rows.flip(0, 1))
    parts = [form, Fused("cross_entropy")]
    values, total = fused_losses(hidden, Projection(weight), teacher, torch.tensor([2, -1, 0]), parts, [1.0, 1.0], 2)
    total.backward()
    for value in (*values, total):
        assert value.dtype == torch.float32
        assert value.isfinite()
    for tensor in (hidden, weight):
        assert tensor.grad.dtype == dtype
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_products_are_in_half_precision(dtype: torch.dtype) -> None:
    """Hidden states as autocast leaves them, weights in single precision."""
    made = pair(torch.float32, bias=True)
    made = made._replace(student=made.student.detach().to(dtype).requires_grad_(), teacher=made.teacher.to(dtype))
    objective = Objective({"ce": CrossEntropy(), "kd": KnowledgeDistillation(2.0)})
    with torch.autocast("cpu", dtype):
        plain, ours = (computed(objective, made, "hidden", chunk) for chunk in (0, 7))
    assert [t.dtype for t in ours] == [t.dtype for t in plain]
    assert [t.dtype for t in ours[-3:]] == [dtype, torch.float32, torch.float32]
    for near, far in zip(ours, plain, strict=True):
        assert (near - far).abs().max() <= 2 * torch.finfo(dtype).eps * far.abs().max()


def test_a_scaled_loss_saves_the_gradient_of_half_precision() -> None:
    """A loss times 2¹⁶, as with float16; alone its gradient by the hidden states would be 0 in that precision."""
    made = pair(torch.float32)
    small = made.student.detach().half().requires_grad_()
    form, projection = Fused("forward_kl"), Projection(made.own.weight)
    teacher = TeacherRows(made.teacher, Projection(made.other.weight))
    factors = [1e-6]
    exact = fused_losses(made.student, projection, teacher, None, [form], factors)[1] * 2.0**16
    scaled = fused_losses(small, projection, teacher, None, [form], factors)[1] * 2.0**16
    (expected,), (found,) = (torch.autograd.grad(t, x) for t, x in ((exact, made.student), (scaled, small)))
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def test_rows_without_a_label() -> None:
    made = pair()
    unlabelled = made._replace(targets=torch.full_like(made.targets, UNLABELLED))
    objective = Objective({"ce": CrossEntropy(), "kd": KnowledgeDistillation()})
    found = computed(objective, unlabelled, "hidden", 5)
    assert found[0] == 0
    same(found[2:], computed(Objective({"kd": KnowledgeDistillation()}), unlabelled, "hidden", 5)[1:], 1e-14)
    empty = Pair(made.student[:0].detach().requires_grad_(), made.own, made.teacher[:0], made.other, made.targets[:0])
    values = computed(objective, empty, "hidden", 5)
    assert all((value == 0).all() for value in values)
    assert values[-1].shape == (CLASSES, WIDTH)


def test_shares_of_several_processes_weigh_each_part() -> None:
    made = pair()
    shares = Shares(**{name: torch.tensor(0.75 if name == "rows" else 1.25) for name in Shares._fields})
    objective = Objective({"ce": CrossEntropy(), "kd": KnowledgeDistillation()}, {"ce": 0.4, "kd": 2.0})
    plain, ours = (computed(objective, made, "hidden", chunk, shares) for chunk in (0, 5))
    same(ours, plain, 1e-12)
    torch.testing.assert_close(ours[2], 0.4 * 1.25 * ours[0] + 2.0 * 0.75 * ours[1], check_dtype=False)


def test_what_needs_no_gradient_gets_none() -> None:
    made = pair(bias=True)
    objective = Objective({"kd": KnowledgeDistillation()})
    expected = computed(objective, made, "hidden", 0)
    made.own.projection.weight.requires_grad_(False)  # the head of a network that is trained by low-rank matrices
    found = computed(objective, made, "hidden", 5)
    same(found, [*expected[:3], expected[4]], 1e-12)
    with torch.no_grad():
        values, total = objective(*made.outputs(), made.batch)
    assert not total.requires_grad
    torch.testing.assert_close(values[0], expected[0])


def test_backward_goes_through_it_once() -> None:
    made = pair()
    values, total = Objective({"kd": KnowledgeDistillation()}, chunk=5)(*made.outputs(), made.batch)
    assert not values[0].requires_grad
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward goes through it once"):
        total.backward()


def test_a_weight_that_is_the_embedding_as_well() -> None:
    """Both gradients are added, over two accumulated batches."""
    embedding, ids = nn.Embedding(CLASSES, WIDTH).double(), torch.randint(CLASSES, (ROWS,))
    layer = nn.Linear(WIDTH, CLASSES, bias=False).double()
    layer.weight = embedding.weight
    made = pair()
    found = []
    for chunk in (0, 5):
        objective = Objective({"ce": CrossEntropy(), "kd": KnowledgeDistillation()}, chunk=chunk)
        embedding.weight.grad = None
        for _ in range(2):
            student = Output(hidden=torch.tanh(embedding(ids)), head=Head(layer))
            (objective(student, made.outputs()[1], made.batch)[1] / 2).backward()
        found.append(embedding.weight.grad)
    torch.testing.assert_close(found[1], found[0])
    assert (found[0][~torch.isin(torch.arange(CLASSES), ids)] != 0).all()


# ---------------------------------------------------------------------- reference numbers


@pytest.mark.parametrize("file", [p.stem for p in sorted(GOLDEN.glob("liger_fused_*"))])
@pytest.mark.parametrize("chunk", [1, 5, 128])
def test_golden_of_liger(file: str, chunk: int) -> None:
    """The hard part is at T = 1; no T²."""
    case = Case(GOLDEN / f"{file}.npz")
    kept = case["labels"] != IGNORED
    check(case, kept, case["labels"][kept], case.hyper["weight_hard"], case.hyper["weight_soft"], chunk)


@pytest.mark.parametrize("file", [p.stem for p in sorted(GOLDEN.glob("trl116_chunked_*"))])
@pytest.mark.parametrize("chunk", [1, 5, 128])
def test_golden_of_trl(file: str, chunk: int) -> None:
    case = Case(GOLDEN / f"{file}.npz")
    check(case, case["completion_mask"] != 0, None, 0.0, 1.0, chunk)


def check(case: Case, kept: Tensor, targets: Tensor | None, hard: float, soft: float, chunk: int) -> None:
    t, sides = case.hyper["temperature"], {}
    for side in ("student", "teacher"):
        scale, cap = (case.hyper.get(f"{side}_{key}", 0.0) for key in ("logit_scale", "softcap"))
        sides[side] = Projection(case[f"{side}_weight"], case.tensors.get(f"{side}_bias"), scale or 1.0, cap or None)
    teacher = TeacherRows(case["teacher_hidden"][kept], sides["teacher"])
    parts, factors = [Fused("js", t, float(case.hyper["beta"]))], [soft / t**2]
    if targets is not None:
        parts, factors = [*parts, Fused("cross_entropy")], [*factors, hard]
    hidden = case["student_hidden"][kept]
    _, loss = fused_losses(hidden, sides["student"], teacher, targets, parts, factors, chunk)
    np.testing.assert_allclose(loss.item(), case.loss, rtol=2e-5)
    assert len(case.grads) >= 2
    loss.backward()
    for name, expected in case.grads.items():
        atol = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(case[name].grad.numpy(), expected, rtol=1e-4, atol=atol, err_msg=name)


# ---------------------------------------------------------------------- when the logits are made after all


class Sharper(KnowledgeDistillation):
    """Another formula, which says nothing of a fused form."""

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return f.kl_divergence(student.logits, teacher.logits, self.temperature / 2)


class Warmer(KnowledgeDistillation):
    """The same formula with other settings."""

    def __init__(self) -> None:
        super().__init__(7.0)


def hooked(made: Pair) -> None:
    made.own.projection.register_forward_hook(lambda layer, given, out: out * 2)


def shared(made: Pair) -> None:
    made.other.requires_grad_()


@pytest.mark.parametrize(
    ("terms", "change"),
    [
        ({"ce": CrossEntropy(), "symmetric_kl": SymmetricKL()}, None),
        ({"kd": Sharper()}, None),
        ({"kd": KnowledgeDistillation()}, hooked),
        ({"kd": KnowledgeDistillation()}, shared),
    ],
    ids=["another term", "another formula", "hook", "trained teacher"],
)
def test_logits_are_made_where_they_are_needed(terms: dict[str, Term], change: Callable[[Pair], None] | None) -> None:
    made = pair()
    if change is not None:
        change(made)
    student, teacher = made.outputs()
    values, total = Objective(terms, chunk=5)(student, teacher, made.batch)
    assert student.made_logits is not None
    expected = [
        term(Output(made.own(made.student)), Output(made.other(made.teacher)), made.batch) for term in terms.values()
    ]
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(total, sum(expected))


def test_shares_of_classes_are_no_labels() -> None:
    made = pair()
    mixed = Batch(torch.empty(3), torch.randn(ROWS, CLASSES, dtype=torch.float64).softmax(-1))
    student, teacher = made.outputs()
    values, _ = Objective({"ce": CrossEntropy()}, chunk=5)(student, teacher, mixed)
    torch.testing.assert_close(values[0], f.cross_entropy(made.own(made.student), mixed.targets))


def test_a_subclass_with_other_settings_and_a_term_of_features_keep_the_fused_form() -> None:
    made = pair()
    student, teacher = made.outputs()
    student.head, teacher.head = made.own.projection, made.other.projection  # plain layers
    for side in (student, teacher):
        side.features["pooled"] = torch.randn(3, 4, dtype=torch.float64)
    hint = Hint(["pooled"], ["pooled"], adapter="identity")
    hint.prepare(Setup(student, teacher, made.batch))
    values, total = Objective({"hint": hint, "kd": Warmer()}, chunk=5)(student, teacher, made.batch)
    assert student.made_logits is None
    assert values[0] == f.hint_loss(student.features["pooled"], teacher.features["pooled"])
    torch.testing.assert_close(values[1], f.kl_divergence(made.own(made.student), made.other(made.teacher), 7.0))
    torch.testing.assert_close(total, values[0] + values[1])


def test_a_small_vocabulary_has_larger_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    before = torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda x, *a, **k: (seen.append(len(x)), before(x, *a, **k))[1])
    for classes in (40, 16_000, 32_768, 40_000):
        weight = torch.zeros(classes, 1)
        fused_losses(torch.zeros(300, 1), Projection(weight), TeacherRows(), torch.zeros(300, dtype=torch.int64),
                     [Fused("cross_entropy")], [1.0])  # fmt: skip
    assert seen == [300, 256, 44, 128, 128, 44, 128, 128, 44]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"chunk": 0}, "^chunk = 0 is not allowed: it must be a whole number above 0$"),
        ({"parts": [Fused("kl")]}, "^kind = kl is not allowed: it must be cross_entropy, forward_kl, "),
        ({"parts": [Fused("js", 0.0)]}, "^temperature = 0.0 is not allowed: it must be a finite number above 0$"),
        ({"parts": []}, "^there are 0 parts and 1 factors: it must be one factor each$"),
        ({"parts": [Fused("cross_entropy")], "targets": None}, "^a cross-entropy needs targets, and there are none$"),
        (
            {"teacher": TeacherRows(logits=torch.zeros(3, 4))},
            "^the student's weight is for 5 classes, the teacher's logits for 4$",
        ),
        ({"teacher": TeacherRows()}, "^there are no logits of the teacher, nor what they are made from$"),
    ],
)
def test_bad_settings_are_one_sentence(change: dict[str, Any], sentence: str) -> None:
    given: dict[str, Any] = {
        "student_hidden": torch.zeros(3, 2),
        "student_projection": Projection(torch.zeros(5, 2)),
        "teacher": TeacherRows(logits=torch.zeros(3, 5)),
        "targets": torch.zeros(3, dtype=torch.int64),
        "parts": [Fused("forward_kl")],
        "factors": [1.0],
    }
    with pytest.raises(ValueError, match=sentence):
        fused_losses(**{**given, **change})


# ---------------------------------------------------------------------- a whole step


def llama(seed: int, layers: int, **more: Any) -> nn.Module:
    torch.manual_seed(seed)
    config = {key: value for key, value in LLAMA.items() if key != "model_type"}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, "num_hidden_layers": layers, **more}))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("terms", [("ce", "kd"), ("jsd",), ("ce", "rkl", "tail")])
def test_a_step_of_a_language_model(tied: bool, terms: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter's gradient, the loss and what is logged, with the logits and without."""
    found: dict[int, dict[str, Tensor]] = {}
    calls = itertools.count()
    forward = Head.forward
    monkeypatch.setattr(Head, "forward", lambda *given: (next(calls), forward(*given))[1])
    for chunk in (0, 5):
        made = {n: CrossEntropy() if n == "ce" else TERMS[n](2.0) for n in terms}
        objective = Objective(made, {n: 0.3 + i for i, n in enumerate(made)}, chunk=chunk)
        student, teacher = llama(1, 1, tie_word_embeddings=tied).double(), llama(2, 2).double()
        module = Distiller(student, teacher, objective, CausalLM(), num_classes=None)
        module.prepare(Texts().batches("train")[0])
        begun = next(calls)
        batch = module.task.rows(Texts().batches("train")[1])
        step = module.losses(batch)
        step.total.backward()
        assert next(calls) - begun - 1 == (0 if chunk else 2 if terms != ("ce",) else 1)
        gradients = {name: p.grad for name, p in student.named_parameters()}
        found[chunk] = {"total": step.total, **step.values, **gradients}
    assert found[5].keys() == found[0].keys()
    for name, expected in found[0].items():
        assert expected.detach().abs().max() > 0, name
        near = {"rtol": 0, "atol": 1e-11 * float(expected.detach().abs().max())}
        torch.testing.assert_close(
            found[5][name].detach(), expected.detach(), **near, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("said", "chunk"), [([], None), (["hardware.loss_chunk=0"], 0), (["hardware.loss_chunk=32"], 32)]
)
def test_the_key_of_the_config(said: list[str], chunk: int | None) -> None:
    assert build.objective(checked(["loss=[ce,kd]", *said])).chunk == chunk


def test_terms_that_have_a_fused_form() -> None:
    terms = {"ce": CrossEntropy(), **{name: make(3.0) for name, make in TERMS.items()}}
    forms = {name: fused_terms.form_of(term) for name, term in terms.items()}
    assert all(form is not None for form in forms.values())
    assert forms["jsd"] == Fused("js", 3.0, 0.3)
    over = KnowledgeDistillation()
    over.over = "batch"
    assert [fused_terms.form_of(term) for term in (Sharper(), SymmetricKL(), over)] == [None] * 3


# ---------------------------------------------------------------------- Liger's kernels

LIGER = pytest.mark.skipif(
    find_spec("liger_kernel") is None, reason="liger_kernel is not there: pip install 'kd[liger]'"
)
NUMBERS = """
import contextlib, sys
import torch
from kd.losses.base import Fused
from kd.losses.tokens import fused
from kd.losses.tokens.fused import Liger, Projection, TeacherRows, fused_losses

device = sys.argv[1]
if device == "cpu":
    fused.computes = lambda *given: True
torch.manual_seed(0)


def made(half, n=7, classes=50):
    shapes = (n, 8), (classes, 8), (n, 12), (classes, 12)
    tensors = [torch.randn(*shape).to(device, half if i % 2 == 0 else torch.float32) for i, shape in enumerate(shapes)]
    for tensor in tensors[:2]:
        tensor.requires_grad_()
    targets = torch.randint(classes, (n,), device=device)
    targets[::3] = -1
    return tensors, targets


def losses(tensors, targets, parts, factors, liger):
    hidden, weight, taught, other = tensors
    teacher = TeacherRows(taught, Projection(other))
    values, total = fused_losses(hidden, Projection(weight), teacher, targets, parts, factors, liger=liger)
    return [*values, total, *torch.autograd.grad(7.0 * total, [hidden, weight])]


sizes = [(n, torch.float32) for n in (1, 7, 33)] + [(7, torch.bfloat16)]
for rows, half in sizes:
    tensors, targets = made(half, rows)
    for form in [("forward_kl", t, 0.0) for t in (1.0, 2.5)] + [("reverse_kl", 2.0, 0.0)] + [
        ("js", t, beta) for t in (1.0, 2.5) for beta in (0.0, 0.1, 0.5, 0.7, 1.0)
    ]:
        for hard in ([], [Fused("cross_entropy", share=0.1)]):
            parts, factors = [*hard, Fused(*form)], [0.3, torch.tensor(1.7, device=device)][-1 - len(hard) :]
            given = tensors, targets, parts, factors
            cast = contextlib.nullcontext() if half == torch.float32 else torch.autocast(device, half)
            liger = Liger()
            liger.used = True
            with cast:
                plain, kernels = losses(*given, None), losses(*given, liger)
            for expected, found in zip(plain, kernels, strict=True):
                assert found.dtype == expected.dtype, (form, found.dtype)
                far = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
                assert far < (1e-4 if half == torch.float32 else 0.03), (form, len(hard), rows, half, float(far))

none = torch.full_like(targets, -1)
assert losses(tensors, none, [Fused("cross_entropy"), Fused("js", 1.0, 0.5)], [1.0, 1.0], liger)[0] == 0
if device == "cuda":
    liger = Liger()
    losses(tensors, targets, [Fused("forward_kl", 2.0)], [1.0], liger)
    assert liger.used is not None
"""


@LIGER
@pytest.mark.slow
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
            ],
        ),
    ],
)
def test_the_same_numbers_by_the_kernels_of_liger(device: str) -> None:
    """On a CPU by Triton's interpreter, which has to be on before Triton is imported: in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"} if device == "cpu" else None
    command = [sys.executable, "-c", NUMBERS, device]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert said.returncode == 0, said.stderr


def test_on_a_cpu_liger_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    before = {name for name in sys.modules if name.startswith("liger_kernel")}
    made = pair(torch.float32)
    objective = Objective({"ce": CrossEntropy(), "kd": KnowledgeDistillation()})
    student, teacher = made.outputs()
    objective(student, teacher, made.batch)[1].backward()
    assert student.made_logits is None
    assert objective.liger.used is None
    assert before == {name for name in sys.modules if name.startswith("liger_kernel")}


@pytest.mark.parametrize(
    ("change", "theirs"),
    [
        ({}, True),
        ({"parts": [Fused("js", 2.0, 0.3)]}, True),
        ({"dtype": torch.bfloat16}, True),
        ({"chunk": 128}, False),
        ({"device": "cpu"}, False),
        ({"dtype": torch.float16}, False),
        ({"softcap": 3.0}, False),
        ({"bias": True}, False),
        ({"grad": False}, False),
        ({"rows": 0}, False),
        ({"parts": [Fused("skewed_kl", 1.0, 0.1)]}, False),
        ({"parts": [Fused("forward_kl"), Fused("reverse_kl")]}, False),
        ({"parts": [Fused("cross_entropy")]}, False),
        ({"teacher": TeacherRows()}, False),
    ],
)
def test_what_the_kernels_of_liger_compute(
    change: dict[str, Any], theirs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without memory say that they are on a GPU."""
    seen: list[bool] = []
    monkeypatch.setattr("kd.losses.tokens.fused._plain_pass", lambda *given: seen.append(False) or result(*given))
    monkeypatch.setattr("kd.losses.tokens.fused.kernel_pass", lambda *given: seen.append(True) or result(*given))

    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())

    def result(hidden: Tensor, projection: Projection, *_: Any) -> Any:
        return hidden.new_zeros(()), [hidden.new_zeros(())], [None, None, None]

    rows, kind = change.get("rows", 3), {"dtype": change.get("dtype"), "device": change.get("device", "cuda")}
    liger = Liger()
    liger.used = True
    with FakeTensorMode():
        hidden, weight = torch.zeros(rows, 2, **kind).requires_grad_(), torch.zeros(5, 2, **kind)
        teacher = change.get("teacher", TeacherRows(hidden.detach(), Projection(weight)))
        bias = torch.zeros(5, **kind) if change.get("bias") else None
        projection = Projection(weight, bias, softcap=change.get("softcap"))
        parts = change.get("parts", [Fused("cross_entropy"), Fused("forward_kl", 4.0)])
        targets = torch.zeros(rows, **{**kind, "dtype": torch.int64})
        with torch.set_grad_enabled(change.get("grad", True)):
            fused_losses(hidden, projection, teacher, targets, parts, [1.0] * len(parts), change.get("chunk"), liger)
    assert seen == [theirs]


@pytest.mark.parametrize(
    ("times", "factor", "there", "word"),
    [
        ((2.0, 1.0), 1.0, True, "are used: 1.00 ms a batch, the plain pass 2.00"),
        ((1.0, 2.0), 1.0, True, "are not used: 2.00 ms a batch, the plain pass 1.00"),
        ((2.0, 1.0), 1.1, True, "are not used: losses and gradients"),
        ((2.0, 1.0), None, True, "do not run here: ValueError: no such kernel"),
        ((2.0, 1.0), 1.0, False, None),
    ],
)
def test_the_faster_pass_is_used(
    times: tuple[float, float], factor: float | None, there: bool, word: str | None, caplog, monkeypatch
) -> None:
    """``factor``: of the numbers of Liger; None: it fails."""
    spec = importlib.machinery.ModuleSpec("liger_kernel", None) if there else None
    monkeypatch.setattr(_liger, "find_spec", lambda name: spec)
    monkeypatch.setattr(_liger, "_milliseconds", lambda *passes: times)
    monkeypatch.setattr(logging.getLogger("kd"), "propagate", True)
    caplog.set_level(logging.INFO)

    def plain() -> Any:
        return torch.tensor(1.0), [torch.tensor(1.0)], [torch.ones(2), torch.ones(3), None]

    def kernels() -> Any:
        if factor is None:
            raise ValueError("no such kernel")
        return torch.tensor(2.0), [torch.tensor(factor)], [torch.ones(2), torch.ones(3), None]

    liger = Liger()
    totals = [float(liger(plain, kernels)[0]) for _ in range(2)]
    used = word is not None and word.startswith("are used")
    assert totals == [2.0 if used else 1.0] * 2
    assert liger.used is used
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (word is not None)
    assert word is None or word in said[0]


def test_the_key_of_liger() -> None:
    assert build.objective(checked(["loss=[ce,kd]"])).liger is not None
    assert build.objective(checked(["loss=[ce,kd]", "hardware.liger=false"])).liger is None
    with pytest.raises(KdError, match=r"hardware\.liger = true is not allowed: it must be auto or false"):
        checked(["loss=[ce,kd]", "hardware.liger=true"])
