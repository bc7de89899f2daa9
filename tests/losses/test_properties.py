"""KD, cross-entropy, hints and attention: second implementations in numpy, labels, adapters, sentences; all YAMLs."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy.special import log_softmax
from torch import Tensor, nn

from kd.losses import functional
from kd.losses.adapters import build_adapter
from kd.losses.base import UNLABELLED, Batch, Output, Setup, Term
from kd.losses.features.at import AttentionTransfer
from kd.losses.features.hint import Hint
from kd.losses.functional import attention_map, attention_transfer, cross_entropy, hint_loss, kl_divergence
from kd.losses.logits.ce import CrossEntropy
from kd.losses.logits.cwtm import ConfidenceWeighted
from kd.losses.logits.dkpp import PermutedPredictions
from kd.losses.logits.kd import KnowledgeDistillation

ROOT = Path(__file__).parents[2]
LOSSES = ROOT / "kd" / "losses"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def normal(*shape: int, scale: float = 1.0, grad: bool = False) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).requires_grad_(grad)


def batch_of(targets: Tensor) -> Batch:
    return Batch(torch.empty(len(targets), 1, 1, 1), targets, torch.arange(len(targets)))


# ---------------------------------------------------------------------- dead maps


@pytest.mark.parametrize("p", [1, 2, 3.5])
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_dead_maps_have_finite_gradients(variant: str, p: float) -> None:
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = attention_transfer(dead, torch.rand(2, 3, 4, 4), p, variant)
    loss.backward()
    assert loss.isfinite()
    assert dead.grad.isfinite().all()


# ---------------------------------------------------------------------- second implementations


@pytest.mark.parametrize(("rows", "classes", "temperature"), [(1, 2, 1.0), (6, 10, 4.0), (17, 100, 0.5), (3, 5, 20.0)])
def test_kl_in_numpy(rows: int, classes: int, temperature: float) -> None:
    student, teacher = normal(rows, classes, scale=3), normal(rows, classes, scale=3)
    log_s, log_t = (log_softmax(z.numpy() / temperature, axis=1) for z in (student, teacher))
    total = 0.0
    for row in range(rows):
        for c in range(classes):
            total += np.exp(log_t[row, c]) * (log_t[row, c] - log_s[row, c])
    ours = kl_divergence(student, teacher, temperature)
    np.testing.assert_allclose(ours.item(), temperature**2 * total / rows, rtol=1e-11)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_in_numpy(smoothing: float) -> None:
    logits, targets = normal(8, 5, scale=3), torch.tensor([0, 4, UNLABELLED, 2, 2, UNLABELLED, 1, 3])
    log_p = log_softmax(logits.numpy(), axis=1)
    each = [
        -sum(((1 - smoothing) * (c == y) + smoothing / 5) * log_p[row, c] for c in range(5))
        for row, y in enumerate(targets.tolist())
        if y != UNLABELLED
    ]
    np.testing.assert_allclose(cross_entropy(logits, targets, smoothing).item(), np.mean(each), rtol=1e-12)


def numpy_attention(feature: np.ndarray, p: float) -> np.ndarray:
    flat = (np.abs(feature) ** p).sum(axis=1).reshape(len(feature), -1)
    return flat / np.sqrt((flat**2).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("p", [1, 2, 2.5, 3])
def test_attention_in_numpy(p: float) -> None:
    student, teacher = normal(4, 3, 5, 6), normal(4, 7, 5, 6)
    s, t = (numpy_attention(f.numpy(), p) for f in (student, teacher))
    np.testing.assert_allclose(attention_map(student, p).numpy(), s, rtol=1e-12)
    np.testing.assert_allclose(attention_transfer(student, teacher, p).item(), ((s - t) ** 2).mean(), rtol=1e-11)
    norms = np.sqrt(((s - t) ** 2).sum(axis=1))
    np.testing.assert_allclose(attention_transfer(student, teacher, p, "paper").item(), norms.mean(), rtol=1e-11)


def test_attention_pools_the_larger_feature() -> None:
    large, small = normal(2, 3, 8, 8), normal(2, 5, 4, 4)
    pooled = large.numpy().reshape(2, 3, 4, 2, 4, 2).mean(axis=(3, 5))
    expected = ((numpy_attention(pooled, 2) - numpy_attention(small.numpy(), 2)) ** 2).mean()
    np.testing.assert_allclose(attention_transfer(large, small).item(), expected, rtol=1e-11)
    np.testing.assert_allclose(attention_transfer(small, large).item(), expected, rtol=1e-11)


@pytest.mark.parametrize("shape", [(4, 3), (4, 7, 3), (4, 3, 5, 6)])
def test_hint_in_numpy(shape: tuple[int, ...]) -> None:
    student, teacher = normal(*shape), normal(*shape)
    squares = (student.numpy() - teacher.numpy()) ** 2
    np.testing.assert_allclose(hint_loss(student, teacher).item(), squares.mean(), rtol=1e-12)
    per_sample = [0.5 * squares[i].sum() for i in range(4)]
    np.testing.assert_allclose(hint_loss(student, teacher, "paper").item(), np.mean(per_sample), rtol=1e-12)


@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_gradients_by_finite_differences(variant: str, p: float) -> None:
    logits, teacher_logits, targets = normal(3, 4, grad=True), normal(3, 4), torch.tensor([1, UNLABELLED, 3])
    maps, teacher_maps = normal(2, 2, 3, 3, grad=True), normal(2, 2, 3, 3)
    assert torch.autograd.gradcheck(lambda z: kl_divergence(z, teacher_logits, 3.0), logits)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, targets, 0.1), logits)
    assert torch.autograd.gradcheck(lambda f: hint_loss(f, teacher_maps, variant), maps)
    assert torch.autograd.gradcheck(lambda f: attention_transfer(f, teacher_maps, p, variant), maps)


# ---------------------------------------------------------------------- temperature


def test_high_temperature_is_logit_matching() -> None:
    """Hinton Eq. 4: for T far above the logits and zero-mean logits, the gradient of a row is (z_s − z_t) / C.

    The paper's 1 / (C T²) loses its T² to the factor T², and a mean over N rows adds 1 / N. The next term of the
    expansion is of relative size |z| / T, here about 1e-4.
    """
    student, teacher = (normal(6, 10) for _ in range(2))
    student, teacher = (z - z.mean(1, keepdim=True) for z in (student, teacher))
    student.requires_grad_()
    kl_divergence(student, teacher, 1e4).backward()
    torch.testing.assert_close(student.grad, (student - teacher).detach() / (10 * 6), rtol=2e-3, atol=1e-5)


def test_gradient_keeps_its_size_over_temperatures() -> None:
    """Without T² the gradient at T = 50 would be 25 times smaller than at T = 10."""
    sizes = []
    for temperature in (10.0, 50.0):
        torch.manual_seed(0)
        student, teacher = normal(6, 10, grad=True), normal(6, 10)
        kl_divergence(student, teacher, temperature).backward()
        sizes.append(student.grad.norm().item())
    assert 0.8 < sizes[0] / sizes[1] < 1.25


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf")])
def test_temperature_is_checked_before_training(temperature: float) -> None:
    sentence = f"^temperature = {temperature} is not allowed: it must be a finite number above 0$"
    for term in (KnowledgeDistillation, ConfidenceWeighted, PermutedPredictions):
        with pytest.raises(ValueError, match=sentence):
            term(temperature)
    with pytest.raises(ValueError, match=sentence):
        kl_divergence(normal(2, 3), normal(2, 3), temperature)


# ---------------------------------------------------------------------- precision


def test_double_precision_is_kept() -> None:
    assert kl_divergence(normal(2, 3), normal(2, 3), 4.0).dtype == torch.float64
    assert cross_entropy(normal(2, 3), torch.tensor([0, 1])).dtype == torch.float64
    assert hint_loss(normal(2, 3), normal(2, 3)).dtype == torch.float64
    assert attention_transfer(normal(2, 3, 4, 4), normal(2, 3, 2, 2)).dtype == torch.float64


# ---------------------------------------------------------------------- labels and rows


def test_unlabelled_rows_are_ignored() -> None:
    logits, targets = normal(4, 3, grad=True), torch.tensor([2, UNLABELLED, 0, UNLABELLED])
    loss = cross_entropy(logits, targets)
    loss.backward()
    torch.testing.assert_close(loss, cross_entropy(logits[[0, 2]], targets[[0, 2]]))
    assert (logits.grad[[1, 3]] == 0).all()
    assert (logits.grad[[0, 2]] != 0).all()


@pytest.mark.parametrize("rows", [0, 3])
def test_no_labelled_row_is_zero_without_gradient(rows: int) -> None:
    logits = normal(rows, 4, grad=True)
    loss = cross_entropy(logits, torch.full((rows,), UNLABELLED), 0.1)
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_kd_reads_unlabelled_rows_and_survives_none() -> None:
    student, teacher = Output(normal(2, 3)), Output(normal(2, 3))
    loss = KnowledgeDistillation()(student, teacher, batch_of(torch.full((2,), UNLABELLED)))
    torch.testing.assert_close(loss, kl_divergence(student.logits, teacher.logits, 4.0))
    assert kl_divergence(normal(0, 3), normal(0, 3), 4.0) == 0


# ---------------------------------------------------------------------- adapters


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "first"),
    [
        ("conv_bn_relu", (2, 3, 8, 8), (2, 5, 8, 8), nn.Conv2d),
        ("conv_bn_relu", (2, 3, 8, 8), (2, 5, 4, 4), nn.Conv2d),
        ("conv", (2, 3, 4, 6), (2, 5, 8, 12), nn.ConvTranspose2d),
        ("conv", (2, 3, 7, 9), (2, 5, 5, 5), nn.Conv2d),
        ("auto", (2, 3, 7, 7), (2, 5, 4, 4), nn.Conv2d),
        ("auto", (2, 3), (2, 5), nn.Linear),
        ("linear", (2, 9, 3), (2, 9, 5), nn.Linear),
        ("identity", (2, 3, 8, 8), (2, 3, 8, 8), nn.Identity),
    ],
)
def test_adapter_shapes(kind: str, student: tuple[int, ...], teacher: tuple[int, ...], first: type) -> None:
    adapter = build_adapter(kind, student, teacher)
    assert tuple(adapter(torch.rand(student)).shape) == teacher
    inner = adapter[0] if isinstance(adapter, nn.Sequential) else adapter
    assert isinstance(inner, first)
    assert isinstance(adapter, nn.Sequential) == (kind in ("auto", "conv_bn_relu") and len(student) == 4)


def test_adapter_kernels() -> None:
    def kernel(student: int, teacher: int) -> tuple[int, int]:
        conv = build_adapter("conv", (2, 3, student, student), (2, 5, teacher, teacher))
        return conv.kernel_size[0], conv.stride[0]

    assert [kernel(8, 4), kernel(4, 8), kernel(8, 8), kernel(8, 5)] == [(3, 2), (4, 2), (1, 1), (4, 1)]


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "why"),
    [
        ("conv", (2, 3, 4, 4), (2, 5, 7, 7), "exactly twice"),
        ("auto", (2, 3, 4, 4), (2, 5, 16, 16), "exactly twice"),
        ("conv", (2, 3), (2, 5), "use linear"),
        ("conv_bn_relu", (2, 9, 3), (2, 9, 5), "use linear"),
        ("auto", (2, 3, 4, 4), (2, 5), "must be maps"),
        ("auto", (2, 9, 3), (2, 8, 5), "equal N"),
        ("linear", (2, 3, 4, 4), (2, 3, 4, 4), "for maps use conv"),
        ("linear", (2, 3), (2, 9, 5), "must be"),
        ("identity", (2, 3, 4, 4), (2, 5, 4, 4), "must be equal"),
    ],
)
def test_adapter_refuses(kind: str, student: tuple[int, ...], teacher: tuple[int, ...], why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        build_adapter(kind, student, teacher)
    assert str(student) in str(caught.value)
    assert str(teacher) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- terms


def outputs(*shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[Output, Output]:
    student = Output(normal(2, 5), {f"s{i}": normal(*s, grad=True) for i, (s, _) in enumerate(shapes)})
    teacher = Output(normal(2, 5), {f"t{i}": normal(*t) for i, (_, t) in enumerate(shapes)})
    return student, teacher


BATCH = batch_of(torch.tensor([1, 4]))


def test_ce_and_kd_terms_are_their_functions() -> None:
    student, teacher = outputs()
    ce = CrossEntropy(0.1)(student, Output(), BATCH)
    torch.testing.assert_close(ce, cross_entropy(student.logits, BATCH.targets, 0.1))
    kd = KnowledgeDistillation(2.0)(student, teacher, BATCH)
    torch.testing.assert_close(kd, kl_divergence(student.logits, teacher.logits, 2.0))


def test_hint_term_trains_its_adapters() -> None:
    student, teacher = outputs(((2, 3, 8, 8), (2, 5, 4, 4)), ((2, 7), (2, 9)))
    term = Hint(["s0", "s1"], ["t0", "t1"])
    term.prepare(Setup(student, teacher, BATCH))
    loss = term(student, teacher, BATCH)
    loss.backward()
    expected = sum(
        hint_loss(adapter(s), t) for adapter, (s, t) in zip(term.adapters, term.pairs(student, teacher), strict=True)
    )
    torch.testing.assert_close(loss, expected)
    assert all(p.grad is not None and p.dtype == torch.float64 for p in term.parameters())
    assert student.features["s0"].grad is not None


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_attention_term_sums_over_taps(variant: str) -> None:
    student, teacher = outputs(((2, 3, 8, 8), (2, 5, 8, 8)), ((2, 7, 4, 4), (2, 9, 2, 2)))
    expected = sum(attention_transfer(student.features[f"s{i}"], teacher.features[f"t{i}"], 3, variant) for i in (0, 1))
    for taps in ((None, None), (["s0", "s1"], ["t0", "t1"])):
        term = AttentionTransfer(*taps, p=3, variant=variant)
        term.prepare(Setup(student, teacher, BATCH))
        torch.testing.assert_close(term(student, teacher, BATCH), expected)


# ---------------------------------------------------------------------- sentences


@pytest.mark.parametrize("make", [Hint, AttentionTransfer])
@pytest.mark.parametrize(("s", "t"), [(["s0"], ["t0", "t1"]), ([], [])])
def test_unequal_taps_are_refused(make: type[Term], s: list[str], t: list[str]) -> None:
    student, teacher = outputs(((2, 3, 8, 8), (2, 5, 8, 8)), ((2, 7, 4, 4), (2, 9, 2, 2)))
    with pytest.raises(ValueError, match=r"both must name equally many taps, one or more$"):
        make(s, t).prepare(Setup(student, teacher, BATCH))


def test_attention_refuses_vectors_by_name() -> None:
    student, teacher = outputs(((2, 3, 8, 8), (2, 5, 8, 8)), ((2, 7), (2, 7)))
    for taps, sentence in {
        (
            "s1",
            "t0",
        ): r"^at cannot compare student tap s1 \(vector: 7\) with teacher tap t0 \(NCHW: 5 × 8 × 8\): tap",
        ("s0", "t1"): r"student tap s0 \(NCHW: 3 × 8 × 8\) with teacher tap t1 \(vector: 7\): tap maps",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            AttentionTransfer(["s0", taps[0]], ["t0", taps[1]]).prepare(Setup(student, teacher, BATCH))
    with pytest.raises(ValueError, match=r"^the teacher's feature has shape"):
        attention_transfer(normal(2, 3, 4, 4), normal(2, 3))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: CrossEntropy(1.5), "^label_smoothing = 1.5 is not allowed: it must be from 0 to 1$"),
        (
            lambda: Hint(adapter="mlp"),
            "^adapter = mlp is not allowed: it must be auto, conv_bn_relu, conv, linear or identity$",
        ),
        (lambda: Hint(variant="both"), "^variant = both is not allowed: it must be code, paper or unit$"),
        (lambda: AttentionTransfer(variant="both"), "^variant = both is not allowed: it must be code or paper$"),
        (lambda: AttentionTransfer(p=0.5), "^p = 0.5 is not allowed: it must be a finite number, 1 or more$"),
        (lambda: kl_divergence(normal(2, 3), normal(2, 1), 1.0), r"one shape: the student's is \(2, 3\), the teacher"),
        (lambda: hint_loss(normal(2, 3), normal(2, 1)), "features must have one shape"),
        (lambda: Hint(["s0"], ["t0"])(*outputs(((2, 3), (2, 3))), BATCH), "call prepare"),
        (
            lambda: Hint(["s9"], ["t0"]).prepare(Setup(*outputs(((2, 3), (2, 3))), BATCH)),
            "^student tap s9 was not recorded: there",
        ),
        (
            lambda: KnowledgeDistillation()(Output(), Output(), BATCH),
            "^there are no logits: the network gives none, or this term",
        ),
    ],
)
def test_errors_are_one_sentence(call, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- the house


def method_modules() -> list[str]:
    files = sorted(f for f in LOSSES.glob("*/*.py") if not f.stem.startswith("_"))
    return [f"kd.losses.{f.parent.name}.{f.stem}" for f in files]


def test_functional_is_every_pure_function_of_the_method_files() -> None:
    public = {
        name: function
        for module in map(importlib.import_module, method_modules())
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }
    assert len(public) >= 5
    assert functional.__all__ == dir(functional) == sorted(public)
    assert all(getattr(functional, name) is function for name, function in public.items())


def test_no_two_methods_have_one_name() -> None:
    files = [module.rpartition(".")[2] for module in method_modules()]
    assert len(set(files)) == len(files), sorted(files)
    names = [name for module in method_modules() for name in importlib.import_module(module).__all__]
    assert sorted(names) == functional.__all__


def test_student_comes_first() -> None:
    for name in functional.__all__:
        parameters = list(inspect.signature(getattr(functional, name)).parameters)
        students = [p for p in parameters if p.startswith("student")]
        assert parameters[: len(students)] == students, name
        assert "weight" not in parameters, name


@pytest.mark.parametrize("file", sorted((ROOT / "conf" / "loss").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_yaml_builds_and_shows_every_knob(file: Path) -> None:
    config = OmegaConf.load(file)
    assert list(config) == [file.stem]
    node = config[file.stem]
    assert node.pop("weight") >= 0
    assert node.pop("schedule") is None
    term = instantiate(node)
    assert isinstance(term, Term)
    defaults = {k: p.default for k, p in inspect.signature(type(term)).parameters.items()}
    shown = {k: v for k, v in OmegaConf.to_container(node).items() if k != "_target_"}
    assert shown == {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
