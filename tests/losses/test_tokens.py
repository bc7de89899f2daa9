"""Methods for tokens: the divergences' ends and bounds, a teacher of k known classes, two tokenizers, sampled text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from kd.losses import functional as f
from kd.losses.base import UNLABELLED, Batch, Output, Setup, Term, TopK
from kd.losses.tokens._topk import soften_topk
from kd.losses.tokens.gold import Gold
from kd.losses.tokens.hinge_ranking import HingeRanking
from kd.losses.tokens.minillm import MiniLLM
from kd.losses.tokens.topk_kl import TopKKL
from kd.losses.tokens.uld import UniversalLogit

CONF = Path(__file__).parents[2] / "conf" / "loss"
ROWS, CLASSES = 7, 11
DIVERGENCES = {
    "rkl": f.reverse_kl_divergence,
    "symmetric_kl": f.symmetric_kl_divergence,
    "jsd": f.generalised_js_divergence,
    "skl": f.skewed_kl_divergence,
    "srkl": f.skewed_reverse_kl_divergence,
    "tvd": f.total_variation,
    "akl": f.adaptive_kl_divergence,
}
FORMS = ("tail", "renormalised", "zero")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def normal(*shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def two() -> tuple[Tensor, Tensor]:
    return normal(ROWS, CLASSES).requires_grad_(), normal(ROWS, CLASSES)


def topk_of(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    return tuple((logits / temperature).log_softmax(-1).topk(k, dim=-1))


def logit_terms() -> dict[str, Any]:
    """The terms of ``conf/loss`` that read logits alone, with their settings."""
    found = {}
    for file in sorted(CONF.glob("*.yaml")):
        (node,) = OmegaConf.to_container(OmegaConf.load(file)).values()
        settings = {key: value for key, value in node.items() if key not in ("weight", "schedule")}
        term = instantiate(settings)
        taps = [t is None or len(t) for t in (term.student_taps, term.teacher_taps)]
        if not any(taps) and not term.needs_views and not term.needs_input_gradient:
            found[file.stem] = settings
    return found


# ---------------------------------------------------------------------- rows of tokens


@pytest.mark.parametrize("name", logit_terms())
def test_a_term_of_the_logits_takes_rows_of_tokens(name: str) -> None:
    """Selected before the projection, in batches of sentences that have fewer samples than rows."""
    hidden, width = normal(ROWS, 4).requires_grad_(), 4
    student, teacher = nn.Linear(width, CLASSES).double(), normal(ROWS, CLASSES)
    inputs = {"input_ids": torch.ones(2, 6, dtype=torch.int64), "attention_mask": torch.ones(2, 6)}
    targets = torch.randint(CLASSES, (ROWS,))
    batch = Batch(inputs, targets, torch.arange(2), torch.ones(2, 6, dtype=torch.bool))
    term = instantiate(logit_terms()[name])
    settings = {"train_index": torch.arange(2), "train_targets": targets, "classes": CLASSES}
    networks = {"teacher": nn.Sequential(nn.Linear(width, CLASSES))}
    term.prepare(Setup(Output(student(hidden)), Output(teacher), batch, networks, **settings))
    torch.manual_seed(1)
    value = term(Output(hidden=hidden, head=student), Output(teacher), batch)
    value.backward()
    assert value.ndim == 0
    assert value > 0
    assert value.isfinite()
    assert (hidden.grad.abs().sum(-1) > 0).any()
    if term.over in ("rows", "labelled") and name != "dkpp":  # a plain mean: twice the rows are the same mean
        again = Batch(inputs, targets.repeat(2), torch.arange(2))
        double = term(Output(student(hidden).repeat(2, 1)), Output(teacher.repeat(2, 1)), again)
        torch.testing.assert_close(double, value)


@pytest.mark.parametrize("name", ["ce", "mft"])
def test_rows_without_a_label_count_nowhere(name: str) -> None:
    student, teacher = two()
    targets = torch.tensor([1, UNLABELLED, 3, 0, UNLABELLED, 2, 5])
    kept = targets != UNLABELLED
    term = instantiate(logit_terms()[name])

    def of(rows: Tensor | slice) -> Tensor:
        return term(Output(student[rows]), Output(teacher[rows]), Batch(torch.empty(2), targets[rows]))

    value = of(slice(None))
    value.backward()
    torch.testing.assert_close(value, of(kept))
    assert (student.grad[~kept] == 0).all()
    assert (student.grad[kept].abs().sum(-1) > 0).all()
    assert of(~kept) == 0


# ---------------------------------------------------------------------- divergences


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equal_logits_lose_nothing(name: str, temperature: float) -> None:
    logits = normal(ROWS, CLASSES).requires_grad_()
    value = DIVERGENCES[name](logits, logits.detach().clone(), temperature)
    value.backward()
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-14)
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-14)
    assert DIVERGENCES[name](normal(0, CLASSES), normal(0, CLASSES), temperature) == 0


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_positive_and_its_gradient_that_of_differences(name: str) -> None:
    student, teacher = normal(3, 5).requires_grad_(), normal(3, 5)
    assert DIVERGENCES[name](student, teacher, 2.0) > 0
    if name != "akl":  # its weights move with the student, and have no gradient
        assert torch.autograd.gradcheck(lambda z: DIVERGENCES[name](z, teacher, 2.0), student)


def test_ends_of_the_js_divergence() -> None:
    """Forward and reverse KL by definition; beside the ends the formula is β times these."""
    student, teacher = two()
    forward, reverse = f.kl_divergence(student, teacher, 2.0), f.reverse_kl_divergence(student, teacher, 2.0)
    torch.testing.assert_close(f.generalised_js_divergence(student, teacher, 2.0, 0.0), forward)
    torch.testing.assert_close(f.generalised_js_divergence(student, teacher, 2.0, 1.0), reverse)
    for beta, expected in ((1e-6, forward), (1 - 1e-6, reverse)):
        near = f.generalised_js_divergence(student, teacher, 2.0, beta) / (beta * (1 - beta))
        torch.testing.assert_close(near, expected, rtol=1e-4, atol=0)


def test_js_divergence_is_symmetric_and_bounded() -> None:
    student, teacher = (normal(ROWS, CLASSES, scale=50) for _ in range(2))
    value = f.generalised_js_divergence(student, teacher, 1.0, 0.3)
    torch.testing.assert_close(value, f.generalised_js_divergence(teacher, student, 1.0, 0.7))
    assert f.generalised_js_divergence(student, teacher, 1.0, 0.5) <= np.log(2)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.7])
def test_skewed_divergences_in_numpy(alpha: float) -> None:
    student, teacher = two()
    q, p = student.detach().softmax(-1).numpy(), teacher.softmax(-1).numpy()
    forward = (p * np.log(p / (alpha * p + (1 - alpha) * q))).sum(1).mean()
    reverse = (q * np.log(q / ((1 - alpha) * p + alpha * q))).sum(1).mean()
    assert f.skewed_kl_divergence(student, teacher, 1.0, alpha).item() == pytest.approx(forward, rel=1e-10)
    assert f.skewed_reverse_kl_divergence(student, teacher, 1.0, alpha).item() == pytest.approx(reverse, rel=1e-10)
    if alpha:
        far = normal(ROWS, CLASSES, scale=1e3), normal(ROWS, CLASSES, scale=1e3)
        for skewed in (f.skewed_kl_divergence, f.skewed_reverse_kl_divergence):
            assert skewed(*far, 1.0, alpha) <= -np.log(alpha) + 1e-9


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_symmetric_kl_is_the_sum_of_both(share: float) -> None:
    both = two()
    expected = (1 - share) * f.kl_divergence(*both, 2.0) + share * f.reverse_kl_divergence(*both, 2.0)
    torch.testing.assert_close(f.symmetric_kl_divergence(*both, 2.0, share), expected)


def test_adaptive_kl_weighs_by_the_place_of_the_gap() -> None:
    """A student that is off in the head alone is taught by the forward KL, one off in the tail by the reverse KL."""
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    off_in_head = torch.tensor([[0.3, 0.4, 0.2, 0.1]], dtype=torch.float64).log()
    off_in_tail = torch.tensor([[0.4, 0.3, 0.1, 0.2]], dtype=torch.float64).log()
    for student, kl in ((off_in_head, f.kl_divergence), (off_in_tail, f.reverse_kl_divergence)):
        torch.testing.assert_close(f.adaptive_kl_divergence(student, p.log(), 1.0, 0.7), kl(student, p.log(), 1.0))


def test_the_corrected_teacher() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.95, 0.03, 0.02]], dtype=torch.float64)
    corrected = f.corrected_teacher(p, torch.tensor([1, 0, 0]), 0.1)
    torch.testing.assert_close(corrected.sum(-1), torch.ones(3, dtype=torch.float64))
    assert (corrected[0, 1] - corrected[0, 0]).item() == pytest.approx(0.1, abs=1e-6)
    assert corrected[1, 0].item() == pytest.approx(0.6, abs=1e-6)
    assert corrected[2, 0].item() == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(corrected[:2, 2] / corrected[[0, 1], [0, 1]], p[:2, 2] / p[[0, 1], [0, 1]])


# ---------------------------------------------------------------------- a teacher of k known classes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_classes_are_the_full_kl(form: str, temperature: float) -> None:
    student, teacher = two()
    full = f.kl_divergence(student, teacher, temperature)
    log_probs, ids = topk_of(teacher, CLASSES, temperature)
    torch.testing.assert_close(f.topk_kl_divergence(student, log_probs, ids, temperature, form), full)
    (expected,) = torch.autograd.grad(full, student)
    (found,) = torch.autograd.grad(f.topk_kl_divergence(student, log_probs, ids, temperature, form), student)
    torch.testing.assert_close(found, expected)


def test_the_tail_is_a_lower_bound_that_grows_with_k() -> None:
    student, teacher = two()
    values = [f.topk_kl_divergence(student, *topk_of(teacher, k), 1.0, "tail").item() for k in range(1, CLASSES + 1)]
    assert (np.diff(values) > -1e-12).all()
    assert values[0] > 0
    assert values[-1] == pytest.approx(f.kl_divergence(student, teacher, 1.0).item())


@pytest.mark.parametrize(("form", "shift"), [("tail", True), ("renormalised", False), ("zero", True)])
def test_the_mass_outside_is_learned_or_not(form: str, shift: bool) -> None:
    """Adding a constant to the logits of the k classes moves mass into them, and changes no ratio among them."""
    _, teacher = two()
    log_probs, ids = topk_of(teacher, 4)
    moved = teacher.scatter_add(-1, ids, torch.full_like(log_probs, 0.5))
    values = [f.topk_kl_divergence(z, log_probs, ids, 1.0, form) for z in (teacher, moved)]
    assert (abs(values[0] - values[1]) > 1e-3) == shift
    assert (values[0].abs() < 1e-12) == (form != "zero")
    buckets = f.topk_buckets(teacher, log_probs, ids, 1.0, form)
    for side in buckets:
        torch.testing.assert_close(side.exp().sum(-1), torch.ones(ROWS, dtype=torch.float64))


def test_any_loss_of_the_logits_takes_the_buckets() -> None:
    student, teacher = two()
    buckets = f.topk_buckets(student, *topk_of(teacher, CLASSES))
    for divergence in DIVERGENCES.values():
        torch.testing.assert_close(divergence(*buckets), divergence(student, teacher))


def test_a_stored_topk_is_what_the_dense_logits_give() -> None:
    student, teacher = two()
    log_probs, ids = topk_of(teacher, 6)
    shuffled = torch.randperm(6)
    stored = Output(topk=TopK(ids[:, shuffled], log_probs[:, shuffled], CLASSES))
    batch = Batch(torch.empty(2))
    for term in (TopKKL(4), HingeRanking(4)):
        torch.testing.assert_close(term(Output(student), stored, batch), term(Output(student), Output(teacher), batch))
    whole = Output(topk=TopK(*reversed(topk_of(teacher, CLASSES)), CLASSES))
    term = TopKKL(100, temperature=3.0)
    expected = f.kl_divergence(student, teacher, 3.0)
    torch.testing.assert_close(term(Output(student), whole, batch), expected)
    torch.testing.assert_close(term(Output(student), Output(teacher), batch), expected)


def test_softening_afterwards_takes_the_rest_for_one_class() -> None:
    log_probs = torch.tensor([[0.5, 0.3]], dtype=torch.float64).log()
    weights = np.sqrt([0.5, 0.3, 0.2])
    np.testing.assert_allclose(soften_topk(log_probs, 2.0).exp()[0], weights[:2] / weights.sum(), rtol=1e-12)
    torch.testing.assert_close(soften_topk(log_probs, 1.0), log_probs)


def test_ranking_in_numpy() -> None:
    student, teacher = two()
    log_probs, ids = topk_of(teacher, 3)
    z, q, p = student.detach().numpy(), student.detach().softmax(-1).numpy(), teacher.softmax(-1).numpy()
    hinge, fixed, logistic = [], [], []
    for row, chosen in enumerate(ids.tolist()):
        for place, a in enumerate(chosen):
            for b in chosen[place + 1 :]:
                hinge.append(max(0, p[row, a] - p[row, b] - q[row, a] + q[row, b]))
                fixed.append(max(0, 0.2 - q[row, a] + q[row, b]))
                logistic.append(np.log1p(np.exp(z[row, b] - z[row, a])))
    assert f.hinge_ranking(student, log_probs, ids).item() == pytest.approx(np.mean(hinge))
    assert f.hinge_ranking(student, log_probs, ids, 0.2).item() == pytest.approx(np.mean(fixed))
    assert f.logistic_ranking(student, log_probs, ids).item() == pytest.approx(np.mean(logistic))
    assert f.hinge_ranking(teacher, log_probs, ids).abs() < 1e-12
    even = torch.full_like(log_probs, np.log(0.1))
    assert f.logistic_ranking(student, even, ids) == 0  # nothing is in order


# ---------------------------------------------------------------------- two tokenizers


def test_permuted_vocabularies_lose_nothing() -> None:
    """Sorted probabilities do not know which is which; a larger vocabulary whose rest has no mass is no other."""
    teacher, lengths = normal(ROWS, CLASSES), torch.tensor([3, 0, 4])
    permuted = teacher[:, torch.randperm(CLASSES)].requires_grad_()
    wider = torch.cat([permuted, torch.full((ROWS, 5), -1e4, dtype=torch.float64)], 1)
    for student in (permuted, wider):
        value = f.uld_loss(student, lengths, teacher, lengths)
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    assert f.uld_loss(normal(ROWS, CLASSES), lengths, teacher, lengths) > 0.01


def test_uld_in_numpy() -> None:
    student, teacher = normal(5, 6), normal(6, 9)
    student_lengths, teacher_lengths = torch.tensor([3, 2]), torch.tensor([2, 4])
    q, p = (-np.sort(-z.softmax(-1).numpy()) for z in (student, teacher))
    q = np.pad(q, ((0, 0), (0, 3)))
    pairs = [[(0, 0), (1, 1)], [(3, 2), (4, 3)]]
    expected = np.mean([np.mean([np.abs(q[s] - p[t]).sum() for s, t in sample]) for sample in pairs])
    assert f.uld_loss(student, student_lengths, teacher, teacher_lengths).item() == pytest.approx(expected)


def test_the_mean_over_samples_is_that_of_its_parts() -> None:
    """What several processes rely on: each part counts by its samples, whatever its rows are."""
    student, teacher = normal(9, 6), normal(12, 8)
    own, other = torch.tensor([3, 2, 4]), torch.tensor([2, 4, 6])
    whole = f.uld_loss(student, own, teacher, other)
    parts = [f.uld_loss(student[:3], own[:1], teacher[:2], other[:1])]
    parts.append(f.uld_loss(student[3:], own[1:], teacher[2:], other[1:]))
    torch.testing.assert_close((parts[0] + 2 * parts[1]) / 3, whole)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_samples_without_a_row_count_nowhere(where: int) -> None:
    student, teacher = normal(5, 6).requires_grad_(), normal(6, 9)
    lengths = {"student": [3, 2], "teacher": [2, 4]}
    own, other = (torch.tensor([*of[:where], 0, *of[where:]]) for of in lengths.values())
    without = f.uld_loss(student, torch.tensor([3, 2]), teacher, torch.tensor([2, 4]))
    torch.testing.assert_close(f.uld_loss(student, own, teacher, other), without)
    nothing = f.uld_loss(student, torch.tensor([5, 0]), teacher, torch.tensor([0, 6]))
    nothing.backward()
    assert nothing == 0
    assert (student.grad == 0).all()


def test_groups_end_where_both_tokenizations_do() -> None:
    student, teacher = torch.tensor([3, 5, 9, 10, 12]), torch.tensor([3, 4, 5, 9, 11, 13])
    groups = f.same_bytes(student, teacher)
    assert [group.tolist() for group in groups] == [[0, 1, 2, 3, 3], [0, 1, 1, 2, 3, 3]]


@pytest.mark.parametrize(("merge", "base", "scalar"), [("last", 2, 1), ("first", 1, 2)])
def test_probabilities_of_a_group(merge: str, base: int, scalar: int) -> None:
    log_probs, ids = normal(4, 5).log_softmax(-1), torch.tensor([0, 1, 2, 3])
    merged = f.merge_groups(log_probs, ids, torch.tensor([0, 4, 4, 5]), merge)
    torch.testing.assert_close(merged[[0, 2]], log_probs[[0, 3]])
    torch.testing.assert_close(merged[1].exp(), log_probs[base].exp() * log_probs[scalar, ids[scalar]].exp())


def sides(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """One sample of 4 and one of 3 rows, of which the bytes end alike."""
    ends, ids = torch.tensor([2, 3, 5, 8, 1, 4, 6]), torch.arange(7)
    extra = {"lengths": torch.tensor([4, 3]), "ids": ids, "ends": ends}
    found = {f"{side}_{name}": value for side in ("student", "teacher") for name, value in extra.items()}
    return {**found, "student_logits": student, "teacher_logits": teacher}


def test_gold_with_one_tokenizer_is_uld_and_its_hybrid_a_js_divergence() -> None:
    student, teacher = two()
    known = sides(student, teacher)
    lengths = torch.tensor([4, 3])
    torch.testing.assert_close(f.gold_loss(**known), f.uld_loss(student, lengths, teacher, lengths))
    every = torch.arange(CLASSES)
    hybrid = f.gold_hybrid_loss(**known, student_matched=every, teacher_matched=every, beta=0.3)
    parts = [f.generalised_js_divergence(student[rows], teacher[rows], 1.0, 0.3) for rows in (slice(4), slice(4, 7))]
    torch.testing.assert_close(hybrid, torch.stack(parts).mean(), rtol=1e-4, atol=0)  # the floor is 1e-8
    nothing = every[:0]
    torch.testing.assert_close(
        f.gold_hybrid_loss(**known, student_matched=nothing, teacher_matched=nothing), f.gold_loss(**known)
    )


def test_terms_of_two_tokenizers_read_the_batch() -> None:
    student, teacher = normal(5, 6).requires_grad_(), normal(6, 9)
    extra = {
        "student_lengths": torch.tensor([3, 2]),
        "teacher_lengths": torch.tensor([2, 4]),
        "student_ids": torch.tensor([0, 1, 2, 3, 4]),
        "teacher_ids": torch.tensor([0, 1, 2, 3, 4, 5]),
        "student_ends": torch.tensor([1, 3, 4, 2, 6]),
        "teacher_ends": torch.tensor([3, 4, 1, 2, 5, 6]),
    }
    batch = Batch(torch.empty(2), extra=extra)
    both = Output(student), Output(teacher)
    terms: list[tuple[Term, Tensor]] = [
        (UniversalLogit(), f.uld_loss(student, extra["student_lengths"], teacher, extra["teacher_lengths"])),
        (Gold(), f.gold_loss(student_logits=student, teacher_logits=teacher, **extra)),
    ]
    for term, expected in terms:
        term.prepare(Setup(*both, batch))
        assert term.over == "samples"
        torch.testing.assert_close(term(*both, batch), expected)
    matched = {"student_matched": torch.tensor([0, 2]), "teacher_matched": torch.tensor([1, 0])}
    hybrid = Gold(beta=0.5, matched_share=0.4)(*both, Batch(torch.empty(2), extra={**extra, **matched}))
    settings = {"beta": 0.5, "matched_share": 0.4}
    expected = f.gold_hybrid_loss(student_logits=student, teacher_logits=teacher, **extra, **matched, **settings)
    torch.testing.assert_close(hybrid, expected)
    with pytest.raises(ValueError, match=r"^the student has 5 rows and the teacher 6: .*extra\['student_lengths'\]"):
        UniversalLogit()(*both, Batch(torch.empty(2)))
    short = {**extra, "teacher_lengths": torch.tensor([2, 3])}
    with pytest.raises(ValueError, match=r"^teacher_lengths add up to 5, but the teacher has 6 rows$"):
        UniversalLogit()(*both, Batch(torch.empty(2), extra=short))
    lacking = {key: value for key, value in extra.items() if key != "teacher_ends"}
    with pytest.raises(ValueError, match=r"^gold needs extra\['teacher_ids'\] and extra\['teacher_ends'\]"):
        Gold()(*both, Batch(torch.empty(2), extra=lacking))


# ---------------------------------------------------------------------- sampled text


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_returns_in_numpy(gamma: float) -> None:
    rewards = normal(2, 5)
    expected = np.zeros((2, 5))
    for t in range(5):
        for k in range(t, 5):
            expected[:, t] += gamma ** (k - t) * rewards[:, k].numpy()
    np.testing.assert_allclose(f.discounted_returns(rewards, gamma), expected, rtol=1e-12)


def test_advantages_of_code_and_paper() -> None:
    rewards = torch.tensor([[0.5, -1.0, 0.3, 0.2], [1.0, 2.0, 9.0, 9.0]], dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    paper = f.minillm_advantages(rewards, mask, variant="paper")
    expected = [[(-1 + 0.3 + 0.2) / 3, 0.25, 0.2, 0], [2, 0, 0, 0]]
    np.testing.assert_allclose(paper, expected, rtol=1e-12)
    code = f.minillm_advantages(rewards, mask, gamma=1.0)
    plain = np.array([[0, -0.5 / 3, 0.25, 0.2], [1.5, 2, 0, 0]])
    np.testing.assert_allclose(code, mask.numpy() * (plain - plain.mean()) / plain.std(ddof=1), rtol=1e-6)
    assert not code.requires_grad
    assert (code[1, 2:] == 0).all()


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_importance_of_a_mixture_in_numpy(share: float) -> None:
    own, other = (np.log(p) for p in np.random.default_rng(0).uniform(1e-3, 1, (2, 50)))
    found = f.mixture_importance(torch.from_numpy(own), torch.from_numpy(other), share).numpy()
    np.testing.assert_allclose(found, np.exp(own) / ((1 - share) * np.exp(own) + share * np.exp(other)), rtol=1e-12)
    assert share == 1 or found.max() <= 1 / (1 - share) + 1e-12
    with pytest.raises(ValueError, match=r"share = 1\.5 is not allowed: it must be from 0 to 1"):
        f.mixture_importance(torch.from_numpy(own), torch.from_numpy(other), 1.5)


def test_the_clip_stops_the_gradient() -> None:
    student, ids = normal(4, 5), torch.tensor([0, 1, 2, 3])
    log_probs = student.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    student.requires_grad_()
    moved = torch.tensor([0.0, 0.5, 0.5, -0.5], dtype=torch.float64)  # log of the ratio
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    one = torch.ones(4, dtype=torch.float64)
    loss = f.clipped_policy_gradient(student, ids, advantages, log_probs - moved, one, 0.2)
    loss.backward()
    expected = [-1.0, -1.2, np.exp(0.5), 0.8]
    assert loss.item() == pytest.approx(np.mean(expected))
    assert (student.grad.abs().sum(-1) > 0).tolist() == [True, False, True, False]


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_minillm_on_a_sampled_batch_adds_the_long_part(variant: str) -> None:
    student, teacher = two()
    sampled = torch.tensor([1, 2, 3, 0, 4, 2, 5])
    extra = {"sampled": sampled, "positions": torch.tensor([1, 2, 3, 6, 7, 12, 13])}  # 3, 2, 0 and 2 of 4 samples
    batch = Batch(torch.empty(4), torch.full((ROWS,), UNLABELLED), mask=torch.ones(4, 4, dtype=torch.bool), extra=extra)
    value = MiniLLM(variant=variant)(Output(student), Output(teacher), batch)
    value.backward()
    found, student.grad = student.grad.clone(), None

    logs = [torch.log_softmax(logits.detach(), -1)[range(ROWS), sampled].numpy() for logits in (student, teacher)]
    rewards, mask = np.zeros((4, 3)), np.zeros((4, 3), dtype=bool)
    for row, place in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (3, 0), (3, 1)]):
        rewards[place], mask[place] = logs[1][row] - logs[0][row], True
    advantages = f.minillm_advantages(torch.tensor(rewards), torch.tensor(mask), variant=variant)[torch.tensor(mask)]
    chosen = torch.log_softmax(student, -1)[range(ROWS), sampled]
    expected = f.reverse_kl_divergence(student, teacher) - (advantages * chosen).mean()  # its gradient, ρ = 1
    expected.backward()
    torch.testing.assert_close(found, student.grad)
    torch.testing.assert_close(value.detach(), f.reverse_kl_divergence(student, teacher).detach() - advantages.mean())


# ---------------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("rkl", {"temperature": 0}, "^temperature = 0 is not allowed: it must be a finite number above 0$"),
        ("jsd", {"beta": 1.1}, "^beta = 1.1 is not allowed: it must be from 0 to 1$"),
        ("skl", {"alpha": 1.0}, "^alpha = 1.0 is not allowed: it must be from 0 to below 1$"),
        ("srkl", {"alpha": -0.1}, "^alpha = -0.1 is not allowed"),
        ("symmetric_kl", {"reverse_share": 2}, "^reverse_share = 2 is not allowed"),
        ("akl", {"mu": float("nan")}, "^mu = nan is not allowed"),
        ("mft", {"threshold": 0.0}, "^threshold = 0.0 is not allowed: it must be above 0 and below 1$"),
        ("topk_kl", {"k": 0}, "^k = 0 is not allowed: it must be a whole number above 0$"),
        ("topk_kl", {"form": "ghost"}, "^form = ghost is not allowed: it must be tail, renormalised or zero$"),
        ("hinge_ranking", {"margin": -1.0}, "^margin = -1.0 is not allowed: it must be null or a finite number"),
        ("gold", {"merge": "both"}, "^merge = both is not allowed: it must be last or first$"),
        ("gold", {"matched_share": 1.5}, "^matched_share = 1.5 is not allowed"),
        ("minillm", {"clip": 1.0}, "^clip = 1.0 is not allowed: it must be above 0 and below 1$"),
    ],
)
def test_bad_settings_are_one_sentence(name: str, settings: dict[str, Any], sentence: str) -> None:
    node = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))[name]
    known = {key: value for key, value in node.items() if key not in ("weight", "schedule", "_target_")}
    module, _, kind = node["_target_"].rpartition(".")
    make = getattr(__import__(module, fromlist=[kind]), kind)
    with pytest.raises(ValueError, match=sentence) as caught:
        make(**{**known, **settings})
    assert "\n" not in str(caught.value)
