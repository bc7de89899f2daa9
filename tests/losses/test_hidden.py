"""Methods on hidden states: padding, pairs of layers, second implementations, tiny networks of transformers."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from kd.distill.distiller import Distiller
from kd.distill.objective import Objective
from kd.errors import KdError
from kd.losses.base import Batch, Output, Setup, Term
from kd.losses.functional import (
    attention_cross_entropy,
    attention_kl,
    attention_score_mse,
    hidden_cosine,
    hidden_fsp,
    hidden_mmd,
    hidden_mse,
    minilm_loss,
    patience_loss,
    self_attention_relations,
)
from kd.losses.hidden._layers import layer_pairs, scores
from kd.losses.hidden.attention_ce import AttentionCrossEntropy
from kd.losses.hidden.attention_kl import AttentionKL
from kd.losses.hidden.attention_mse import AttentionMSE
from kd.losses.hidden.cosine import HiddenCosine
from kd.losses.hidden.hidden_fsp import HiddenFSP
from kd.losses.hidden.hidden_mmd import HiddenMMD
from kd.losses.hidden.hidden_mse import HiddenMSE
from kd.losses.hidden.minilm import MiniLM
from kd.losses.hidden.minilmv2 import MiniLMv2
from kd.losses.hidden.pkd import PatientDistillation
from kd.tasks.base import Want

CONF = Path(__file__).parents[2] / "conf" / "loss"
FOLDER = Path(__file__).parents[2] / "kd" / "losses" / "hidden"
NAMES = sorted(file.stem for file in FOLDER.glob("[!_]*.py"))
LENGTHS = (5, 1, 4)
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def normal(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


# ---------------------------------------------------------------------- the functions, all on the same arguments

# name → (function of the student's three tensors, the teacher's three and a mask); tensors (B, L, 8)
FUNCTIONS: dict[str, Callable[[list[Tensor], list[Tensor], Tensor | None], Tensor]] = {
    "cosine": lambda s, t, m: hidden_cosine(s[0], t[0], m),
    "hidden_mse": lambda s, t, m: hidden_mse(s[0], t[0], m),
    "hidden_mmd": lambda s, t, m: hidden_mmd(s[0], s[1], t[0], t[1], m),
    "hidden_fsp": lambda s, t, m: hidden_fsp(s[0], s[1], t[0], t[1], m),
    "attention_mse": lambda s, t, m: attention_score_mse(scores(*s[:2], 2), scores(*t[:2], 2), m, "masked"),
    "attention_mse, heads merged": lambda s, t, m: attention_score_mse(
        scores(*s[:2], 2), scores(*t[:2], 4), m, "masked", merge_heads=True
    ),
    "attention_kl": lambda s, t, m: attention_kl(*s[:2], *t[:2], 2, m),
    "minilm": lambda s, t, m: minilm_loss(*s, *t, 2, m),
    "minilmv2": lambda s, t, m: self_attention_relations(*s, *t, 4, m),
}


def drawn(grad: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    return [normal(3, 5, 8, grad=grad) for _ in range(3)], [normal(3, 5, 8) for _ in range(3)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_padding_counts_nowhere(name: str) -> None:
    student, teacher = drawn()
    value = FUNCTIONS[name](student, teacher, MASK)
    value.backward()
    assert value > 0
    read = [s for s in student if s.grad is not None]
    assert any((s.grad != 0).any() for s in read)
    assert all((s.grad[~MASK] == 0).all() for s in read)
    others = [torch.where(MASK[..., None], s.detach(), 100.0) for s in (*student, *teacher)]
    assert FUNCTIONS[name](others[:3], others[3:], MASK) == value
    assert not torch.isclose(FUNCTIONS[name](student, teacher, None), value, rtol=1e-3)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_masks_of_ones_and_of_integers(name: str) -> None:
    student, teacher = drawn()
    torch.testing.assert_close(
        FUNCTIONS[name](student, teacher, torch.ones(3, 5)), FUNCTIONS[name](student, teacher, None)
    )
    value = FUNCTIONS[name](student, teacher, MASK.long())
    assert torch.equal(value, FUNCTIONS[name](student, teacher, MASK))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", ["no real position", "zeros", "a sample without a real position"])
def test_degenerate_inputs_are_finite(name: str, kind: str) -> None:
    student, teacher = drawn()
    if kind == "zeros":
        student = [torch.zeros_like(s).requires_grad_() for s in student]
    mask = MASK & (torch.arange(3) != 1)[:, None] if kind.startswith("a sample") else MASK & (kind == "zeros")
    value = FUNCTIONS[name](student, teacher, mask)
    value.backward()
    assert value.isfinite()
    assert all(s.grad.isfinite().all() for s in student if s.grad is not None)
    if kind == "no real position":
        assert value == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_rounds_nothing(name: str) -> None:
    student, teacher = ([x.detach().float() for x in side] for side in drawn())
    with torch.autocast("cpu", torch.bfloat16):
        value = FUNCTIONS[name](student, teacher, MASK)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, FUNCTIONS[name](student, teacher, MASK))


# ---------------------------------------------------------------------- second implementations, sample by sample


def cropped(tensor: Tensor, sample: int) -> Tensor:
    return tensor[sample, : LENGTHS[sample]].detach()


def naive_relation(x: Tensor, y: Tensor, heads: int) -> Tensor:
    """Log softmax of the relation of one sample (length, D), a list over the heads."""
    width = x.shape[1] // heads
    parts = [slice(h * width, (h + 1) * width) for h in range(heads)]
    return torch.stack([(x[:, p] @ y[:, p].T / math.sqrt(width)).log_softmax(-1) for p in parts])


def naive_kl(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], heads: int) -> float:
    total = 0.0
    for sample, length in enumerate(LENGTHS):
        log_s, log_t = (naive_relation(*(cropped(x, sample) for x in pair), heads) for pair in (student, teacher))
        total += float((log_t.exp() * (log_t - log_s)).sum()) / (heads * length)
    return total / len(LENGTHS)


def test_relations_of_cropped_samples() -> None:
    s, t = drawn()
    t = [normal(3, 5, 12) for _ in range(3)]  # another width
    attention = naive_kl((s[0], s[1]), (t[0], t[1]), 2)
    own = [naive_kl((a, a), (b, b), 4) for a, b in zip(s, t, strict=True)]
    assert attention_kl(*s[:2], *t[:2], 2, MASK).item() == pytest.approx(attention, rel=1e-12)
    value = naive_kl((s[2], s[2]), (t[2], t[2]), 2)
    assert minilm_loss(*s, *t, 2, MASK).item() == pytest.approx(attention + value, rel=1e-12)
    assert self_attention_relations(*s, *t, 4, MASK).item() == pytest.approx(sum(own) / 3, rel=1e-12)


def test_means_over_real_positions() -> None:
    (s, o, _), (t, u, _) = drawn(grad=False)
    rows = [(b, i) for b, length in enumerate(LENGTHS) for i in range(length)]
    squares = [float((s[r] - t[r]).square().mean()) for r in rows]
    assert hidden_mse(s, t, MASK).item() == pytest.approx(sum(squares) / len(rows), rel=1e-12)
    cosines = [1 - float(s[r] @ t[r] / (s[r].norm() * t[r].norm())) for r in rows]
    assert hidden_cosine(s, t, MASK).item() == pytest.approx(sum(cosines) / len(rows), rel=1e-12)
    pairs = [(b, i, j) for b, i in rows for j in range(LENGTHS[b])]
    products = [float(s[b, i] @ o[b, j] - t[b, i] @ u[b, j]) / 8 for b, i, j in pairs]
    assert hidden_mmd(s, o, t, u, MASK).item() == pytest.approx(sum(p * p for p in products) / len(pairs), rel=1e-12)
    flows = [
        [cropped(a, b).T @ cropped(c, b) / length for a, c in ((s, o), (t, u))] for b, length in enumerate(LENGTHS)
    ]
    expected = sum(float((a - b).square().mean()) for a, b in flows) / 3
    assert hidden_fsp(s, o, t, u, MASK).item() == pytest.approx(expected, rel=1e-12)


def test_mean_over_real_queries_of_the_cross_entropy() -> None:
    (q, k, _), (u, v, _) = drawn()
    found = []
    for sample in range(3):
        log_s, log_t = (naive_relation(cropped(a, sample), cropped(b, sample), 2) for a, b in ((q, k), (u, v)))
        found += (-(log_t.exp() * log_s).sum(-1)).flatten().tolist()
    hidden = [scores(a, b, 2).masked_fill(~MASK[:, None, None], -1e4) for a, b in ((q, k), (u, v))]
    ours = attention_cross_entropy(*hidden, MASK)
    assert ours.item() == pytest.approx(sum(found) / len(found), rel=1e-12)


# ---------------------------------------------------------------------- variants


def test_variants_of_hidden_mse() -> None:
    s, t = (3 * x[0].detach() for x in drawn())
    assert hidden_mse(s, t, MASK, "tinybert") == hidden_mse(s, t)
    value = hidden_mse(s, t, MASK, "distilbart")
    torch.testing.assert_close(value, hidden_mse(7 * s + 3, t, MASK, "distilbart"), rtol=1e-4, atol=0)  # eps is 1e-5
    assert not torch.isclose(value, hidden_mse(s, t, MASK), rtol=1e-2)


def test_scores_of_padding_keys_are_zero_in_the_code() -> None:
    (q, k, _), (u, v, _) = drawn()
    both = [scores(a, b, 2) for a, b in ((q, k), (u, v))]
    biased = [x + torch.where(MASK, 0.0, -1e4)[:, None, None] for x in both]  # as in the authors' networks
    value = attention_score_mse(*both, MASK)
    torch.testing.assert_close(value, attention_score_mse(*biased))
    elements = 3 * 2 * 5 * 5
    kept = MASK[:, None, None].expand_as(both[0])
    torch.testing.assert_close(value, (both[0] - both[1])[kept].square().sum() / elements)


def test_variants_of_patience() -> None:
    s, t = normal(4, 3, 8), normal(4, 3, 8)
    for normalise in (True, False):
        code, paper = (patience_loss(s, t, normalise, variant) for variant in ("code", "paper"))
        torch.testing.assert_close(paper, 3 * 8 * code)
    torch.testing.assert_close(patience_loss(5 * s, t), patience_loss(s, t))  # the norm does not count
    assert not torch.isclose(patience_loss(5 * s, t, False), patience_loss(s, t, False), rtol=0.1)


# ---------------------------------------------------------------------- pairs of layers


@pytest.mark.parametrize(
    ("student", "teacher", "mapping", "embeddings", "expected"),
    [
        (5, 13, "uniform", True, [(0, 0), (1, 3), (2, 6), (3, 9), (4, 12)]),  # TinyBERT4
        (4, 12, "uniform", False, [(0, 2), (1, 5), (2, 8), (3, 11)]),
        (7, 13, "last", True, [(0, 0), (1, 7), (2, 8), (3, 9), (4, 10), (5, 11), (6, 12)]),
        (2, 5, "last", False, [(0, 3), (1, 4)]),
        (4, 6, "uniform", True, [(0, 0), (1, 1), (2, 3), (3, 5)]),  # 5 / 3 is rounded down
        (3, 3, "uniform", True, [(0, 0), (1, 1), (2, 2)]),
        (1, 1, "listed", False, [(0, 0)]),
    ],
)
def test_layer_pairs(student: int, teacher: int, mapping: str, embeddings: bool, expected: list) -> None:
    assert layer_pairs(student, teacher, mapping, embeddings) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "mapping", "sentence"),
    [
        (2, 3, "listed", r"^mapping = listed is not allowed with 2 student_taps and 3 teacher_taps: .* one or more$"),
        (0, 0, "uniform", "both must name equally many taps, one or more$"),
        (4, 3, "uniform", "^mapping = uniform is not allowed with 3 layers of the student and 2 of the teacher"),
        (1, 3, "last", "one or more, and not more than the teacher$"),
        (1, 3, "first", "^mapping = first is not allowed: it must be uniform, last or listed$"),
    ],
)
def test_layers_that_cannot_be_paired(student: int, teacher: int, mapping: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        layer_pairs(student, teacher, mapping, embeddings=True)


# ---------------------------------------------------------------------- terms on tensors


def hidden_states(student: int, teacher: int, widths: tuple[int, int] = (4, 6)) -> tuple[Output, Output, Batch]:
    own = Output(features={f"s{i}": normal(3, 5, widths[0], grad=True) for i in range(student)})
    other = Output(features={f"t{i}": normal(3, 5, widths[1]) for i in range(teacher)})
    return own, other, Batch(torch.zeros(3, 5), mask=MASK)


def prepared(term: Term, student: Output, teacher: Output, batch: Batch) -> Term:
    term.prepare(Setup(student, teacher, batch))
    return term


def test_hidden_mse_projects_and_pairs() -> None:
    student, teacher, batch = hidden_states(3, 5)
    term = prepared(HiddenMSE(), student, teacher, batch)
    assert (term.student_taps, term.teacher_taps) == (["s0", "s1", "s2"], ["t0", "t2", "t4"])
    assert len({id(adapter) for adapter in term.adapters}) == 1
    assert len(list(term.parameters())) == 2
    value = term(student, teacher, batch)
    expected = [
        hidden_mse(term.adapters[0](student.features[f"s{i}"]), teacher.features[f"t{2 * i}"], MASK) for i in range(3)
    ]
    torch.testing.assert_close(value, sum(expected))
    value.backward()
    assert all(p.grad is not None and p.dtype == torch.float64 for p in term.parameters())
    own = prepared(HiddenMSE(shared=False), student, teacher, batch)
    assert len(list(own.parameters())) == 6


@pytest.mark.parametrize(
    ("adapter", "widths", "count"), [("auto", (4, 6), 2), ("auto", (4, 4), 0), ("linear", (4, 4), 2)]
)
def test_projections(adapter: str, widths: tuple[int, int], count: int) -> None:
    student, teacher, batch = hidden_states(1, 1, widths)
    term = prepared(HiddenCosine(None, None, adapter=adapter), student, teacher, batch)
    assert len(list(term.parameters())) == count
    assert 0 < term(student, teacher, batch) < 2


def test_patience_leaves_the_last_layer_to_the_logits() -> None:
    student, teacher, batch = hidden_states(7, 13, (4, 4))
    skip = prepared(PatientDistillation(), student, teacher, batch)
    assert skip.teacher_taps == ["t2", "t4", "t6", "t8", "t10"]
    assert skip.student_taps == ["s1", "s2", "s3", "s4", "s5"]
    last = prepared(PatientDistillation(mapping="last"), student, teacher, batch)
    assert last.teacher_taps == ["t7", "t8", "t9", "t10", "t11"]
    listed = prepared(PatientDistillation(["s1"], ["t3"], "listed", normalise=False), student, teacher, batch)
    expected = (student.features["s1"][:, 0] - teacher.features["t3"][:, 0]).square().mean()
    torch.testing.assert_close(listed(student, teacher, batch), expected)


def test_flows_go_from_each_layer_to_the_next() -> None:
    student, teacher, batch = hidden_states(3, 3, (4, 4))
    s, t = student.features, teacher.features
    expected = sum(hidden_fsp(s[f"s{i}"], s[f"s{i + 1}"], t[f"t{i}"], t[f"t{i + 1}"], MASK) for i in range(2))
    torch.testing.assert_close(prepared(HiddenFSP(), student, teacher, batch)(student, teacher, batch), expected)


def test_queries_come_first_then_keys() -> None:
    student, teacher, batch = hidden_states(4, 8, (4, 6))
    term = prepared(AttentionKL(None, None, heads=2), student, teacher, batch)
    assert term.student_taps == ["s0", "s1", "s2", "s3"]
    assert term.teacher_taps == ["t1", "t3", "t5", "t7"]
    s, t = student.features, teacher.features
    expected = attention_kl(s["s0"], s["s2"], t["t1"], t["t5"], 2, MASK)
    expected = expected + attention_kl(s["s1"], s["s3"], t["t3"], t["t7"], 2, MASK)
    torch.testing.assert_close(term(student, teacher, batch), expected)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        partial(HiddenCosine, None, None),
        HiddenMSE,
        partial(HiddenMSE, variant="distilbart"),
        partial(PatientDistillation, None, None, "listed"),
        partial(AttentionMSE, None, None, heads=2, variant="masked"),
        partial(AttentionMSE, None, None, heads=2, variant="code"),
        partial(AttentionCrossEntropy, None, None, heads=2),
        partial(AttentionCrossEntropy, None, None, heads=2, merge_heads=True),
        partial(AttentionKL, None, None, heads=2),
        partial(MiniLM, None, None, heads=2),
        partial(MiniLMv2, None, None, relation_heads=2),
        HiddenMMD,
        HiddenFSP,
    ],
)
def test_parts_of_a_batch_make_the_whole(make: Callable[[], Term], masked: bool) -> None:
    """Parts with 2 and 1 samples, weighted with what a term's mean is over, give that of all three."""
    student, teacher, batch = hidden_states(6, 6, (4, 6))
    batch = batch if masked else Batch(batch.inputs)
    term = prepared(make(), student, teacher, batch)
    whole = term(student, teacher, batch)
    parts, weights = [], []
    for rows in (slice(0, 2), slice(2, 3)):
        few = [Output(features={k: v[rows] for k, v in o.features.items()}) for o in (student, teacher)]
        part = batch.map(lambda t, rows=rows: t[rows])
        parts.append(term(*few, part))
        weights.append(float(part.mask.sum()) if term.over == "positions" else len(part))
    together = (weights[0] * parts[0] + weights[1] * parts[1]) / sum(weights)
    assert term.over in ("samples", "positions", "batch")
    assert torch.isclose(together, whole, rtol=1e-9) == (term.over != "batch")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: HiddenMSE(variant="code"),
            "^variant = code is not allowed: it must be masked, tinybert or distilbart$",
        ),
        (lambda: HiddenMSE(adapter="conv"), "^adapter = conv is not allowed: it must be auto, linear or identity$"),
        (lambda: AttentionMSE(variant="paper"), "^variant = paper is not allowed: it must be code or masked$"),
        (lambda: PatientDistillation(variant="mean"), "^variant = mean is not allowed: it must be code or paper$"),
        (lambda: AttentionKL(heads=0), "^heads = 0 is not allowed: it must be 1 or more, or null$"),
        (lambda: MiniLMv2(relation_heads=0), "^relation_heads = 0 is not allowed: it must be 1 or more$"),
        (lambda: hidden_mse(normal(2, 3), normal(2, 3)), r"student_hidden has shape \(2, 3\): it must be \(B, L, D\)"),
        (lambda: hidden_mse(normal(2, 3, 4), normal(2, 3, 5)), "hidden states must have one shape"),
        (lambda: hidden_mse(normal(2, 3, 4), normal(2, 3, 4), MASK), r"mask has shape \(3, 5\): it must be \(2, 3\)"),
        (lambda: hidden_mmd(*[normal(2, 3, 4)] * 2, *[normal(2, 4, 4)] * 2), "must have one batch size and length"),
        (lambda: scores(normal(2, 3, 4), normal(2, 3, 4), 3), "^heads = 3 is not allowed: it must divide the width 4$"),
        (lambda: attention_score_mse(normal(2, 3, 4, 4), normal(2, 2, 4, 4)), "attention scores must have one shape"),
        (lambda: HiddenMSE(["s0"], ["t0"])(*hidden_states(1, 1)), "call prepare"),
        (lambda: prepared(HiddenFSP(), *hidden_states(1, 1)), "two taps or more$"),
        (
            lambda: prepared(PatientDistillation(), *hidden_states(2, 3)),
            "^mapping = uniform is not allowed with 2 pairs",
        ),
        (
            lambda: prepared(AttentionKL(None, None, heads=1), *hidden_states(3, 4)),
            r"^student_taps = \['s0', .*2 tensors",
        ),
        (lambda: prepared(AttentionKL(None, None), *hidden_states(2, 2)), "^heads = null is not allowed: the student"),
        (
            lambda: prepared(MiniLMv2(None, None), *hidden_states(3, 3)),
            "^relation_heads = 48 is not allowed: it must divide the width 4 of student tap s0$",
        ),
    ],
)
def test_errors_are_one_sentence(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- networks of transformers


def bert(layers: int, width: int, heads: int = 2, **changes: Any) -> nn.Module:
    import transformers

    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 12}
    sizes |= {"vocab_size": 20, "max_position_embeddings": 8, "num_labels": 3}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **changes))


def sentences() -> Batch:
    ids = torch.randint(1, 20, (3, 5)) * MASK
    return Batch({"input_ids": ids, "attention_mask": MASK.long()}, torch.tensor([0, 1, 2]), torch.arange(3), MASK)


TINY: dict[str, dict[str, Any]] = {"minilmv2": {"relation_heads": 4}, "attention_mse": {"variant": "masked"}}


def term_of(name: str, **settings: Any) -> Term:
    (node,) = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml")).values()
    term = instantiate({k: v for k, v in node.items() if k not in ("weight", "schedule")} | settings)
    assert isinstance(term, Term)
    return term


def distiller(term: Term, student: nn.Module, teacher: nn.Module, name: str = "term") -> Distiller:
    made = Distiller(student, teacher, Objective({name: term}), optimizer=partial(torch.optim.SGD, lr=0.1))
    made.prepare(sentences())
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_a_small_bert(name: str) -> None:
    made = distiller(term_of(name, **TINY.get(name, {})), bert(2, 8), bert(4, 16), name)
    batch = made.task.rows(sentences())
    step = made.losses(batch)
    step.total.backward()
    assert step.total.isfinite()
    layers = made.student.bert.encoder.layer
    touched = layers[0].attention.self.query.weight.grad
    assert touched is not None
    assert touched.abs().sum() > 0
    assert all(p.grad is None for p in made.teacher.parameters())
    changed = copy.deepcopy(batch)
    changed.inputs["input_ids"][~MASK] = 7
    torch.testing.assert_close(made.losses(changed).total, step.total)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "attention_ce"])
def test_a_copy_of_the_teacher_loses_nothing(name: str) -> None:
    teacher = bert(2, 8)
    settings = {**TINY.get(name, {}), **({"adapter": "identity"} if hasattr(term_of(name), "adapter") else {})}
    made = distiller(term_of(name, **settings), copy.deepcopy(teacher), teacher)
    made.student.eval()
    assert made.losses(made.task.rows(sentences())).total.abs() < 1e-6


def test_the_scores_are_those_of_the_network() -> None:
    """Softmax of the products of tapped queries and keys is what the attention of transformers applies."""
    network = bert(2, 8).eval()
    network.set_attn_implementation("eager")
    batch = sentences()
    found = network(**batch.inputs, output_attentions=True).attentions
    taps = distiller(AttentionKL(), bert(2, 8), network).teacher
    features = taps(batch.inputs, batch, Want(features=True)).features
    for layer, expected in enumerate(found):
        at = f"bert.encoder.layer.{layer}.attention.self"
        ours = scores(features[f"{at}.query"], features[f"{at}.key"], 2)
        ours = ours.masked_fill(~MASK[:, None, None], -torch.inf).softmax(-1)
        torch.testing.assert_close(ours, expected)


def test_distilberts_objective_is_a_sum_of_terms() -> None:
    """5 · kd + 2 · ce + 1 · cosine."""
    student, teacher = bert(2, 8), bert(4, 8)
    terms = {"kd": term_of("kd", temperature=2.0), "ce": term_of("ce"), "cosine": term_of("cosine")}
    weights = {"kd": 5.0, "ce": 2.0, "cosine": 1.0}
    made = Distiller(student, teacher, Objective(terms, weights))
    made.prepare(sentences())
    step = made.losses(made.task.rows(sentences()))
    torch.testing.assert_close(step.total, sum(weights[name] * step.values[name] for name in terms))
    assert list(made.objective.parameters()) == []


@pytest.mark.parametrize("name", ["attention_kl", "attention_mse", "attention_ce", "minilm"])
def test_attention_head_by_head(name: str) -> None:
    with pytest.raises(KdError, match=r"^loss\.term: the student has 4 attention heads, the teacher 2"):
        distiller(term_of(name), bert(2, 8, heads=4), bert(4, 16))


@pytest.mark.parametrize("name", ["attention_mse", "attention_ce"])
def test_merged_heads_may_differ_in_number(name: str) -> None:
    made = distiller(term_of(name, merge_heads=True), bert(2, 8, heads=4), bert(4, 16))
    assert made.losses(made.task.rows(sentences())).total > 0


def test_rotary_positions_are_refused_where_scores_are_made() -> None:
    import transformers

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20}

    def llama(width: int) -> nn.Module:
        config = transformers.LlamaConfig(hidden_size=width, num_labels=3, pad_token_id=0, **sizes)
        return transformers.LlamaForSequenceClassification(config)

    with pytest.raises(KdError, match=r"scores of the student are no products .* \(model\.rotary_emb\): minilmv2"):
        distiller(term_of("minilm"), llama(8), llama(16))
    made = distiller(term_of("minilmv2", relation_heads=4), llama(8), llama(16))
    assert made.losses(made.task.rows(sentences())).total > 0


def test_causal_attention_is_refused_where_scores_are_made() -> None:
    with pytest.raises(KdError, match=r"scores of the teacher are no products .* \(bert\..*\.self is causal\)"):
        distiller(term_of("attention_kl"), bert(2, 8), bert(4, 16, is_decoder=True))


class OwnMaps(Term):
    """Squares of differences of attention probabilities, read from taps."""

    needs_student_logits = needs_teacher_logits = False
    needs_attention_maps, over = True, "samples"
    student_taps = ("bert.encoder.layer.1.attention.self:output.1",)
    teacher_taps = ("bert.encoder.layer.3.attention.self:output.1",)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        ((own, other),) = self.pairs(student, teacher)
        return (own - other).square().mean()


def test_attention_maps_of_a_bert_are_made_where_a_term_reads_them(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="kd"):
        made = distiller(OwnMaps(), bert(2, 8), bert(4, 16))
    said = [r.getMessage() for r in caplog.records if "fused" in r.getMessage()]
    sides = ("student", "teacher")
    assert said == [f"loss.term reads attention maps: fused attention is off in the {side}'s bert" for side in sides]
    made.losses(made.task.rows(sentences())).total.backward()
    assert made.student.bert.encoder.layer[1].attention.self.key.weight.grad.abs().sum() > 0
