"""Logit methods: withheld labels, limits, second implementations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

from kd.losses import functional as f
from kd.losses.base import UNLABELLED, Batch, Output, Setup
from kd.losses.layouts import Layout
from kd.losses.logits.abkd import AlphaBeta
from kd.losses.logits.ctkd import CurriculumTemperature
from kd.losses.logits.dkd import DecoupledDistillation
from kd.losses.logits.dtd import DynamicTemperature
from kd.losses.logits.fkd import SoftLabels
from kd.losses.logits.mlkd import MultiLevel
from kd.losses.logits.normkd import NormalisedLogits
from kd.losses.logits.ofa import OneForAll
from kd.losses.logits.sdd import ScaledDecoupled
from kd.losses.logits.ttm import TransformedTeacher
from kd.losses.logits.uskd import SelfDistillation
from kd.losses.logits.wkd_logit import WassersteinLogits

Loss = Callable[..., Tensor]

OVER_ROWS: dict[str, Loss] = {
    "hard_label": f.hard_label_cross_entropy,
    "bkd": f.binary_distillation,
    "fkd": lambda s, t: f.soft_label_cross_entropy(s, f.top_k_labels(t.float().softmax(-1), 2)),
    "normkd": f.normalised_kl_divergence,
    "abkd": f.alpha_beta_divergence,
    "abkd, β = 0": lambda s, t: f.alpha_beta_divergence(s, t, alpha=1.0, beta=0.0),
    "abkd, α = 0": lambda s, t: f.alpha_beta_divergence(s, t, alpha=0.0, beta=0.5),
    "ttm": f.transformed_teacher_kl,
    "wttm": f.weighted_transformed_teacher_kl,
    "dist": f.correlation_loss,
    "ctkd": lambda s, t: f.adversarial_temperature_kl(s, t, torch.ones(1)),
    "mlkd": lambda s, t: f.multi_level_loss(s, s, t, t),
}
OVER_LABELLED: dict[str, Loss] = {
    "dkd": f.decoupled_kl_divergence,
    "nkd": f.normalised_cross_entropy,
    "wsld": f.weighted_soft_cross_entropy,
    "rld": f.refined_kl_divergence,
    "ofa": f.enhanced_target_cross_entropy,
    "uskd": f.customised_soft_labels,
}
WHOLE_BATCH = ("dist", "mlkd", "uskd")
PLAIN_MEANS = [name for name in (*OVER_ROWS, *OVER_LABELLED) if name not in WHOLE_BATCH]


def value(name: str, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    return OVER_ROWS[name](student, teacher) if name in OVER_ROWS else OVER_LABELLED[name](student, teacher, targets)


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(6, 5, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, torch.tensor([1, 0, 4, 2, 2, 3])


@pytest.mark.parametrize("name", [*OVER_ROWS, *OVER_LABELLED])
@pytest.mark.parametrize("student_logits", [torch.zeros(3, 4), torch.full((3, 4), 5.3)], ids=["zero", "constant"])
def test_a_student_that_begins_with_equal_logits(name: str, student_logits: Tensor) -> None:
    """Its spread is 0 but for rounding; no loss divides by it."""
    student = student_logits.clone().requires_grad_()
    torch.manual_seed(0)
    value(name, student, 3 * torch.randn(3, 4), torch.tensor([2, 1, 0])).backward()
    assert student.grad.abs().max() < 100


@pytest.mark.parametrize("name", PLAIN_MEANS)
def test_a_mean_over_rows(drawn, name: str) -> None:
    """Rows one by one, two classes, and no row at all."""
    rows = [value(name, *(z[i : i + 1] for z in drawn)) for i in range(6)]
    torch.testing.assert_close(value(name, *drawn), torch.stack(rows).mean())
    two = value(name, drawn[0][:, :2], drawn[1][:, :2], drawn[2].clamp(max=1))
    assert two.isfinite()
    none = value(name, *(z[:0] for z in drawn))
    none.backward()
    assert none.item() == 0


@pytest.mark.parametrize("name", [name for name in OVER_ROWS if name != "mlkd"])
def test_positions_are_rows(drawn, name: str) -> None:
    student, teacher, targets = drawn
    several = value(name, student.view(2, 3, 5), teacher.view(2, 3, 5), targets)
    torch.testing.assert_close(several, value(name, *drawn))


@pytest.mark.parametrize("name", OVER_LABELLED)
def test_rows_without_a_label_do_not_count(drawn, name: str) -> None:
    student, teacher, targets = drawn
    withheld = torch.where(torch.arange(6) % 2 == 0, targets, UNLABELLED)
    loss = value(name, student, teacher, withheld)
    torch.testing.assert_close(loss, value(name, student[::2], teacher[::2], targets[::2]))
    loss.backward()
    assert (student.grad[1::2] == 0).all()
    none = value(name, student, teacher, torch.full((6,), UNLABELLED))
    assert none.item() == 0
    with pytest.raises(ValueError, match=r"one label a row: set data\.mixup=0$"):
        value(name, student, teacher, torch.full((6, 5), 0.2))


@pytest.mark.parametrize("name", [*OVER_ROWS, *OVER_LABELLED])
def test_other_classes_are_refused(drawn, name: str) -> None:
    with pytest.raises(ValueError, match=r"must have one shape: the student's is \(6, 5\), the teacher's \(6, 4\)"):
        value(name, drawn[0], drawn[1][:, :4], drawn[2])


# ---------------------------------------------------------------------- second implementations


def test_decoupled_is_kd_with_the_teachers_share(drawn) -> None:
    """Eq. 5: β = 1 − p_t(y), row by row."""
    student, teacher, targets = drawn
    for i in range(6):
        beta = 1 - (teacher[i] / 4).softmax(-1)[targets[i]].item()
        row = f.decoupled_kl_divergence(student[[i]], teacher[[i]], targets[[i]], 4.0, 1.0, beta)
        torch.testing.assert_close(row, f.kl_divergence(student[[i]], teacher[[i]], 4.0))


def test_correlation_in_numpy(drawn) -> None:
    s, t = (softmax(z.detach().numpy() / 2, axis=1) for z in drawn[:2])
    rows = np.mean([np.corrcoef(s[i], t[i])[0, 1] for i in range(6)])
    classes = np.mean([np.corrcoef(s[:, c], t[:, c])[0, 1] for c in range(5)])
    expected = 0.5 * (1 - rows) + 3 * (1 - classes)
    ours = f.correlation_loss(drawn[0], drawn[1], 2.0, 0.5, 3.0, "paper")
    np.testing.assert_allclose(ours.item(), expected, rtol=1e-5)
    code = f.correlation_loss(drawn[0], drawn[1], 2.0, 0.5, 3.0)
    np.testing.assert_allclose(code.item(), 4 * ours.item(), rtol=1e-12)


def test_limits_of_the_alpha_beta_divergence(drawn) -> None:
    student, teacher, _ = drawn
    kl = f.kl_divergence(student, teacher, 2.0) / 4
    reverse = f.reverse_kl_divergence(student, teacher, 2.0) / 4
    torch.testing.assert_close(f.alpha_beta_divergence(student, teacher, 2.0, 1.0, 0.0), kl)
    torch.testing.assert_close(f.alpha_beta_divergence(student, teacher, 2.0, 0.0, 1.0), reverse)
    for limit, near in (((0.7, 0.0), (0.7, 1e-6)), ((0.0, 0.7), (1e-6, 0.7))):
        at, by = (f.alpha_beta_divergence(student, teacher, 2.0, *shares) for shares in (limit, near))
        torch.testing.assert_close(at, by, rtol=1e-4, atol=0)


def test_refined_leaves_out_what_the_teacher_prefers_to_the_label() -> None:
    student, teacher = torch.tensor([[1.0, 0.0, 2.0, -1.0]]), torch.tensor([[0.0, 3.0, -1.0, -2.0]])
    log_s, log_t = (log_softmax(z.numpy()[0, 2:]) for z in (student, teacher))  # label 0: classes 2 and 3 are below it
    expected = (np.exp(log_t) * (log_t - log_s)).sum()
    ours = f.refined_kl_divergence(student, teacher, torch.tensor([0]), 1.0, 0.0, 1.0)
    np.testing.assert_allclose(ours.item(), expected, rtol=1e-5)
    lowest = f.refined_kl_divergence(student, teacher, torch.tensor([3]), 1.0, 0.0, 1.0)
    assert lowest.item() == 0


def test_top_k_labels() -> None:
    p = torch.tensor([[0.5, 0.1, 0.3, 0.06, 0.04]])
    smoothed, renormalised = f.top_k_labels(p, 2), f.top_k_labels(p, 2, "renormalised")
    torch.testing.assert_close(smoothed, torch.tensor([[0.5, 0.2 / 3, 0.3, 0.2 / 3, 0.2 / 3]]))
    torch.testing.assert_close(renormalised, torch.tensor([[0.625, 0.0, 0.375, 0.0, 0.0]]))
    torch.testing.assert_close(f.top_k_labels(p, 9), p)
    torch.testing.assert_close(f.top_k_labels(p, 1, "renormalised"), torch.tensor([[1.0, 0, 0, 0, 0]]))


def test_soft_labels_have_the_gradient_of_kd(drawn) -> None:
    student, teacher, _ = drawn
    gradients = [
        torch.autograd.grad(loss, student)[0]
        for loss in (f.soft_label_cross_entropy(student, teacher.softmax(-1)), f.kl_divergence(student, teacher, 1.0))
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: DecoupledDistillation(beta=-1), "^beta = -1 is not allowed: it must be a finite number, 0 or more$"),
        (lambda: TransformedTeacher(0), "^gamma = 0 is not allowed: it must be a finite number above 0$"),
        (lambda: DynamicTemperature("x"), "^weights = x is not allowed: it must be flsw or cwsm$"),
        (lambda: DynamicTemperature(beta=-1), "^beta = -1 is not allowed: it must be a finite number, 0 or more$"),
        (lambda: NormalisedLogits(-2), "^factor = -2 is not allowed: it must be a finite number above 0$"),
        (lambda: AlphaBeta(alpha=0, beta=0), "^alpha = 0 is not allowed beside beta = 0: one of them must be above 0$"),
        (lambda: SoftLabels(0), "^k = 0 is not allowed: it must be a whole number, 1 or more$"),
        (lambda: SoftLabels(form="x"), "^form = x is not allowed: it must be smoothed or renormalised$"),
    ],
)
def test_settings_that_mean_nothing(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_mass_is_moved_to_the_closest_classes(drawn) -> None:
    """The plan costs what the best one does, and at most λ times its entropy more, beside the label's part."""
    student, teacher, targets = drawn
    positions = torch.tensor([0.0, 0.1, 0.5, 0.7, 1.0], dtype=torch.float64)
    cost = (positions[:, None] - positions).abs()
    expected = []
    for s, t, y in zip(student.detach(), teacher, targets.tolist(), strict=True):
        others = [c for c in range(5) if c != y]
        p, q = (softmax(z[others].numpy() / 2) for z in (t, s))
        expected.append(wasserstein_distance(positions[others], positions[others], p, q))
    of_label = f.wasserstein_logit_loss(student, teacher, targets, cost, gamma=0.0)
    found = f.wasserstein_logit_loss(student, teacher, targets, cost, 2.0, 1.0, 1 / 12, 1000) - of_label
    assert 0.99 * np.mean(expected) < found.item() < np.mean(expected) + np.log(4 * 4) / 12


def test_wkd_logit_needs_a_linear_classifier_of_these_classes(drawn) -> None:
    outputs, batch = (Output(drawn[0]), Output(drawn[1])), Batch(torch.zeros(6, 1))
    networks = {"teacher": nn.Sequential(nn.Linear(3, 4))}
    with pytest.raises(
        ValueError, match=r"^wkd_logit needs a teacher with one linear layer of 5 classes: 0 is a Linear"
    ):
        WassersteinLogits().prepare(Setup(*outputs, batch, networks))
    with pytest.raises(
        ValueError, match=r"^wkd_logit needs the teacher's classifier: there must be one teacher network$"
    ):
        WassersteinLogits().prepare(Setup(*outputs, batch))


# ---------------------------------------------------------------------- heads on stages


def test_heads_of_maps_tokens_and_vectors() -> None:
    """They are trained, and the sum is that over the logits of all; halved until the smallest map."""
    torch.manual_seed(0)
    features = {
        "a": torch.randn(4, 3, 8, 8),
        "b": torch.randn(4, 5, 3, 3),
        "c": torch.randn(4, 7, 6),
        "d": torch.randn(4, 9),
    }
    student = Output(torch.randn(4, 5), {name: feature.requires_grad_() for name, feature in features.items()})
    teacher, batch = Output(torch.randn(4, 5)), Batch(torch.zeros(4, 1), torch.tensor([1, 0, UNLABELLED, 3]))
    term = OneForAll(list(features), eps=1.5)
    tokens = {"student": {"c": Layout("tokens", 1)}}
    term.prepare(Setup(student, teacher, batch, layouts=tokens))
    assert [sum(isinstance(m, nn.BatchNorm2d) for m in head.modules()) for head in term.heads] == [2, 0, 0, 0]
    assert term.over == "batch"
    loss = term(student, teacher, batch)
    several = [student.logits, *(head(f_) for head, f_ in zip(term.heads, features.values(), strict=True))]
    expected = [f.enhanced_target_cross_entropy(z, teacher.logits, batch.targets, eps=1.5) for z in several]
    torch.testing.assert_close(loss, torch.stack(expected).sum())
    prefix = features["c"].detach().clone()
    prefix[:, 0] = 9.0  # the class token takes no part
    torch.testing.assert_close(term.heads[2](prefix), several[3])
    loss.backward()
    assert all(parameter.grad is not None for parameter in term.parameters())
    assert all(feature.grad.abs().sum() > 0 for feature in features.values())


def test_a_head_needs_to_know_the_layout() -> None:
    student = Output(torch.zeros(2, 3), {"a": torch.zeros(2, 4, 5, 6, 7)})
    with pytest.raises(ValueError, match=r"^ofa cannot put a class head on student tap a \(unknown layout: 4 × 5"):
        OneForAll(["a"]).prepare(Setup(student, Output(torch.zeros(2, 3)), Batch(torch.zeros(2, 1))))


def test_enhanced_targets_in_numpy(drawn) -> None:
    student, teacher, targets = drawn
    log_s, p = log_softmax(student.detach().numpy() / 2, axis=1), softmax(teacher.numpy() / 2, axis=1)
    one_hot = np.eye(5)[targets.numpy()]
    expected = -(((p + one_hot) ** 1.3 - one_hot) * log_s).sum(1).mean()
    ours = f.enhanced_target_cross_entropy(student, teacher, targets, 2.0, 1.3)
    np.testing.assert_allclose(ours.item(), expected, rtol=1e-10)


# ---------------------------------------------------------------------- a temperature for each row


@pytest.mark.parametrize("weights", ["flsw", "cwsm"])
def test_a_temperature_for_each_row(drawn, weights: str) -> None:
    """Each row by itself, at the temperature that it has among all; by β = 0 all are those of kd."""
    student, teacher, targets = drawn
    found = f.flsw_temperatures(student, teacher, 4.0) if weights == "flsw" else f.cwsm_temperatures(student, 4.0)
    assert found.mean().item() == pytest.approx(4)
    assert not found.requires_grad
    rows = [f.kl_divergence(student[[i]], teacher[[i]], found[i].item()) for i in range(6)]
    outputs, batch = (Output(student), Output(teacher)), Batch(torch.zeros(6, 1), targets)
    torch.testing.assert_close(DynamicTemperature(weights)(*outputs, batch), torch.stack(rows).mean())
    plain = DynamicTemperature(weights, beta=0.0)(*outputs, batch)
    torch.testing.assert_close(plain, f.kl_divergence(student, teacher, 4.0))
    off = (
        (1 - nn.functional.cosine_similarity(student, teacher)) if weights == "flsw" else -student.softmax(-1).amax(-1)
    )
    assert torch.equal(found.argsort(), off.argsort(descending=True))  # the furthest has the lowest one


@pytest.mark.parametrize("weights", ["flsw", "cwsm"])
def test_a_temperature_of_a_row_stays_above_zero(drawn, weights: str) -> None:
    student, teacher, targets = drawn
    assert f.cwsm_temperatures(student, 4.0, 50.0).min() < 0
    value = DynamicTemperature(weights, beta=50.0)(Output(student), Output(teacher), Batch(torch.zeros(6, 1), targets))
    value.backward()
    assert value > 0
    assert student.grad.isfinite().all()


def test_the_label_gets_the_teachers_largest_logit() -> None:
    teacher = torch.tensor([[1.0, 3.0, 2.0], [0.0, 5.0, 4.0], [7.0, 6.0, 8.0]])
    targets = torch.tensor([0, UNLABELLED, 2])
    before = teacher.clone()
    shifted = f.probability_shift(teacher, targets)
    assert shifted.tolist() == [[3, 1, 2], [0, 5, 4], [7, 6, 8]]
    assert torch.equal(teacher, before)
    with pytest.raises(ValueError, match=r"one label a row: set data\.mixup=0$"):
        f.probability_shift(teacher, torch.full((3, 3), 1 / 3))
    student, batch = torch.randn(3, 3), Batch(torch.zeros(3, 1), targets)
    term = DynamicTemperature(beta=0.0, shift=True)
    assert term.needs_labels
    value = term(Output(student), Output(teacher), batch)
    torch.testing.assert_close(value, f.kl_divergence(student, shifted, 4.0))


# ---------------------------------------------------------------------- a temperature that is trained


def test_the_temperature_is_trained_against_the_student(drawn) -> None:
    student, teacher, _ = drawn
    theta = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    loss = f.adversarial_temperature_kl(student, teacher, theta, grl_lambda=-0.5)
    t = 1 + 20 * theta.detach().sigmoid()
    torch.testing.assert_close(loss, f.kl_divergence(student, teacher, t.item()))
    (gradient,) = torch.autograd.grad(loss, theta)
    near = [f.kl_divergence(student, teacher, float(1 + 20 * (theta.detach() + e).sigmoid())) for e in (1e-4, -1e-4)]
    np.testing.assert_allclose(gradient.item(), -0.5 * (near[0] - near[1]).item() / 2e-4, rtol=1e-6)


def test_the_curriculum_of_the_temperature(drawn) -> None:
    """λ goes from 0 to −1 over the first 10 of 40 epochs."""
    term, outputs = CurriculumTemperature(), (Output(drawn[0]), Output(drawn[1]))
    term.prepare(Setup(*outputs, Batch(torch.zeros(6, 1)), epochs=40))
    found = []
    for epoch in (0, 2.5, 5, 10, 40):
        term.progress = epoch / 40
        found.append(term.grl_lambda)
    np.testing.assert_allclose(found, [0, -(1 - np.sqrt(0.5)) / 2, -0.5, -1, -1], atol=1e-12)
    term(*outputs, Batch(torch.zeros(6, 1))).backward()
    assert term.temperature_param.grad.abs() > 0


# ---------------------------------------------------------------------- views and ranks


def test_levels_of_one_view_and_of_two(drawn) -> None:
    student, teacher, _ = drawn
    strong = [z.flip(0) for z in (student, teacher)]
    sides = [Output(z, views={"strong": Output(s)}) for z, s in zip((student, teacher), strong, strict=True)]
    batch = Batch(torch.zeros(6, 1))
    for variant in ("code", "paper"):
        two = MultiLevel(view="strong", variant=variant)
        assert two.needs_views == ("strong",)
        expected = f.multi_level_loss(student, strong[0], teacher, strong[1], variant=variant)
        torch.testing.assert_close(two(*sides, batch), expected)
        one = f.multi_level_loss(student, student, teacher, teacher, variant=variant)
        torch.testing.assert_close(MultiLevel(variant=variant)(*sides, batch), one)
        equal = f.multi_level_loss(teacher, teacher, teacher, teacher, variant=variant)
        assert abs(equal.item()) < 1e-12


def test_customised_labels_by_hand() -> None:
    """Two rows; the mean of p_y² is that of the labelled ones, and ranks are by the sum of both networks."""
    student, weak = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]]), torch.tensor([[0.0, 1.0, 5.0], [0.0, 0.0, 0.0]])
    targets = torch.tensor([0, UNLABELLED])
    log_p, log_w = log_softmax(student[0].numpy()), log_softmax(weak[0].numpy())
    others = log_softmax(student[0, 1:].numpy())
    smoothed = -(np.array([0.9, 0, 0]) + 0.1 / 3) @ log_w
    for variant, ranks in (("code", [3, 1]), ("paper", [3, 2])):  # of classes 1 and 2; the label has the other one
        zipf = 1 / np.array(ranks) / sum(1 / rank for rank in ranks)
        expected = -log_p[0] - 0.5 * zipf @ others + 0.2 * smoothed
        ours = f.customised_soft_labels(student, weak, targets, 1.0, 0.5, 0.2, variant)
        np.testing.assert_allclose(ours.item(), expected, rtol=1e-5, err_msg=variant)


def test_a_student_without_a_teacher_trains_its_weak_head() -> None:
    torch.manual_seed(0)
    student = Output(torch.randn(4, 5), {"a": torch.randn(4, 3, 4, 4, requires_grad=True)})
    batch, term = Batch(torch.zeros(4, 1), torch.tensor([1, 0, UNLABELLED, 3])), SelfDistillation(["a"])
    term.prepare(Setup(student, Output(), batch))
    weak = term.head(student.features["a"])
    loss = term(student, Output(), batch)
    torch.testing.assert_close(loss, f.customised_soft_labels(student.logits, weak, batch.targets))
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in term.parameters())


# ---------------------------------------------------------------------- regions


def test_complementary_regions_count_twice() -> None:
    """Row by row: w is 2 where the teacher is right in the region and wrong on the whole image, or the reverse."""
    torch.manual_seed(0)
    student, teacher = (2 * torch.randn(5, 4, 3, dtype=torch.float64) for _ in range(2))
    targets = torch.tensor([1, 0, UNLABELLED, 3, 2])
    loss = ScaledDecoupled(base="dkd").of_region
    expected, weights = 0.0, []
    for i in (0, 1, 3, 4):
        right = teacher[i].argmax(0) == targets[i]
        for m in range(3):
            weights.append(2 if right[m] != right[0] else 1)
            expected += weights[-1] * loss(student[[i], :, m], teacher[[i], :, m], targets[[i]]).item() / 12
    assert set(weights) == {1, 2}
    ours = f.scaled_decoupled_loss(student, teacher, targets, loss)
    np.testing.assert_allclose(ours.item(), expected, rtol=1e-12)


@pytest.mark.parametrize("base", ["kd", "dkd", "nkd"])
def test_the_first_region_is_the_whole_image(base: str) -> None:
    """With one region the loss is that of the logits; the student's own classifier is trained, the teacher's is not."""
    torch.manual_seed(0)
    networks = {"student": nn.Sequential(nn.Linear(3, 4)), "teacher": nn.Sequential(nn.Linear(6, 4))}
    maps = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 6, 2, 2)
    outputs = [Output(None, {"a": feature}) for feature in maps]
    batch, term = Batch(torch.zeros(2, 1), torch.tensor([1, 3])), ScaledDecoupled(["a"], ["a"], base, [1], 2.0)
    term.prepare(Setup(*outputs, batch, networks))
    loss = term(*outputs, batch)
    logits = [networks[side](feature.mean((2, 3))) for side, feature in zip(networks, maps, strict=True)]
    expected = {
        "kd": lambda: f.kl_divergence(*logits, 2.0),
        "dkd": lambda: f.decoupled_kl_divergence(*logits, batch.targets, 2.0),
        "nkd": lambda: f.normalised_cross_entropy(*logits, batch.targets, 2.0),
    }[base]()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert networks["student"][0].weight.grad.abs().sum() > 0
    assert networks["teacher"][0].weight.grad is None
    assert not next(term.parameters()).requires_grad
    regions = f.region_logits(torch.arange(16.0).view(1, 1, 4, 4), (1, 2))
    assert regions.flatten().tolist() == [7.5, 2.5, 4.5, 10.5, 12.5]
    with pytest.raises(ValueError, match=r"^grids = \[2, 4\] is not allowed: the first one is 1"):
        ScaledDecoupled(grids=[2, 4])
